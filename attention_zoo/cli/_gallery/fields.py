"""Measurements of the gallery: receptive fields by gradients, and attention maps on a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_features
from attention_zoo.cli._targets import Make, accepted, reads_context, required
from attention_zoo.models import LanguageModel, MultiStreamTransformer, TextToImageTransformer
from attention_zoo.ops import TextImageLayout
from attention_zoo.saving.model_file import read_model
from attention_zoo.testing.subject import seeded
from attention_zoo.training import as_tokens, random_batch

WINDOW = 8  # tokens of the window of a layer that needs one
TOKENS = 40  # tokens of the receptive field of a layer without image layout
DRAWS = 4  # random inputs over which a receptive field is averaged
HEADS = 4
BATCH = 16  # sequences per training step
LEVELS = 8  # grey levels of images
MOST_BYTES = 64  # of a text, so that each can be read on the axes
LAYOUT = TextImageLayout(text_len=8, height=9, width=11)


@dataclass(frozen=True)
class Field:
    """A measured receptive field.

    Attributes:
        strength: (i, j), mean 2-norm of the gradient of output i, in a random direction, with respect to input j; the
            maximum is 1.
        queries: the tokens whose outputs are the rows of `strength`.
        layout: text and image of an image layer.
        of_context: whether the inputs are those of the context.
    """

    strength: Tensor
    queries: Sequence[int]
    layout: TextImageLayout | None = None
    of_context: bool = False

    def name(self, query: int) -> str:
        """A token of an image layer: its index in the text, or its row and column in the image."""
        if self.layout is None or query < self.layout.text_len:
            return f"text token {query}"
        return f"pixel {divmod(query - self.layout.text_len, self.layout.width)}"


def small_sizes(make: Make, dim: int, layout: TextImageLayout) -> dict[str, Any]:
    """Constructor arguments of a layer: the layout or window that it needs, and few heads if their size is free."""
    sizes = accepted(make, layout=layout, heads=HEADS, dim_head=dim // HEADS) | required(make, window=WINDOW)
    if "dim_head" not in sizes:
        sizes.pop("heads", None)
    return sizes


def receptive_field(block: Any, dim: int, *, seed: int = 0) -> Field:
    """Measure the receptive field of each token of a layer; for an image layer, of a few tokens.

    Args:
        block: layer with `dim` features.
        dim: number of features.
        seed: seed of the random inputs.
    """
    layout: TextImageLayout | None = getattr(block, "layout", None)
    length = TOKENS if layout is None else layout.length
    queries = range(length) if layout is None else some_tokens(layout)
    streams = getattr(block, "streams", 1)
    generator = torch.Generator().manual_seed(seed)
    shape = (DRAWS, length, dim) if streams == 1 else (DRAWS, streams, length, dim)
    source = x = torch.randn(shape, generator=generator).requires_grad_()
    context = {}
    if reads_context(block):
        features = getattr(block, "context_dim", dim)
        source = torch.randn(DRAWS, TOKENS // 2, features, generator=generator).requires_grad_()
        context = {"context": source}
    out = block(x, **context)
    check_features(out[:, 0] if out.ndim == 4 else out, dim, name="the layer's output")
    rows = []
    for query in queries:
        direction = torch.randn(*out.shape[:-2], dim, generator=generator)
        (gradient,) = torch.autograd.grad((out[..., query, :] * direction).sum(), source, retain_graph=True)
        rows.append(gradient.norm(dim=-1).flatten(0, -2).mean(0))
    strength = torch.stack(rows)
    return Field(strength / strength.max().clamp(min=1e-30), list(queries), layout, bool(context))


def some_tokens(layout: TextImageLayout) -> list[int]:
    """The last text token, and image tokens in the middle, at an edge and at the end."""
    pixels = [(layout.height // 2, layout.width // 2), (layout.height - 2, 0), (layout.height - 1, layout.width - 1)]
    return [layout.text_len - 1, *(layout.text_len + row * layout.width + column for row, column in pixels)]


class Drawn(NamedTuple):
    """An attention map to draw.

    Attributes:
        weights: (h, i, j).
        steps: training steps of the model; 0 for random weights.
        layout: text and image that the tokens are, for an image layer.
        image: (height, width), its image.
    """

    weights: Tensor
    steps: int
    layout: TextImageLayout | None = None
    image: Tensor | None = None


def trained_map(make: Make, sentence: bytes, *, dim: int, steps: int, text: bytes) -> Drawn | None:
    """The attention map of the last layer of a small trained model.

    A layer that needs a context has random weights. An image layer is trained on pictures of discs and mapped over one
    of them, any other layer on text.

    Args:
        make: makes the layer from `dim` and keyword arguments.
        sentence: input of a language model, one token per byte.
        dim: number of features.
        steps: training steps; 0 for random weights.
        text: training text.

    Returns:
        The map, or None for a layer without `attention_map` or with several streams.
    """
    options = small_sizes(make, dim, LAYOUT)
    tokens = torch.tensor([list(sentence)])
    with seeded(0):
        block: Any = make(dim, **options)
        if not callable(getattr(block, "attention_map", None)) or getattr(block, "streams", 1) > 1:
            return None
        if reads_context(block):  # the sentence is its own context
            embedded = torch.randn(256, dim)[tokens]
            return Drawn(block.attention_map(embedded, embedded)[0].detach(), 0)
        if "layout" in options:
            return _image_map(partial(make, **options), dim, steps)
        model = LanguageModel(num_tokens=256, dim=dim, depth=2, attention=partial(make, **options))
        data = as_tokens(text)
        _train(model, lambda: model.loss(random_batch(data, BATCH, len(sentence))), steps)
        with torch.no_grad():
            return Drawn(model.eval().attention_maps(tokens)[-1][0], steps)


def _image_map(make: Make, dim: int, steps: int) -> Drawn:
    height, width = LAYOUT.height, LAYOUT.width
    model = TextToImageTransformer(
        num_text_tokens=2,
        text_len=LAYOUT.text_len,
        num_image_tokens=LEVELS,
        height=height,
        width=width,
        dim=dim,
        depth=2,
        attention=make,
        positions="learned",
    )

    def discs(count: int) -> Tensor:
        """Images (count, height * width) of a bright disc each."""
        centre = torch.rand(count, 2, 1, 1) * torch.tensor([height, width])[:, None, None]
        place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        distance = (place - centre).square().sum(1).sqrt()
        return ((1 - distance / 5).clamp(0, 0.99) * LEVELS).long().flatten(1)

    text = torch.ones(BATCH, LAYOUT.text_len, dtype=torch.long)
    _train(model, lambda: model.loss(text, discs(BATCH)), steps)
    image = discs(1)
    with torch.no_grad():
        weights = model.eval().attention_maps(text[:1], image)[-1][0]
    return Drawn(weights, steps, LAYOUT, image.view(height, width))


def model_maps(folder: Path, text: bytes) -> tuple[bytes, list[Tensor]]:
    """The attention maps of every layer of a saved model of bytes.

    Args:
        folder: written by `save` of a LanguageModel or MultiStreamTransformer.
        text: input; its first bytes are used.

    Returns:
        The bytes used, and a map (h, n, n) per layer.

    Raises:
        ValueError: the model is of another class or has fewer than 256 tokens, or the text is empty.
    """
    classes = {cls.__name__: cls for cls in (LanguageModel, MultiStreamTransformer)}
    config = read_model(folder).config
    name: Any = config.get("class") if isinstance(config, dict) else None
    check_choice("class of the model", name, classes)
    model: Any = classes[name].load(folder).eval()
    if model.num_tokens < 256:
        raise ValueError(f"model must have at least 256 tokens, one per byte, got {model.num_tokens}")
    most = getattr(model, "max_seq_len", None) or MOST_BYTES
    used = text[: min(MOST_BYTES, most)]
    if not used:
        raise ValueError("text must hold at least one byte, got an empty file")
    with torch.no_grad():
        return used, [weights[0] for weights in model.attention_maps(as_tokens(used)[None])]


def _train(model: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
