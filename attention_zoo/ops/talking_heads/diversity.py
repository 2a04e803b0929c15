"""Diversity of streams in query tiles, recomputed in backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.talking_heads.head_mixing import mix_backward
from attention_zoo.ops.talking_heads.tiled import Workspace, map_tiles, softmax_backward, softmax_maps


class DiversityInputs(NamedTuple):
    """Inputs of the operator: see `stream_diversity_loss`. `pre_softmax`: tensors of the mix."""

    q: Tensor
    k: Tensor
    pre_softmax: list[Tensor]
    mask: Tensor | None
    causal: bool
    scale: float
    streams: int


def _forward(inputs: DiversityInputs) -> list[Tensor]:
    """The divergence, summed over pairs of maps and valid queries."""
    q, k = at_least_float32(inputs.q) * inputs.scale, at_least_float32(inputs.k)
    total = q.new_zeros(())
    workspace = Workspace(2, q, k)
    for tile in map_tiles(q, k, inputs.mask, inputs.causal):
        weights = softmax_maps(tile, q, k, inputs.pre_softmax, *workspace.maps(tile))
        found = _divergence(weights, inputs.streams)
        total += found.sum() if inputs.mask is None else (found * inputs.mask[tile.row, tile.queries]).sum()
    return [total]


def _backward(inputs: DiversityInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    q, k = at_least_float32(inputs.q) * inputs.scale, at_least_float32(inputs.k)
    grad_q, grad_k = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    grad_mix = [q.new_zeros(part.shape) for part in inputs.pre_softmax]
    workspace = Workspace(4, q, k)
    for tile in map_tiles(q, k, inputs.mask, inputs.causal):
        row, queries, keys = tile.row, tile.queries, tile.keys
        scores, spare, weights, grad_weights = workspace.maps(tile)
        softmax_maps(tile, q, k, inputs.pre_softmax, scores, spare, weights)
        _divergence_backward(weights, inputs.streams, grad_weights)
        grad_weights *= gradients[0] if inputs.mask is None else gradients[0] * inputs.mask[row, queries, None]
        softmax_backward(grad_weights, weights, grad_weights)
        grad_scores, parts = mix_backward(scores, inputs.pre_softmax, grad_weights, spare)
        grad_q[row, :, queries] = (grad_scores @ k[row, :, keys]) * inputs.scale
        grad_k[row, :, keys] += grad_scores.transpose(1, 2) @ q[row, :, queries]
        for total, part in zip(grad_mix, parts, strict=True):
            total += part
    return [grad_q, grad_k, *grad_mix]


def _fake(inputs: DiversityInputs) -> list[Tensor]:
    return [inputs.q.new_empty((), dtype=at_least_float32(inputs.q).dtype)]


def _divergence(weights: Tensor, streams: int) -> Tensor:
    """Jensen-Shannon divergences of all pairs of maps (s h, i, j) of different streams, summed: (i,)."""
    entropy = _entropy(weights)  # (s h, i)
    total = torch.zeros_like(entropy[0])
    for head, others in _pairs(len(weights), streams):
        middle = _entropy((weights[head, None] + weights[others]) / 2)
        total += (middle - (entropy[head, None] + entropy[others]) / 2).sum(0)
    return total


def _divergence_backward(weights: Tensor, streams: int, buffer: Tensor) -> None:
    """The gradient of `_divergence`, (ln a - ln((a + b) / 2)) / 2 for map a of each pair, written to `buffer`."""
    log = _log(weights)
    buffer.zero_()
    for head, others in _pairs(len(weights), streams):
        middle = _log((weights[head, None] + weights[others]) / 2)
        buffer[others] += (log[others] - middle) / 2
        buffer[head] += ((log[head, None] - middle) / 2).sum(0)


def _pairs(heads: int, streams: int) -> Iterator[tuple[int, slice]]:
    """Each head with the heads of all later streams."""
    each = heads // streams
    for head in range(heads - each):
        yield head, slice((head // each + 1) * each, heads)


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * _log(weights)).sum(-1)


def _log(weights: Tensor) -> Tensor:
    return weights.clamp(min=1e-30).log()  # finite at 0, where 0 ln 0 = 0


tiled_diversity = register_operator("stream_diversity", DiversityInputs, _forward, _backward, _fake, save_outputs=False)
