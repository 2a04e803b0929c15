"""Talking-heads attention in query tiles, recomputed in backward: memory O(n)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.talking_heads.head_mixing import mix_backward, mix_into
from attention_zoo.ops.tiling import QUERY_TILE, dropout_mask, query_tiles, slice_pairs, tile_mask


class TalkingHeadsInputs(NamedTuple):
    """Inputs of the operator: see `talking_heads_attention`.

    Attributes:
        pre_softmax, post_softmax: tensors of the head mixing: none, one or three.
        bias: finite, broadcasts to (b, h, i, j), added to the mixed scores; or None.
        mask: boolean.
        seed: scalar int64 on the CPU, from `dropout_seed`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pre_softmax: list[Tensor]
    post_softmax: list[Tensor]
    bias: Tensor | None
    mask: Tensor | None
    causal: bool
    scale: float
    dropout: float
    seed: Tensor


def _forward(inputs: TalkingHeadsInputs) -> list[Tensor]:
    q, k, v = at_least_float32(inputs.q) * inputs.scale, at_least_float32(inputs.k), at_least_float32(inputs.v)
    out = v.new_empty(*q.shape[:3], v.shape[3])
    workspace = Workspace(2, q, k)
    for tile in map_tiles(q, k, inputs.mask, inputs.causal, inputs.bias):
        first, second = workspace.maps(tile)
        weights = softmax_maps(tile, q, k, inputs.pre_softmax, first, second)
        if inputs.dropout:
            weights *= _dropout_mask(inputs, tile, weights)
        mixed = mix_into(weights, inputs.post_softmax, second if weights is first else first)
        out[tile.row, :, tile.queries] = mixed @ v[tile.row, :, tile.keys]
    return [out.to(inputs.v.dtype)]


def _backward(inputs: TalkingHeadsInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    q, k, v = at_least_float32(inputs.q) * inputs.scale, at_least_float32(inputs.k), at_least_float32(inputs.v)
    grad_q, grad_k, grad_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    grad_mixes = [q.new_zeros(part.shape) for part in (*inputs.pre_softmax, *inputs.post_softmax)]
    grad_bias = None if inputs.bias is None else q.new_zeros(inputs.bias.shape)
    workspace = Workspace(4, q, k)
    for tile in map_tiles(q, k, inputs.mask, inputs.causal, inputs.bias):
        row, queries, keys = tile.row, tile.queries, tile.keys
        scores, spare, weights, grad_maps = workspace.maps(tile)
        softmax_maps(tile, q, k, inputs.pre_softmax, scores, spare, weights)
        kept = _dropout_mask(inputs, tile, weights) if inputs.dropout else None
        dropped = weights if kept is None else weights * kept
        mixed = mix_into(dropped, inputs.post_softmax, spare)

        gradient = at_least_float32(gradients[0][row, :, queries])
        grad_v[row, :, keys] += mixed.transpose(1, 2) @ gradient
        torch.bmm(gradient, v[row, :, keys].transpose(1, 2), out=grad_maps)
        grad_weights, grad_post = mix_backward(dropped, inputs.post_softmax, grad_maps, spare)
        if kept is not None:
            grad_weights = grad_weights * kept
        softmax_backward(grad_weights, weights, grad_maps)
        if grad_bias is not None:
            total = _rows_of_bias(grad_bias, row, tile.queries, keys.stop)
            total += grad_maps.sum_to_size(total.shape)
        grad_scores, grad_pre = mix_backward(scores, inputs.pre_softmax, grad_maps, spare)
        grad_q[row, :, queries] = (grad_scores @ k[row, :, keys]) * inputs.scale
        grad_k[row, :, keys] += grad_scores.transpose(1, 2) @ q[row, :, queries]
        for total, part in zip(grad_mixes, (*grad_pre, *grad_post), strict=True):
            total += part
    return [grad_q, grad_k, grad_v, *grad_mixes, *(() if grad_bias is None else (grad_bias,))]


def _fake(inputs: TalkingHeadsInputs) -> list[Tensor]:
    return [inputs.v.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])]


def _dropout_mask(inputs: TalkingHeadsInputs, tile: MapTile, weights: Tensor) -> Tensor:
    return dropout_mask(weights, inputs.dropout, inputs.seed, row=tile.row, start=tile.queries.start)


