"""Who sees whom, measured: gradients of a block's outputs to its inputs, and its attention map on a real sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_features
from attention_zoo.models import LanguageModel
from attention_zoo.ops.sparse.image_layout import TextImageLayout
from attention_zoo.training import as_tokens, random_batch

TOKENS = 40  # of the receptive field of a block without images
DRAWS = 4  # random inputs that a receptive field is the mean of
HEADS = 4  # of a block whose heads have a size
BATCH = 16  # pieces of text in a step
LAYOUT = TextImageLayout(text_len=8, height=9, width=11)


@dataclass(frozen=True)
class Field:
    """How strongly outputs depend on inputs.

    Attributes:
        strength: (i, j), the mean 2-norm of the gradient of output i, along a random direction, to input j; its largest
            entry is 1.
        layout: text and image, for a block that knows them; then i counts the `queries`, otherwise all tokens.
        queries: the tokens whose outputs were taken.
        of_context: the inputs are those of another sequence.
    """

    strength: Tensor
    queries: Sequence[int]
    layout: TextImageLayout | None = None
    of_context: bool = False


def receptive_field(block: nn.Module, dim: int, *, seed: int = 0) -> Field:
    """Measure whom each token of a block sees, over random inputs.

    Args:
        block: a block of the contract for features of size `dim`.
        seed: of the inputs.
    """
    layout = getattr(block, "layout", None)
    length = layout.length if layout is not None else TOKENS
    queries = _few_pixels(layout) if layout is not None else range(length)
    reads_context = "context" in inspect.signature(block.forward).parameters
    streams = getattr(block, "streams", 1)
    generator = torch.Generator().manual_seed(seed)
    shape = (DRAWS, length, dim) if streams == 1 else (DRAWS, streams, length, dim)
    x = torch.randn(shape, generator=generator).requires_grad_()
    others: dict[str, Tensor] = {}
    if reads_context:
        features = getattr(block, "context_dim", dim)
        others["context"] = torch.randn(DRAWS, TOKENS // 2, features, generator=generator).requires_grad_()
    seen = others.get("context", x)
    out = block(x, **others)
    check_features(out[:, 0] if out.ndim == 4 else out, dim, name="the block's output")
    rows = []
    for query in queries:
        direction = torch.randn(*out.shape[:-2], dim, generator=generator)
        (gradient,) = torch.autograd.grad((out[..., query, :] * direction).sum(), seen, retain_graph=True)
        norms: Tensor = gradient.norm(dim=-1)
        rows.append(norms.flatten(0, -2).mean(0))
    strength = torch.stack(rows)
    return Field(strength / strength.max().clamp(min=1e-30), list(queries), layout, reads_context)


def _few_pixels(layout: TextImageLayout) -> list[int]:
    """The last word, and pixels in the middle, at an edge, and last."""
    places = [(layout.height // 2, layout.width // 2), (layout.height - 2, 0), (layout.height - 1, layout.width - 1)]
    return [layout.text_len - 1, *(layout.text_len + row * layout.width + column for row, column in places)]


def sentence_map(
    make: Callable[..., nn.Module], sentence: bytes, *, dim: int, steps: int, text: bytes
) -> tuple[Tensor, int] | None:
    """The attention map of the last layer of a small language model on a sentence, or of a fresh block without a model.

    Args:
        make: makes the block, from dim and whatever else it takes.
        sentence: what is read, a byte a token.
        dim: features.
        steps: of training on `text` first; 0 shows a fresh model.
        text: what it learns from.

    Returns:
        (h, n, n), and for how many steps the model was trained; None for a block without a map.
    """
    takes = inspect.signature(make).parameters
    options: dict[str, Any] = {"layout": layout_around(len(sentence))} if "layout" in takes else {}
    if {"heads", "dim_head"} <= set(takes):
        options |= {"heads": HEADS, "dim_head": dim // HEADS}
    tokens = torch.tensor([list(sentence)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block: Any = make(dim, **options)
        if not callable(getattr(block, "attention_map", None)) or getattr(block, "streams", 1) > 1:
            return None
        if "context" in inspect.signature(block.forward).parameters:  # it reads another sequence: here the same one
            embedded = torch.randn(256, dim)[tokens]
            found: Tensor = block.attention_map(embedded, embedded)[0].detach()
            return found, 0
        model = LanguageModel(num_tokens=256, dim=dim, depth=2, attention=partial(make, **options))
        _train(model, text, len(sentence), steps)
    last = [sub for sub in model.stack.sublayers() if not sub.tokenwise][-1]
    taken: list[Tensor] = []
    hook = last.block.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    with torch.no_grad():
        model.eval()(tokens)
        hook.remove()
        weights: Tensor = last.block.attention_map(taken[0])[0]
    return weights, steps


def _train(model: LanguageModel, text: bytes, length: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = as_tokens(text)
    for _ in range(steps):
        loss = model.loss(random_batch(seen, BATCH, length))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def layout_around(length: int) -> TextImageLayout:
    """A few words, and an image that takes the rest of `length` tokens."""
    width = max(1, round((0.75 * length) ** 0.5))
    height = max(1, int(0.75 * length) // width)
    return TextImageLayout(length - height * width, height, width)
