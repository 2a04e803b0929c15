"""Diversity of streams in query tiles, recomputed in backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.talking_heads.head_mixing import in_buffer, mix_backward
from attention_zoo.ops.talking_heads.tiled import Maps, scores_backward, softmax_backward, softmax_maps


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
    maps = _maps(inputs)
    total = maps.zeros()
    first, second = maps.buffers(2)
    for rows in maps.rows():
        for tile in rows.tiles():
            _, weights = softmax_maps(tile, inputs.pre_softmax, first, second, first if inputs.pre_softmax else second)
            found = _divergence(weights, inputs.streams)
            total += found.sum() if inputs.mask is None else (found * inputs.mask[rows.index, tile.queries]).sum()
    return [total]


def _backward(inputs: DiversityInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    maps, mask = _maps(inputs), inputs.mask
    grad_q, grad_k = (maps.zeros(*t.shape) for t in (inputs.q, inputs.k))
    grad_mix = [maps.zeros(*part.shape) for part in inputs.pre_softmax]
    first, spare, third, fourth = maps.buffers(4)
    for rows in maps.rows():
        for tile in rows.tiles():
            scores, weights = softmax_maps(tile, inputs.pre_softmax, first, spare, third)
            grad_weights = in_buffer(fourth, *weights.shape)
            _divergence_backward(weights, inputs.streams, grad_weights)
            valid = 1 if mask is None else mask[rows.index, tile.queries, None]
            grad_weights *= gradients[0] * valid
            softmax_backward(grad_weights, weights, grad_weights)
            grad_scores, parts = mix_backward(scores, inputs.pre_softmax, grad_weights, spare)
            scores_backward(rows, tile, grad_scores, grad_q, grad_k)
            for total, part in zip(grad_mix, parts, strict=True):
                total += part
    return [grad_q, grad_k, *grad_mix]


def _maps(inputs: DiversityInputs) -> Maps:
    pre = inputs.pre_softmax
    heads = max(inputs.q.shape[1], pre[0].shape[0] if len(pre) == 1 else 0)
    return Maps(inputs.q, inputs.k, inputs.mask, inputs.causal, inputs.scale, heads=heads)


def _fake(inputs: DiversityInputs) -> list[Tensor]:
    return [inputs.q.new_empty((), dtype=at_least_float32(inputs.q).dtype)]


def _divergence(weights: Tensor, streams: int) -> Tensor:
    """Jensen-Shannon divergences of all pairs of maps (s h, r, i, j) of different streams, summed: (r, i)."""
    entropy = _entropy(weights)  # (s h, r, i)
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