class MapTile(NamedTuple):
    """The maps (h, i, j) of some queries of one batch row.

    Attributes:
        row: batch row.
        queries: indices of the queries.
        keys: indices of the first keys; the queries attend to no others.
        masked: (1 or h, i, j) bool, True where a key is masked; None if no key is masked, or with `causal`.
        causal: whether exactly the keys after each query are masked. The last query of the tile attends to all keys.
        bias: broadcasts to (h, i, j), or None.
    """

    row: int
    queries: slice
    keys: slice
    masked: Tensor | None
    causal: bool
    bias: Tensor | None


def map_tiles(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, bias: Tensor | None = None) -> Iterator[MapTile]:
    """The tiles of maps of all batch rows."""
    i, j = q.shape[2], k.shape[2]
    only_causal = causal and mask is None and j >= i
    for row in range(q.shape[0]):
        own = mask if mask is None or mask.shape[0] == 1 else mask[row : row + 1]
        for tile in query_tiles(i, j, causal, QUERY_TILE):
            allowed = None if only_causal else tile_mask(tile, mask=own, causal=causal, device=q.device)
            masked = None if allowed is None else ~allowed[0]
            added = None if bias is None else _rows_of_bias(bias, row, tile.queries, tile.keys)
            yield MapTile(row, tile.queries, slice(0, tile.keys), masked, only_causal and i > 1, added)


def _rows_of_bias(bias: Tensor, row: int, queries: slice, keys: int) -> Tensor:
    """The part of a bias that broadcasts to the maps (h, i, j) of a tile, a view."""
    return slice_pairs(bias[row if bias.shape[0] > 1 else 0], queries.start, queries.stop, keys)


class Workspace:
    """Buffers for the maps of one tile, reused by all tiles: allocating new pages costs more than the arithmetic."""

    def __init__(self, count: int, q: Tensor, k: Tensor) -> None:
        self.heads = q.shape[1]
        size = self.heads * min(QUERY_TILE, q.shape[2]) * k.shape[2]
        self.buffers = [q.new_empty(size) for _ in range(count)]

    def maps(self, tile: MapTile) -> list[Tensor]:
        """The buffers as maps (h, i, j) of a tile."""
        shape = (self.heads, tile.queries.stop - tile.queries.start, tile.keys.stop)
        return [buffer[: math.prod(shape)].view(shape) for buffer in self.buffers]


def softmax_maps(
    tile: MapTile,
    q: Tensor,
    k: Tensor,
    pre_softmax: Sequence[Tensor],
    scores: Tensor,
    spare: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """softmax(pre_softmax(q k^T) + bias) of one tile.

    Args:
        tile: the tile.
        q, k: (b, h, i, e), scaled, and (b, h, j, e).
        pre_softmax: tensors of the mix.
        scores: buffer that receives q k^T.
        spare: buffer, overwritten.
        weights: buffer for the result. None: `scores` or `spare`, and the scores are lost.
    """
    torch.bmm(q[tile.row, :, tile.queries], k[tile.row, :, tile.keys].transpose(1, 2), out=scores)
    mixed = mix_into(scores, pre_softmax, spare)
    if weights is None:
        weights = spare if mixed is scores else scores
    elif mixed is scores:
        mixed = scores.clone()
    if tile.bias is not None:
        mixed += tile.bias
    if tile.causal:
        i = mixed.shape[1]
        future = torch.ones(i, i, dtype=torch.bool, device=mixed.device).triu(1)
        mixed[..., mixed.shape[2] - i :].masked_fill_(future, -math.inf)
    elif tile.masked is not None:
        mixed.masked_fill_(tile.masked, torch.finfo(mixed.dtype).min)
    torch.softmax(mixed, -1, out=weights)
    return weights if tile.masked is None else weights.masked_fill_(tile.masked, 0.0)


def softmax_backward(gradient: Tensor, weights: Tensor, buffer: Tensor) -> None:
    """Gradient of the scores, given that of their softmax `weights`, written to `buffer`, which may be `gradient`."""
    torch.ops.aten._softmax_backward_data.out(gradient, weights, -1, weights.dtype, grad_input=buffer)


tiled_talking_heads = register_operator(
    "talking_heads", TalkingHeadsInputs, _forward, _backward, _fake, save_outputs=False
)
