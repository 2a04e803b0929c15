"""Costs of attention layers as a printed table, a Markdown table and curves against the length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attention_zoo.cli._bench.blocks import BlockCost
from attention_zoo.cli._figure import new_figure
from attention_zoo.cli._table import format_number, print_rows

KIB, MIB = 2**10, 2**20
MARKERS = "osv^DPX<>*hpd"
NUMBERS = (
    "block ms", "mixing ms", "SDPA ms", " ratio", "block MiB", "mixing MiB", "SDPA MiB", " tokens/s", "step ms",
    "state KiB",
)  # fmt: skip
COLUMNS = {"length": ">7", "phase": "<8"} | {title: f">{max(8, len(title))}" for title in NUMBERS}
MARKDOWN_COLUMNS = (
    "block", "tokens", "forward ms", "over SDPA", "training ms", "over SDPA", "tokens/s in training",
    "peak MiB in training", "step ms", "state KiB",
)  # fmt: skip


def print_costs(costs: Iterable[BlockCost], names: Sequence[str]) -> list[BlockCost]:
    """Print one row per cost of the layers `names`, as soon as it is measured. Returns the costs."""
    columns = {"block": f"<{max(map(len, names))}", **COLUMNS}

    def cells(cost: BlockCost) -> Sequence[str | float]:
        times = (cost.block_ms, cost.mixing_ms, cost.sdpa_ms)
        peaks = (peak / MIB for peak in (cost.block_bytes, cost.mixing_bytes, cost.sdpa_bytes))
        last = (int(cost.tokens_per_second), *_decoding(cost))
        return (cost.block, cost.length, cost.phase, *times, _ratio(cost), *peaks, *last)

    printed = print_rows(columns, costs, cells)
    if any(cost.whole for cost in printed):
        print("\n* the whole block, projections included, over SDPA without any")
    return printed


def as_markdown(costs: Sequence[BlockCost], machine: str) -> str:
    """A Markdown table, one row per layer and length.

    Args:
        costs: costs of each layer and length, forward followed by training.
        machine: description of the machine.
    """
    lines = [machine, "", f"| {' | '.join(MARKDOWN_COLUMNS)} |", "|---" * len(MARKDOWN_COLUMNS) + "|"]
    for forward, training in zip(costs[::2], costs[1::2], strict=True):
        cells = [f"`{forward.block}`", str(forward.length)]
        for cost in (forward, training):
            cells += [format_number(cost.block_ms), _ratio(cost).rstrip()]
        speed, peak = f"{training.tokens_per_second:,.0f}", format_number(training.block_bytes / MIB)
        lines.append(f"| {' | '.join([*cells, speed, peak, *_decoding(forward)])} |")
    notes = (
        "Over SDPA: the mixing alone, beside torch's scaled_dot_product_attention of the same shape in the same run."
    )
    if any(cost.whole for cost in costs):
        notes += " *: the whole block, projections included."
    return "\n".join([*lines, "", notes]) + "\n"


def draw_costs(costs: Sequence[BlockCost], machine: str, path: str) -> None:
    """Draw time and peak memory of whole layers against the length on logarithmic axes, with SDPA alone in grey."""
    figure = new_figure(13, 4.8)
    panels = (("forward", "ms", 1), ("training", "ms", 1), ("training", "bytes", MIB))
    for axis, (phase, field, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        chosen = [cost for cost in costs if cost.phase == phase]
        for k, block in enumerate(dict.fromkeys(cost.block for cost in chosen)):
            points = sorted((c.length, getattr(c, f"block_{field}") / scale) for c in chosen if c.block == block)
            axis.plot(
                *zip(*points, strict=True), color=_color(k), marker=MARKERS[k % len(MARKERS)], label=block, markersize=4
            )
        sdpa = {cost.length: getattr(cost, f"sdpa_{field}") / scale for cost in chosen if not cost.whole}
        if sdpa:
            axis.plot(*zip(*sorted(sdpa.items()), strict=True), "--", color="gray", label="SDPA alone")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms" if field == "ms" else "MiB")
        axis.set_title(f"{phase}, {'time' if field == 'ms' else 'peak memory'}")
        lengths = sorted({cost.length for cost in chosen})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=100, format="png")


def _color(k: int) -> tuple[float, ...]:
    """One of twenty colours: the ten dark ones first, then their light variants."""
    from matplotlib import colormaps

    return tuple(colormaps["tab20"]((2 * k + k // 10 % 2) % 20))


def _ratio(cost: BlockCost) -> str:
    return format_number(cost.ratio) + ("*" if cost.whole else " ")


def _decoding(cost: BlockCost) -> tuple[str, str]:
    """Time of a step and size of the state, empty where they were not measured."""
    if cost.step_ms is None or cost.state_bytes is None:
        return "", ""
    return format_number(cost.step_ms), format_number(cost.state_bytes / KIB)
