"""Drawing what `fields` measured, as pictures and as characters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attention_zoo.cli._gallery.fields import Field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = " .:-=+*#%@"
COLORS = "viridis"
MOST_HEADS = 4


def new_figure(width: float, height: float) -> Figure:
    """A figure without a window.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install attention-zoo[examples]; --ascii does not") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_field(field: Field, title: str) -> Figure:
    """The receptive field: a matrix of outputs and inputs, or the image around a few pixels with its text beside."""
    if field.layout is not None:
        return _draw_image_field(field, title)
    figure = new_figure(4.4, 4)
    axis = figure.subplots()
    shown = axis.imshow(_visible(field.strength).numpy(), cmap=COLORS, vmin=0, vmax=1)
    axis.set(xlabel="token of the context" if field.of_context else "input token", ylabel="output token", title=title)
    figure.colorbar(shown, ax=axis, label="gradient, square root")
    return figure


def _draw_image_field(field: Field, title: str) -> Figure:
    layout = field.layout
    assert layout is not None
    count = len(field.queries)
    figure = new_figure(2.3 * count + 0.6, 2.6)
    grid: Any = figure.subplots(1, 2 * count, width_ratios=[1, layout.width] * count)
    for k, (query, row) in enumerate(zip(field.queries, _visible(field.strength), strict=True)):
        text, image = grid[2 * k], grid[2 * k + 1]
        text.imshow(row[: layout.text_len, None].numpy(), cmap=COLORS, vmin=0, vmax=1, aspect="auto")
        image.imshow(row[layout.text_len :].view(layout.height, layout.width).numpy(), cmap=COLORS, vmin=0, vmax=1)
        if query < layout.text_len:
            text.plot(0, query, "rx")
            image.set_title(f"text token {query}", fontsize=9)
        else:
            y, x = divmod(query - layout.text_len, layout.width)
            image.plot(x, y, "rx")
            image.set_title(f"pixel ({y}, {x})", fontsize=9)
        text.set_xlabel("text", fontsize=8)
        for axis in (text, image):
            axis.set(xticks=[], yticks=[])
    figure.suptitle(title)
    return figure


def draw_map(weights: Tensor, sentence: bytes, title: str) -> Figure:
    """The weights of a few heads on a sentence; red below 0, for blocks whose weights have signs."""
    heads = min(len(weights), MOST_HEADS)
    columns = min(heads, 2)
    rows = -(-heads // columns)
    figure = new_figure(3.6 * columns, 3.7 * rows + 0.3)
    labels = [chr(byte) if 32 < byte < 127 else "·" for byte in sentence]
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat[heads:]:
        axis.axis("off")
    for head, axis in enumerate(grid.flat[:heads]):
        limit = float(weights[head].abs().max()) or 1.0
        signed = bool((weights[head] < 0).any())
        shown = weights[head].sign() * (weights[head].abs() / limit).sqrt()
        axis.imshow(shown.numpy(), cmap="RdBu" if signed else COLORS, vmin=-1 if signed else 0, vmax=1)
        axis.set_title(f"head {head}", fontsize=9)
        axis.set_xticks(range(len(labels)), labels, fontsize=5)
        axis.set_yticks(range(len(labels)), labels, fontsize=5)
        axis.tick_params(length=0, pad=1)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_overview(fields: dict[str, Field], path: Path) -> None:
    """All receptive fields in one picture."""
    plain = {name: field for name, field in fields.items() if field.layout is None}
    columns = min(4, max(1, len(plain)))
    rows = -(-len(plain) // columns)
    figure = new_figure(2.6 * columns, 2.7 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for axis, (name, field) in zip(grid.flat, plain.items(), strict=False):
        axis.axis("on")
        axis.imshow(_visible(field.strength).numpy(), cmap=COLORS, vmin=0, vmax=1, aspect="auto")
        axis.set(xticks=[], yticks=[], title=name)
    figure.supxlabel("input token", fontsize=9)
    figure.supylabel("output token", fontsize=9)
    figure.savefig(path, dpi=100)


def field_as_text(field: Field) -> str:
    """The receptive field in characters, the strongest darkest."""
    if field.layout is None:
        return "\n".join(_characters(row) for row in _visible(field.strength))
    layout, parts = field.layout, []
    for query, row in zip(field.queries, _visible(field.strength), strict=True):
        place = query - layout.text_len
        what = f"text token {query}" if place < 0 else f"pixel {divmod(place, layout.width)}"
        image = row[layout.text_len :].view(layout.height, layout.width)
        parts += [
            f"{what}: text |{_characters(row[: layout.text_len])}|",
            *(f"  {_characters(line)}" for line in image),
        ]
    return "\n".join(parts)


def _characters(row: Tensor) -> str:
    return "".join(SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)] for value in row.tolist())


def _visible(strength: Tensor) -> Tensor:
    """Square roots, so that what is weak shows beside what is strong; exact zeros stay."""
    return strength.sqrt()
