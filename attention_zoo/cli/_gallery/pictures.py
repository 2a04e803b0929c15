"""Figures of receptive fields and attention maps, and receptive fields as text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from attention_zoo.cli._figure import new_figure
from attention_zoo.cli._gallery.fields import Drawn, Field, some_tokens
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
    figure = new_figure(2.5 * count + 1.2, 2.8)
    axes = figure.subplots(1, 2 * count, width_ratios=[1, layout.width] * count)
    for query, row, text, image in zip(field.queries, field.strength, axes[::2], axes[1::2], strict=True):
        _show(text, row[: layout.text_len, None], aspect="auto")
        shown = _show(image, row[layout.text_len :].view(layout.height, layout.width))
        y, x = divmod(query - layout.text_len, layout.width)
        if query < layout.text_len:
            text.plot(0, query, "rx")
        else:
            image.plot(x, y, "rx")
        image.set_title(f"output: {field.name(query)}", fontsize=9)
        text.set(xticks=[], xlabel="text")
        image.set(xlabel="column")
        for axis in (text, image):
            axis.tick_params(labelsize=7)
            axis.locator_params(axis="y", nbins=4, integer=True)
    axes[0].set_ylabel("token")
    axes[1].set_ylabel("row")
    figure.colorbar(shown, ax=list(axes), label="gradient, square root")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def draw_map(weights: Tensor, sentence: bytes, title: str, path: Path) -> None:
    """Draw the attention maps (h, n, n) of a few heads over the characters of a sentence."""
    weights = weights[:MOST_HEADS]
    figure, axes = _grid(len(weights), 2, 5.6, 5.0, margin=0.3)
    labels = [chr(byte) if 32 < byte < 127 else "·" for byte in sentence]
    for head, (axis, values) in enumerate(zip(axes, weights, strict=True)):
        shown = axis.imshow(values.numpy(), **_scale(values))
        axis.set_title(f"head {head}", fontsize=10)
        axis.set_xticks(range(len(labels)), labels, fontsize=7 if len(labels) <= 45 else 5, family="monospace")
        axis.set_yticks(range(len(labels)), labels, fontsize=7 if len(labels) <= 45 else 5, family="monospace")
        axis.tick_params(length=0, pad=1)
        axis.set(xlabel="attends to (key)", ylabel="token (query)")
        figure.colorbar(shown, ax=axis, label=_legend(values), shrink=0.85)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def draw_image_map(drawn: Drawn, layout: TextImageLayout, image: Tensor, title: str, path: Path) -> None:
    """Draw the attention of a few image tokens, the mean over heads, over the image in grey."""
    from matplotlib.cm import ScalarMappable

    weights = drawn.weights.mean(0)
    queries = [query for query in some_tokens(layout) if layout.text_len <= query < len(weights)]
    figure = new_figure(3.1 * len(queries) + 0.9, 3.3)
    axes = figure.subplots(1, 2 * len(queries), width_ratios=[1, layout.width] * len(queries))
    rows = weights[queries]
    scale = _scale(rows)
    for query, row, text, pixels in zip(queries, rows, axes[::2], axes[1::2], strict=True):
        text.imshow(row[: layout.text_len, None].numpy(), aspect="auto", **scale)
        pixels.imshow(image.numpy(), cmap="gray", vmin=-float(image.max()))  # black would hide the colours
        part = row[layout.text_len :].view(layout.height, layout.width)
        opacity = (part != 0) * (0.4 + 0.5 * (part.abs() / rows.abs().max().clamp(min=1e-30)).sqrt())
        shown = pixels.imshow(part.numpy(), alpha=opacity.numpy(), **scale)
        y, x = divmod(query - layout.text_len, layout.width)
        pixels.plot(x, y, "rx")
        pixels.set_title(f"query: pixel ({y}, {x})", fontsize=9)
        pixels.set(xlabel="column", ylabel="row")
        text.set(xticks=[], xlabel="text", ylabel="token")
        for axis in (text, pixels):
            axis.tick_params(labelsize=7)
    figure.colorbar(ScalarMappable(shown.norm, shown.cmap), ax=list(axes), label=_legend(rows))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def _scale(values: Tensor) -> dict[str, Any]:
    """Colours of weights on a square root scale: sequential, or diverging around 0 if some are negative."""
    from matplotlib.colors import FuncNorm, PowerNorm

    limit = float(values.abs().max()) or 1.0
    if not bool((values < 0).any()):
        return {"cmap": COLORS, "norm": PowerNorm(0.5, 0, limit)}
    root = (lambda x: abs(x) ** 0.5 * (2 * (x > 0) - 1), lambda x: x * abs(x))
    return {"cmap": "RdBu", "norm": FuncNorm(root, -limit, limit)}


def _legend(values: Tensor) -> str:
    return "weight (red: negative, blue: positive)" if bool((values < 0).any()) else "weight"


def draw_overview(fields: dict[str, Field], path: Path) -> None:
    """Draw one figure with the receptive fields of all layers without image layout, if there are any."""
    matrices = {name: field.strength for name, field in fields.items() if field.layout is None}
    if not matrices:
        return
    figure, axes = _grid(len(matrices), 4, 2.7, 2.7)
    for axis, (name, strength) in zip(axes, matrices.items(), strict=True):
        shown = _show(axis, strength, aspect="auto")
        axis.set_title(name)
        axis.locator_params(nbins=3, integer=True)
        axis.tick_params(labelsize=7)
    figure.colorbar(shown, ax=axes, label="gradient, square root", shrink=0.7)
    figure.supxlabel(
        "input token (for cross: token of the context)" if "cross" in matrices else "input token", fontsize=9
    )
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
