"""Measurements of the gallery: receptive fields by gradients, and attention maps on a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention_zoo._checks import check_features
from attention_zoo.cli._targets import Make, accepted, layout_for, reads_context
from attention_zoo.models import LanguageModel
from attention_zoo.ops import TextImageLayout
from attention_zoo.testing.subject import seeded
from attention_zoo.training import as_tokens, random_batch

TOKENS = 40  # tokens of the receptive field of a layer without image layout
DRAWS = 4  # random inputs over which a receptive field is averaged
HEADS = 4
BATCH = 16  # sequences per training step
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
    """Constructor arguments of a layer: the layout of an image layer, and few heads if their size can be chosen."""
    sizes = accepted(make, layout=layout, heads=HEADS, dim_head=dim // HEADS)
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
    queries = range(length) if layout is None else _some_tokens(layout)
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


def _some_tokens(layout: TextImageLayout) -> list[int]:
    """The last text token, and image tokens in the middle, at an edge and at the end."""
    pixels = [(layout.height // 2, layout.width // 2), (layout.height - 2, 0), (layout.height - 1, layout.width - 1)]
    return [layout.text_len - 1, *(layout.text_len + row * layout.width + column for row, column in pixels)]


def sentence_map(make: Make, sentence: bytes, *, dim: int, steps: int, text: bytes) -> tuple[Tensor, int] | None:
    """The attention map of the last layer of a small language model, or of a layer with random weights if it needs a
    context.

    Args:
        make: makes the layer from `dim` and keyword arguments.
        sentence: input of the model, one token per byte.
        dim: number of features.
        steps: training steps on `text`; 0 for random weights.
        text: training text.

    Returns:
        The map (h, n, n) and the number of training steps of the model; None for a layer without `attention_map` or
        with several streams.
    """
    options = small_sizes(make, dim, layout_for(len(sentence)))
    tokens = torch.tensor([list(sentence)])
    with seeded(0):
        block: Any = make(dim, **options)
        if not callable(getattr(block, "attention_map", None)) or getattr(block, "streams", 1) > 1:
            return None
        if reads_context(block):  # the sentence is its own context
            embedded = torch.randn(256, dim)[tokens]
            return block.attention_map(embedded, embedded)[0].detach(), 0
        model = LanguageModel(num_tokens=256, dim=dim, depth=2, attention=partial(make, **options))
        _train(model, text, len(sentence), steps)
    last: Any = [sublayer for sublayer in model.stack.sublayers() if not sublayer.tokenwise][-1].block
    inputs: list[Tensor] = []
    with torch.no_grad(), last.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        model.eval()(tokens)
        return last.attention_map(inputs[0])[0], steps


def _train(model: LanguageModel, text: bytes, length: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = as_tokens(text)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(random_batch(tokens, BATCH, length)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
