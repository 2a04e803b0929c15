"""What the bench measured, as a Markdown table and as curves against the length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attention_zoo.cli._gallery.pictures import new_figure
from attention_zoo.cli._table import format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIB, MIB = 2**10, 2**20
HEADS = (
    "block", "tokens", "forward ms", "over SDPA", "training ms", "over SDPA", "tokens/s in training",
    "peak MiB in training", "step ms", "state KiB",
)  # fmt: skip

Rows = Sequence[Mapping[str, Any]]


def as_markdown(rows: Rows, machine: str) -> str:
    """One line per block and length.

    Args:
        rows: fields of `BlockCost`, forward and training of each block and length.
        machine: what it was measured on.
    """
    lines = [machine, "", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for block, length in dict.fromkeys((row["block"], row["length"]) for row in rows):
        forward, training = (_find(rows, block, length, phase) for phase in ("forward", "training"))
        star = "*" if forward["whole"] else ""
        cells = [
            f"`{block}`",
            f"{length}",
            format_number(forward["block_ms"]),
            f"{format_number(forward['ratio'])}{star}",
            format_number(training["block_ms"]),
            f"{format_number(training['ratio'])}{star}",
            f"{training['tokens_per_second']:,.0f}",
            format_number(training["block_bytes"] / MIB),
            "" if forward["step_ms"] is None else format_number(forward["step_ms"]),
            "" if forward["state_bytes"] is None else format_number(forward["state_bytes"] / KIB),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = (
        "Over SDPA: the mixing alone, beside torch's scaled_dot_product_attention of the same shape in the same run."
    )
    if any(row["whole"] for row in rows):
        notes += " *: the whole block, projections included."
    return "\n".join([*lines, "", notes]) + "\n"


def draw_costs(rows: Rows, machine: str) -> Figure:
    """Time and peak memory of whole blocks against the length, both axes logarithmic; SDPA alone in grey."""
    figure = new_figure(13, 4.8)
    what = (
        ("forward", "ms", "block_ms", 1),
        ("training", "ms", "block_ms", 1),
        ("training", "MiB", "block_bytes", MIB),
    )
    for axis, (phase, unit, field, scale) in zip(figure.subplots(1, 3), what, strict=True):
        chosen = [row for row in rows if row["phase"] == phase]
        for k, block in enumerate(dict.fromkeys(row["block"] for row in chosen)):
            points = sorted((row["length"], row[field] / scale) for row in chosen if row["block"] == block)
            axis.plot(*zip(*points, strict=True), "osv^DPX"[k % 7] + "-", color=f"C{k % 10}", label=block, markersize=4)
        alone = {row["length"]: row[field.replace("block", "sdpa")] / scale for row in chosen if not row["whole"]}
        if alone:
            axis.plot(*zip(*sorted(alone.items()), strict=True), "--", color="gray", label="SDPA alone")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
        axis.set_title(f"{phase}, {'peak memory' if unit == 'MiB' else 'time'}")
        lengths = sorted({row["length"] for row in chosen})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(machine, fontsize=9)
    return figure


def _find(rows: Rows, block: str, length: int, phase: str) -> Mapping[str, Any]:
    return next(row for row in rows if (row["block"], row["length"], row["phase"]) == (block, length, phase))
