"""Talking heads by blocks of queries, computed again in backward: no tensor of size C n^2 is ever held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.talking_heads.head_mixing import mix_backward, mix_into, whole_mix
from attention_zoo.ops.tiling import slice_mask

QUERY_BLOCK = 64  # queries whose maps are held at a time


# The loop over blocks is an op of its own, so that torch.compile does not unroll it anew for every length.
@torch.library.custom_op("attention_zoo::talking_heads", mutates_args=())
def talking_heads_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: list[Tensor],
    post_softmax: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    wide_q, wide_k, wide_v = at_least_float32(q) * scale, at_least_float32(k), at_least_float32(v)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=wide_v.dtype, device=v.device)
    rooms = Rooms(2, q, k)
    for row, block in query_blocks(q, k, mask, causal):
        first, second = rooms.views(block)
        keys, values = wide_k[row, :, : block.keys], wide_v[row, :, : block.keys]
        torch.bmm(wide_q[row, :, block.rows], keys.transpose(1, 2), out=first)
        scores = mix_into(first, whole_mix(pre_softmax), second)
        weights = softmax_into(scores, block, first if scores is second else second)
        if dropout:
            weights *= kept_weights(weights, dropout, _generator(seed, row, block, q.device))
        mixed = mix_into(weights, whole_mix(post_softmax), second if weights is first else first)
        out[row, :, block.rows] = mixed @ values
    return out.to(v.dtype)


@talking_heads_by_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: list[Tensor],
    post_softmax: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("attention_zoo::talking_heads_backward", mutates_args=())
def _backward_by_blocks(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: list[Tensor],
    post_softmax: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> list[Tensor]:
    """The gradients to q, k, v and the parts of the mixes, each block computed again."""
    wide_q, wide_k, wide_v = at_least_float32(q) * scale, at_least_float32(k), at_least_float32(v)
    to_q, to_k, to_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (wide_q, wide_k, wide_v))
    to_parts = [
        torch.zeros(part.shape, dtype=wide_q.dtype, device=part.device) for part in (*pre_softmax, *post_softmax)
    ]
    rooms = Rooms(4, q, k)
    for row, block in query_blocks(q, k, mask, causal):
        scores, weights, spare, to_maps = rooms.views(block)
        queries, g = wide_q[row, :, block.rows], at_least_float32(gradient[row, :, block.rows])
        keys, values = wide_k[row, :, : block.keys], wide_v[row, :, : block.keys]
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        before = mix_into(scores, whole_mix(pre_softmax), spare)
        softmax_into(before.clone() if before is scores else before, block, weights)
        kept = kept_weights(weights, dropout, _generator(seed, row, block, q.device)) if dropout else None
        dropped = weights if kept is None else weights * kept
        mixed = mix_into(dropped, whole_mix(post_softmax), spare)

        to_v[row, :, : block.keys] += mixed.transpose(1, 2) @ g
        torch.bmm(g, values.transpose(1, 2), out=to_maps)
        to_weights, post_parts = mix_backward(dropped, whole_mix(post_softmax), to_maps, spare)
        if kept is not None:
            to_weights = to_weights * kept
        softmax_backward(to_weights, weights, -1, weights.dtype, grad_input=to_maps)
        to_scores, pre_parts = mix_backward(scores, whole_mix(pre_softmax), to_maps, spare)
        to_q[row, :, block.rows] = (to_scores @ keys) * scale
        to_k[row, :, : block.keys] += to_scores.transpose(1, 2) @ queries
        for total, part in zip(to_parts, (*pre_parts, *post_parts), strict=True):
            total += part
    return [
        part.to(t.dtype)
        for part, t in zip((to_q, to_k, to_v, *to_parts), (q, k, v, *pre_softmax, *post_softmax), strict=True)
    ]


@_backward_by_blocks.register_fake
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: list[Tensor],
    post_softmax: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, *pre_softmax, *post_softmax)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, pre_softmax, post_softmax, mask, causal, scale, dropout, seed = inputs
    ctx.save_for_backward(q, k, v, mask, seed, *pre_softmax, *post_softmax)
    ctx.pre = len(pre_softmax)
    ctx.settings = (causal, scale, dropout)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    q, k, v, mask, seed, *parts = ctx.saved_tensors
    with no_autocast(gradient):
        found = _backward_by_blocks(gradient, q, k, v, parts[: ctx.pre], parts[ctx.pre :], mask, *ctx.settings, seed)
    to_pre, to_post = found[3 : 3 + ctx.pre], found[3 + ctx.pre :]
    return *found[:3], to_pre, to_post, None, None, None, None, None


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "talking heads have no second derivative on their fast path: compute it inside "
        "`with attention_zoo.reference():`"
    )


talking_heads_by_blocks.register_autograd(_backward, setup_context=_save)
_backward_by_blocks.register_autograd(_refuse)


class QueryBlock(NamedTuple):
    """Some queries of one batch row, the keys that they may see, and what hides some of those.

    rows: the queries; keys: how many keys; hidden: (1 or C, i, j) bool, or None; diagonal: whether the last keys form
    the corner of the causal triangle, which is then all that is hidden.
    """

    rows: slice
    keys: int
    hidden: Tensor | None
    diagonal: bool


def query_blocks(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Iterator[tuple[int, QueryBlock]]:
    i, j = q.shape[2], k.shape[2]
    diagonal = causal and mask is None and j >= i
    for row in range(q.shape[0]):
        own = mask if mask is None or mask.shape[0] == 1 else mask[row : row + 1]
        for start in range(0, i, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, i)
            keys = max(j - i + stop, 0) if causal else j  # a causal block ends at its own last key
            hidden = None
            if not diagonal:
                part = slice_mask(own, start, stop, keys)
                seen = visible(stop - start, keys, mask=part, causal=causal, device=q.device)
                hidden = None if seen is None else ~seen[0]
            yield row, QueryBlock(slice(start, stop), keys, hidden, diagonal)


class Rooms:
    """Storage for the maps of one block, used again for every block: fresh pages cost more than the arithmetic."""

    def __init__(self, count: int, q: Tensor, k: Tensor) -> None:
        self.heads = q.shape[1]
        size = self.heads * min(QUERY_BLOCK, q.shape[2]) * k.shape[2]
        dtype = at_least_float32(q[:0]).dtype
        self.storage = [torch.empty(size, dtype=dtype, device=q.device) for _ in range(count)]

    def views(self, block: QueryBlock) -> list[Tensor]:
        """The rooms as maps (C, i, j)."""
        shape = (self.heads, block.rows.stop - block.rows.start, block.keys)
        return [room[: math.prod(shape)].view(shape) for room in self.storage]


def softmax_into(scores: Tensor, block: QueryBlock, room: Tensor) -> Tensor:
    """The softmax over the keys that are not hidden, written to `room`; the scores are overwritten."""
    if block.diagonal:
        i = scores.shape[1]
        future = torch.ones(i, i, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., scores.shape[2] - i :].masked_fill_(future, -math.inf)
    elif block.hidden is not None:
        scores.masked_fill_(block.hidden, torch.finfo(scores.dtype).min)
    torch.softmax(scores, -1, out=room)
    return room if block.hidden is None else room.masked_fill_(block.hidden, 0.0)


def softmax_backward(*args: Any, grad_input: Tensor) -> None:
    torch.ops.aten._softmax_backward_data.out(*args, grad_input=grad_input)


def kept_weights(weights: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """What each weight is multiplied by: 0 where it is dropped, and more than 1 where it stays."""
    drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (drawn >= dropout).to(weights.dtype) / (1 - dropout)


def _generator(seed: Tensor, row: int, block: QueryBlock, device: torch.device) -> torch.Generator:
    """The random numbers of one block, the same in forward and backward."""
    return torch.Generator(device).manual_seed((int(seed) + 1_000_003 * row + block.rows.start) % 2**63)
