"""Figures of receptive fields and attention maps, and receptive fields as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attention_zoo.cli._figure import new_figure
from attention_zoo.cli._gallery.fields import Field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = " .:-=+*#%@"
COLORS = "viridis"
MOST_HEADS = 4


def draw_field(field: Field, title: str) -> Figure:
    """The receptive field: a matrix of outputs and inputs, or text and image of a few tokens of an image layer."""
    if field.layout is not None:
        return _draw_image_field(field, field.layout, title)
    figure = new_figure(4.4, 4)
    axis = figure.subplots()
    shown = _show(axis, field.strength)
    axis.set(xlabel="token of the context" if field.of_context else "input token", ylabel="output token", title=title)
    figure.colorbar(shown, ax=axis, label="gradient, square root")
    return figure


def _draw_image_field(field: Field, layout: Any, title: str) -> Figure:
    count = len(field.queries)
    figure = new_figure(2.3 * count + 0.6, 2.6)
    axes = figure.subplots(1, 2 * count, width_ratios=[1, layout.width] * count)
    for query, row, text, image in zip(field.queries, field.strength, axes[::2], axes[1::2], strict=True):
        _show(text, row[: layout.text_len, None], aspect="auto")
        _show(image, row[layout.text_len :].view(layout.height, layout.width))
        y, x = divmod(query - layout.text_len, layout.width)
        if query < layout.text_len:
            text.plot(0, query, "rx")
        else:
            image.plot(x, y, "rx")
        image.set_title(f"text token {query}" if query < layout.text_len else f"pixel ({y}, {x})", fontsize=9)
        text.set_xlabel("text", fontsize=8)
        text.set(xticks=[], yticks=[])
        image.set(xticks=[], yticks=[])
    figure.suptitle(title)
    return figure


def draw_map(weights: Tensor, sentence: bytes, title: str) -> Figure:
    """The attention maps (h, n, n) of a few heads; negative weights are red."""
    heads = min(len(weights), MOST_HEADS)
    columns = min(heads, 2)
    rows = -(-heads // columns)
    figure = new_figure(3.6 * columns, 3.7 * rows + 0.3)
    labels = [chr(byte) if 32 < byte < 127 else "·" for byte in sentence]
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[heads:]:
        axis.axis("off")
    for head, (axis, values) in enumerate(zip(axes[:heads], weights, strict=False)):
        limit = float(values.abs().max()) or 1.0
        signed = bool((values < 0).any())
        shown = values.sign() * (values.abs() / limit).sqrt()
        axis.imshow(shown.numpy(), cmap="RdBu" if signed else COLORS, vmin=-1 if signed else 0, vmax=1)
        axis.set_title(f"head {head}", fontsize=9)
        axis.set_xticks(range(len(labels)), labels, fontsize=5)
        axis.set_yticks(range(len(labels)), labels, fontsize=5)
        axis.tick_params(length=0, pad=1)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_overview(fields: dict[str, Field], path: Path) -> None:
    """Write one figure with the receptive fields of all layers without image layout, if there are any."""
    matrices = {name: field.strength for name, field in fields.items() if field.layout is None}
    if not matrices:
        return
    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = new_figure(2.6 * columns, 2.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (name, strength) in zip(axes, matrices.items(), strict=False):
        _show(axis, strength, aspect="auto")
        axis.set(xticks=[], yticks=[], title=name)
    for axis in axes[len(matrices) :]:
        axis.axis("off")
    figure.supxlabel("input token", fontsize=9)
    figure.supylabel("output token", fontsize=9)
    figure.savefig(path, dpi=100)


def _show(axis: Any, strength: Tensor, **options: str) -> Any:
    """Show square roots, which make small values visible and keep exact zeros."""
    return axis.imshow(strength.sqrt().numpy(), cmap=COLORS, vmin=0, vmax=1, **options)


def field_as_text(field: Field) -> str:
    """The receptive field as text, with denser characters for stronger values."""
    layout = field.layout
    lines = []
    for query, row in zip(field.queries, field.strength.sqrt().tolist(), strict=True):
        text = "".join(SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)] for value in row)
        if layout is None:
            lines.append(text)
            continue
        pixel = divmod(query - layout.text_len, layout.width)
        name = f"text token {query}" if query < layout.text_len else f"pixel {pixel}"
        starts = range(layout.text_len, layout.length, layout.width)
        lines.append(f"{name}: text |{text[: layout.text_len]}|")
        lines += [f"  {text[start : start + layout.width]}" for start in starts]
    return "\n".join(lines)
