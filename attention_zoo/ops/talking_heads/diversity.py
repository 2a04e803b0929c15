"""How unlike the attention of different streams is: a loss that is least where their heads look elsewhere.

Paper: Multi-Stream Transformers, https://arxiv.org/abs/2107.10342
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import check_mask
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.talking_heads import talking_heads_weights
from attention_zoo.ops.talking_heads.head_mixing import HeadMix, check_mix, mix_backward, mix_into, parts_of, whole_mix
from attention_zoo.ops.talking_heads.tiled import Rooms, query_blocks, softmax_backward, softmax_into


def stream_diversity_loss(
    q: Tensor,
    k: Tensor,
    pre_softmax: HeadMix,
    *,
    streams: int,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Minus the mean Jensen-Shannon divergence between the softmax maps of different streams.

    -JSD(A1, A2) = (H(A1) + H(A2)) / 2 - H((A1 + A2) / 2), H the entropy in nats, averaged over pairs of streams, pairs
    of a head of either, real queries and rows.

    Args:
        q, k: (b, s h, n, e), the streams' heads in a row.
        pre_softmax: the mix before the softmax.
        streams: streams s.
        mask: (b, n) bool, True = a real token: as a key it is seen, as a query it counts.
        causal, scale: as in `talking_heads_attention`.
        impl: "auto", "reference" (all maps at once, twice differentiable) or "tiled" (blocks of queries, computed
            again in backward).

    Returns:
        A scalar in -ln 2 ... 0; 0 for one stream.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message names the argument.
    """
    impl = choose(impl, ("tiled",))
    b, heads, n, e = q.shape
    if streams < 1 or heads % streams:
        raise ValueError(f"streams must divide the heads of q, got {streams=} and {heads} heads")
    check_mask(mask, b, heads, n, k.shape[2])
    check_mix("pre_softmax", pre_softmax, heads)
    if streams == 1:
        return torch.zeros((), dtype=torch.float32, device=q.device)
    queries = b * n if mask is None else mask.sum().clamp(min=1)
    pairs = (heads // streams) ** 2 * streams * (streams - 1) / 2
    with no_autocast(q):
        if impl == "reference":
            weights = talking_heads_weights(q, k, pre_softmax, mask=mask, causal=causal, scale=scale)
            found = _divergence(weights, streams)
            total = found.sum() if mask is None else found.masked_fill(~mask, 0.0).sum()
        else:
            scale = e**-0.5 if scale is None else scale
            total = _by_blocks(q, k, parts_of(pre_softmax), mask, causal, scale, streams)
        return -total / pairs / queries


def _divergence(weights: Tensor, streams: int) -> Tensor:
    """The divergence of all pairs of maps (..., s h, i, j) of different streams, summed: (..., i)."""
    entropy = _entropy(weights)  # (..., s h, i)
    total = torch.zeros_like(entropy[..., 0, :])
    for head, others in _pairs(weights.shape[-3], streams):
        middle = _entropy((weights[..., head, None, :, :] + weights[..., others, :, :]) / 2)
        total = total + (middle - (entropy[..., head, None, :] + entropy[..., others, :]) / 2).sum(-2)
    return total


def _pairs(heads: int, streams: int) -> Iterator[tuple[int, slice]]:
    """Each head, with the heads of all later streams."""
    each = heads // streams
    for head in range(heads - each):
        yield head, slice((head // each + 1) * each, heads)


def _entropy(weights: Tensor) -> Tensor:
    """-sum_j p ln p in nats, with 0 ln 0 = 0 and a finite gradient there."""
    return -(weights * _log(weights)).sum(-1)


def _log(weights: Tensor) -> Tensor:
    return weights.clamp(min=1e-30).log()


@torch.library.custom_op("attention_zoo::stream_diversity", mutates_args=())
def _by_blocks(
    q: Tensor, k: Tensor, pre_softmax: list[Tensor], mask: Tensor | None, causal: bool, scale: float, streams: int
) -> Tensor:
    """The summed divergence of the queries that count."""
    wide_q, wide_k = at_least_float32(q) * scale, at_least_float32(k)
    total = wide_q.new_zeros(())
    rooms = Rooms(2, q, k)
    for row, block in query_blocks(q, k, mask, causal):
        first, second = rooms.views(block)
        torch.bmm(wide_q[row, :, block.rows], wide_k[row, :, : block.keys].transpose(1, 2), out=first)
        scores = mix_into(first, whole_mix(pre_softmax), second)
        found = _divergence(softmax_into(scores, block, first if scores is second else second), streams)
        total += found.sum() if mask is None else (found * mask[row, block.rows]).sum()
    return total


@torch.library.custom_op("attention_zoo::stream_diversity_backward", mutates_args=())
def _backward_by_blocks(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    pre_softmax: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    streams: int,
) -> list[Tensor]:
    """The gradients to q, k and the parts of the mix, each block computed again."""
    wide_q, wide_k = at_least_float32(q) * scale, at_least_float32(k)
    to_q, to_k = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (wide_q, wide_k))
    to_parts = [torch.zeros(part.shape, dtype=wide_q.dtype, device=part.device) for part in pre_softmax]
    rooms = Rooms(4, q, k)
    for row, block in query_blocks(q, k, mask, causal):
        scores, weights, spare, to_weights = rooms.views(block)
        queries, keys = wide_q[row, :, block.rows], wide_k[row, :, : block.keys]
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        before = mix_into(scores, whole_mix(pre_softmax), spare)
        softmax_into(before.clone() if before is scores else before, block, weights)
        _divergence_backward(weights, streams, to_weights)
        to_weights *= gradient if mask is None else gradient * mask[row, block.rows, None]
        softmax_backward(to_weights, weights, -1, weights.dtype, grad_input=to_weights)
        to_scores, parts = mix_backward(scores, whole_mix(pre_softmax), to_weights, spare)
        to_q[row, :, block.rows] = (to_scores @ keys) * scale
        to_k[row, :, : block.keys] += to_scores.transpose(1, 2) @ queries
        for total, part in zip(to_parts, parts, strict=True):
            total += part
    return [part.to(t.dtype) for part, t in zip((to_q, to_k, *to_parts), (q, k, *pre_softmax), strict=True)]


def _divergence_backward(weights: Tensor, streams: int, room: Tensor) -> None:
    """The gradient of `_divergence`, (ln a - ln((a + b) / 2)) / 2 for map a of each pair, written to `room`."""
    log = _log(weights)
    room.zero_()
    for head, others in _pairs(weights.shape[0], streams):
        middle = _log((weights[head, None] + weights[others]) / 2)
        room[others] += (log[others] - middle) / 2
        room[head] += ((log[head, None] - middle) / 2).sum(0)


@_by_blocks.register_fake
def _(
    q: Tensor, k: Tensor, pre_softmax: list[Tensor], mask: Tensor | None, causal: bool, scale: float, streams: int
) -> Tensor:
    return q.new_empty((), dtype=at_least_float32(q).dtype)


@_backward_by_blocks.register_fake
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    pre_softmax: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    streams: int,
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, *pre_softmax)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, pre_softmax, mask, *ctx.settings = inputs
    ctx.save_for_backward(q, k, mask, *pre_softmax)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    q, k, mask, *pre_softmax = ctx.saved_tensors
    with no_autocast(gradient):
        to_q, to_k, *to_parts = _backward_by_blocks(gradient, q, k, pre_softmax, mask, *ctx.settings)
    return to_q, to_k, to_parts, None, None, None, None


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "the diversity loss has no second derivative on its fast path: compute it inside "
        "`with attention_zoo.reference():`"
    )


_by_blocks.register_autograd(_backward, setup_context=_save)
_backward_by_blocks.register_autograd(_refuse)
