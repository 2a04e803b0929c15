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
from attention_zoo.ops.softmax.bias import DistanceBias, sum_by_distance
from attention_zoo.ops.softmax.tiled import repeat_heads
from attention_zoo.ops.tiling import QUERY_TILE, QueryTile, query_tiles, tile_mask


class DistanceBiasInputs(NamedTuple):
    """Inputs of the operator.

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
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return _operator(DistanceBiasInputs(q, k, v, bias.values, mask, causal, scale))[0]


def _forward(inputs: DistanceBiasInputs) -> list[Tensor]:
    """The output, (b, h, i, e_v), in the dtype of `v`."""
    (out,), inputs = _fake(inputs), _widen(inputs)
    for tile in _tiles(inputs):
        out[:, :, tile.queries] = _weights(inputs, tile) @ inputs.v[:, :, : tile.keys]
    return [out]


def _backward(inputs: DistanceBiasInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of q, k, v and values."""
    inputs, gradient = _widen(inputs), at_least_float32(gradients[0])
    grad_q, grad_k, grad_v = (tensor.new_zeros(tensor.shape) for tensor in inputs[:3])
    grad_values = inputs.values.new_zeros(inputs.values.shape, dtype=inputs.q.dtype)
    for tile in _tiles(inputs):
        if not tile.keys:
            continue
        q, k, v = inputs.q[:, :, tile.queries], inputs.k[:, :, : tile.keys], inputs.v[:, :, : tile.keys]
        weights, grad_out = _weights(inputs, tile), gradient[:, :, tile.queries]
        _add_product(grad_v[:, :, : tile.keys], weights, grad_out)
        grad_scores = grad_out @ v.transpose(-1, -2)  # the gradient of the weights until the next two lines
        grad_scores.mul_(weights)
        grad_scores.sub_(weights.mul_(grad_scores.sum(-1, keepdim=True)))
        grad_values[:, _distances(inputs, tile)] += sum_by_distance(grad_scores.sum(0), grad_values.dtype)
        grad_scores.mul_(inputs.scale)
        grad_q[:, :, tile.queries] = grad_scores @ k
        _add_product(grad_k[:, :, : tile.keys], grad_scores, q)
    return [grad_q, grad_k, grad_v, grad_values]


def _fake(inputs: DistanceBiasInputs) -> list[Tensor]:
    return [inputs.v.new_empty(*inputs.q.shape[:3], inputs.v.shape[-1])]


_operator = register_operator(
    "distance_biased_attention", DistanceBiasInputs, _forward, _backward, _fake, save_outputs=False
)


def _widen(inputs: DistanceBiasInputs) -> DistanceBiasInputs:
    q, k, v = (at_least_float32(tensor) for tensor in (inputs.q, inputs.k, inputs.v))
    return inputs._replace(q=q, k=k, v=v)


def _tiles(inputs: DistanceBiasInputs) -> Iterator[QueryTile]:
    return query_tiles(inputs.q.shape[2], inputs.k.shape[2], inputs.causal, QUERY_TILE)


def _distances(inputs: DistanceBiasInputs, tile: QueryTile) -> slice:
    """The entries of `values` that a tile uses."""
    queries = inputs.q.shape[2]
    return slice(queries - tile.stop, queries - tile.start - 1 + tile.keys)


def _weights(inputs: DistanceBiasInputs, tile: QueryTile) -> Tensor:
    """The weights of one tile, (b, h, stop - start, keys)."""
    q, k, _, values, mask, causal, scale = inputs
    start, stop, keys = tile
    b, h, queries, e = q.shape
    rows = values[:, _distances(inputs, tile)].to(q.dtype).unfold(-1, keys, 1).flip(-2)
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
