"""Figures of receptive fields and attention maps, and receptive fields as text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from attention_zoo.cli._figure import new_figure
from attention_zoo.cli._gallery.fields import Field
from attention_zoo.ops import TextImageLayout

SHADES = " .:-=+*#%@"
COLORS = "viridis"
MOST_HEADS = 4


def draw_field(field: Field, title: str, path: Path) -> None:
    """Draw a receptive field: a matrix of outputs and inputs, or text and image of a few tokens of an image layer."""
    if field.layout is not None:
        _draw_image_field(field, field.layout, title, path)
        return
    figure = new_figure(4.4, 4)
    axis = figure.subplots()
    shown = _show(axis, field.strength)
    axis.set(xlabel="token of the context" if field.of_context else "input token", ylabel="output token", title=title)
    figure.colorbar(shown, ax=axis, label="gradient, square root")
    figure.savefig(path, dpi=100)


def _draw_image_field(field: Field, layout: TextImageLayout, title: str, path: Path) -> None:
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
        image.set_title(field.name(query), fontsize=9)
        text.set_xlabel("text", fontsize=8)
        text.set(xticks=[], yticks=[])
        image.set(xticks=[], yticks=[])
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def draw_map(weights: Tensor, sentence: bytes, title: str, path: Path) -> None:
    """Draw the attention maps (h, n, n) of a few heads; negative weights are red."""
    weights = weights[:MOST_HEADS]
    figure, axes = _grid(len(weights), 2, 3.6, 3.7, margin=0.3)
    labels = [chr(byte) if 32 < byte < 127 else "·" for byte in sentence]
    for head, (axis, values) in enumerate(zip(axes, weights, strict=True)):
        limit = float(values.abs().max()) or 1.0
        signed = bool((values < 0).any())
        shown = values.sign() * (values.abs() / limit).sqrt()
        axis.imshow(shown.numpy(), cmap="RdBu" if signed else COLORS, vmin=-1 if signed else 0, vmax=1)
        axis.set_title(f"head {head}", fontsize=9)
        axis.set_xticks(range(len(labels)), labels, fontsize=5)
        axis.set_yticks(range(len(labels)), labels, fontsize=5)
        axis.tick_params(length=0, pad=1)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def draw_overview(fields: dict[str, Field], path: Path) -> None:
    """Draw one figure with the receptive fields of all layers without image layout, if there are any."""
    matrices = {name: field.strength for name, field in fields.items() if field.layout is None}
    if not matrices:
        return
    figure, axes = _grid(len(matrices), 4, 2.6, 2.7)
    for axis, (name, strength) in zip(axes, matrices.items(), strict=True):
        _show(axis, strength, aspect="auto")
        axis.set(xticks=[], yticks=[], title=name)
    figure.supxlabel("input token", fontsize=9)
    figure.supylabel("output token", fontsize=9)
    figure.savefig(path, dpi=100)


def _grid(count: int, most_columns: int, width: float, height: float, *, margin: float = 0.0) -> tuple[Any, list[Any]]:
    """A figure and `count` axes in rows, each `width` x `height` inches."""
    columns = min(most_columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(width * columns, height * rows + margin)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


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
        starts = range(layout.text_len, layout.length, layout.width)
        lines.append(f"{field.name(query)}: text |{text[: layout.text_len]}|")
        lines += [f"  {text[start : start + layout.width]}" for start in starts]
    return "\n".join(lines)
