"""Softmax attention under a learned bias per distance, in query tiles, with an explicit backward.

The scores of one tile are held at a time and recomputed in backward, where the gradient of the bias is summed along the
diagonals of each tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.softmax.bias import DistanceBias
from attention_zoo.ops.softmax.tiled import repeat_heads
from attention_zoo.ops.tiling import QUERY_TILE, QueryTile, query_tiles, tile_mask


class Inputs(NamedTuple):
    """Arguments of the operator.

    q, k, v: (b, h, i, e), (b, h, j, e), (b, h, j, e_v).
    values: (h, i + j - 1), as in `DistanceBias`.
    mask: (b, j), or four axes that broadcast to (b, h, i, j); True = allowed.
    causal: causal masking, aligned bottom-right.
    scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    values: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


def distance_biased_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, bias: DistanceBias, scale: float
) -> Tensor:
    """Arguments as in `softmax_attention`."""
    heads = q.shape[1]
    return _attend(Inputs(q, repeat_heads(k, heads), repeat_heads(v, heads), bias.values, mask, causal, scale))[0]


def _forward(given: Inputs) -> list[Tensor]:
    """The output, (b, h, i, e_v), in the dtype of `v`."""
    (out,), given = _fake(given), _widen(given)
    for tile in _tiles(given):
        out[:, :, tile.queries] = _weights(given, tile) @ given.v[:, :, : tile.keys]
    return [out]


def _backward(given: Inputs, _: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of q, k, v and values."""
    given, gradient = _widen(given), at_least_float32(gradients[0])
    to_q, to_k, to_v = (tensor.new_zeros(tensor.shape) for tensor in given[:3])
    to_values = given.values.new_zeros(given.values.shape, dtype=given.q.dtype)
    for tile in _tiles(given):
        if not tile.keys:
            continue
        q, k, v = given.q[:, :, tile.queries], given.k[:, :, : tile.keys], given.v[:, :, : tile.keys]
        weights, to_out = _weights(given, tile), gradient[:, :, tile.queries]
        _add_product(to_v[:, :, : tile.keys], weights, to_out)
        to_scores = to_out @ v.transpose(-1, -2)  # the gradient of the weights until the next two lines
        to_scores.mul_(weights)
        to_scores.sub_(weights.mul_(to_scores.sum(-1, keepdim=True)))
        to_values[:, _distances(given, tile)] += _sum_by_distance(to_scores.sum(0))
        to_scores.mul_(given.scale)
        to_q[:, :, tile.queries] = to_scores @ k
        _add_product(to_k[:, :, : tile.keys], to_scores, q)
    return [to_q, to_k, to_v, to_values]


def _fake(given: Inputs) -> list[Tensor]:
    return [given.v.new_empty(*given.q.shape[:3], given.v.shape[-1])]


_attend = register_operator("distance_biased_attention", Inputs, _forward, _backward, _fake, save_outputs=False)


def _widen(given: Inputs) -> Inputs:
    q, k, v = (at_least_float32(tensor) for tensor in (given.q, given.k, given.v))
    return given._replace(q=q, k=k, v=v)


def _tiles(given: Inputs) -> Iterator[QueryTile]:
    return query_tiles(given.q.shape[2], given.k.shape[2], given.causal, QUERY_TILE)


def _distances(given: Inputs, tile: QueryTile) -> slice:
    """The entries of `values` that a tile uses."""
    queries = given.q.shape[2]
    return slice(queries - tile.stop, queries - tile.start - 1 + tile.keys)


def _weights(given: Inputs, tile: QueryTile) -> Tensor:
    """The weights of one tile, (b, h, stop - start, keys)."""
    q, k, _, values, mask, causal, scale = given
    start, stop, keys = tile
    b, h, queries, e = q.shape
    rows = values[:, _distances(given, tile)].to(q.dtype).unfold(-1, keys, 1).flip(-2)
    bias = rows.expand(b, -1, -1, -1).reshape(b * h, stop - start, keys)
    left = q[:, :, start:stop].reshape(b * h, stop - start, e)
    right = k[:, :, :keys].reshape(b * h, keys, e)
    scores = torch.baddbmm(bias, left, right.transpose(1, 2), alpha=scale).view(b, h, stop - start, keys)
    if mask is None and causal and k.shape[2] >= queries:  # every query has a key, only the last keys are masked
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        scores[..., keys - (stop - start) :].masked_fill_(future, -torch.inf)
        return scores.softmax(-1)
    allowed = tile_mask(tile, mask=mask, causal=causal, device=q.device)
    if allowed is None:
        return scores.softmax(-1)
    # `masked_softmax` in place
    weights = scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill_(~allowed, 0.0)


def _add_product(total: Tensor, pairs: Tensor, rows: Tensor) -> None:
    """total += pairs^T rows in place, with shapes (b, h, j, e), (b, h, i, j), (b, h, i, e)."""
    b, h = pairs.shape[:2]
    folded = total.as_strided((b * h, *total.shape[2:]), total.stride()[1:], total.storage_offset())
    folded.baddbmm_(pairs.flatten(0, 1).transpose(1, 2), rows.flatten(0, 1))


def _sum_by_distance(pairs: Tensor) -> Tensor:
    """Sum (h, i, j) over all pairs of a distance: (h, i + j - 1), in the order of `DistanceBias`."""
    h, i, j = pairs.shape
    width = i + j - 1
    skewed = pairs.new_zeros(h, i, width)
    # row r is shifted right by i - 1 - r, which puts the pairs of a distance into one column
    skewed.as_strided((h, i, j), (i * width, max(width - 1, 1), 1), i - 1).copy_(pairs)
    return skewed.sum(1)
