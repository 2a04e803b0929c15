"""Softmax attention under a learned bias per distance, in blocks of queries, its backward written by hand.

The scores of one block are held at a time and computed again in backward; the bias's gradient is summed along the
diagonals of each block, per distance. Custom ops, so that torch.compile sees no loop over the sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast

QUERY_BLOCK = 64  # queries whose scores are held at a time


class Block(NamedTuple):
    """The queries start ... stop - 1, which see at most the first `keys` keys."""

    start: int
    stop: int
    keys: int


def blocks(queries: int, keys: int, causal: bool) -> list[Block]:
    """Blocks of queries, those at the end of the keys last; a causal one ends at its own last key."""
    found = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        found.append(Block(start, stop, max(keys - queries + stop, 0) if causal else keys))
    return found


@torch.library.custom_op("attention_zoo::distance_biased_attention", mutates_args=())
def distance_biased_attention(
    q: Tensor, k: Tensor, v: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """softmax(scale * q k^T + bias) v.

    Args:
        q, k, v: (b, h, i, e), (b, h, j, e), (b, h, j, e_v).
        values: (h, i + j - 1) as in `DistanceBias`.
        mask: (b, 1, 1, j), or anything with four axes that broadcasts to (b, h, i, j); True = visible.
        causal: hide the keys after a query.
        scale: of the scores.

    Returns:
        (b, h, i, e_v) in the dtype of v.
    """
    wide = (at_least_float32(q), at_least_float32(k), at_least_float32(v))
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    for block in blocks(q.shape[2], k.shape[2], causal):
        weights = _weights(wide[0], wide[1], values, mask, causal, scale, block)
        out[:, :, block.start : block.stop] = weights @ wide[2][:, :, : block.keys]
    return out


@torch.library.custom_op("attention_zoo::distance_biased_attention_backward", mutates_args=())
def distance_biased_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and values, for the gradient (b, h, i, e_v) of the output."""
    dtypes = (q.dtype, k.dtype, v.dtype, values.dtype)
    grad, q, k, v = (at_least_float32(tensor) for tensor in (grad, q, k, v))
    to_q, to_k, to_v = (q.new_zeros(tensor.shape) for tensor in (q, k, v))
    to_values = values.new_zeros(values.shape, dtype=q.dtype)
    queries = q.shape[2]
    for block in blocks(queries, k.shape[2], causal):
        start, stop, keys = block
        if not keys:
            continue
        weights = _weights(q, k, values, mask, causal, scale, block)
        here = grad[:, :, start:stop]
        _add_product(to_v[:, :, :keys], weights, here)
        scores = here @ v[:, :, :keys].transpose(-1, -2)  # gradient of the weights; below, of the scores
        scores.mul_(weights)
        scores.sub_(weights.mul_(scores.sum(-1, keepdim=True)))
        to_values[:, queries - stop : queries - start - 1 + keys] += _sum_by_distance(scores.sum(0))
        scores.mul_(scale)
        to_q[:, :, start:stop] = scores @ k[:, :, :keys]
        _add_product(to_k[:, :, :keys], scores, q[:, :, start:stop])
    return to_q.to(dtypes[0]), to_k.to(dtypes[1]), to_v.to(dtypes[2]), to_values.to(dtypes[3])


def _weights(
    q: Tensor, k: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float, block: Block
) -> Tensor:
    """The weights (b, h, stop - start, keys) of one block, 0 where nothing is visible."""
    start, stop, keys = block
    b, h, queries, e = q.shape
    rows = values[:, queries - stop : queries - start - 1 + keys].to(q.dtype).unfold(-1, keys, 1).flip(-2)
    bias = rows.expand(b, -1, -1, -1).reshape(b * h, stop - start, keys)
    left = q[:, :, start:stop].reshape(b * h, stop - start, e)
    right = k[:, :, :keys].reshape(b * h, keys, e)
    scores = torch.baddbmm(bias, left, right.transpose(1, 2), alpha=scale).view(b, h, stop - start, keys)
    if mask is None and causal and k.shape[2] >= queries:  # every query sees a key, and only the last ones are hidden
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        scores[..., keys - (stop - start) :].masked_fill_(future, -torch.inf)
        return scores.softmax(-1)
    seen = visible(stop - start, keys, mask=_rows(mask, block), causal=causal, device=q.device)
    if seen is None:
        return scores.softmax(-1)
    weights = scores.masked_fill_(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill_(~seen, 0.0)


def _rows(mask: Tensor | None, block: Block) -> Tensor | None:
    if mask is None:
        return None
    rows = mask if mask.shape[-2] == 1 else mask[..., block.start : block.stop, :]
    return rows if rows.shape[-1] == 1 else rows[..., : block.keys]


def _add_product(total: Tensor, pairs: Tensor, rows: Tensor) -> None:
    """total += pairs^T rows, in place: (b, h, j, e), (b, h, i, j), (b, h, i, e)."""
    b, h = pairs.shape[:2]
    folded = total.as_strided((b * h, *total.shape[2:]), total.stride()[1:], total.storage_offset())
    folded.baddbmm_(pairs.flatten(0, 1).transpose(1, 2), rows.flatten(0, 1))


def _sum_by_distance(pairs: Tensor) -> Tensor:
    """(h, i, j) summed over all pairs of one distance: (h, i + j - 1), in the order of `DistanceBias`."""
    h, i, j = pairs.shape
    width = i + j - 1
    skewed = pairs.new_zeros(h, i, width)
    # row r starts i - 1 - r to the right, so that the pairs of a distance stand in one column
    skewed.as_strided((h, i, j), (i * width, max(width - 1, 1), 1), i - 1).copy_(pairs)
    return skewed.sum(1)


@distance_biased_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[-1])


@distance_biased_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), values.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, values, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, values, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with no_autocast(grad):
        grads = distance_biased_attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "attention under a learned bias has no second derivative on its fast path: "
        "compute it inside `with attention_zoo.reference():`"
    )


distance_biased_attention.register_autograd(_backward, setup_context=_save)
distance_biased_attention_backward.register_autograd(_refuse)
