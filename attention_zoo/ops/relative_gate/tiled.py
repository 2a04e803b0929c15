"""Attention under relative gates in blocks of queries, its backward written by hand.

A block's scores are held at a time and computed again in backward. Custom ops, so that torch.compile sees no loop over
the sequence.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import no_autocast
from attention_zoo.ops.relative_gate.tile import QUERY_BLOCK, GatedKeys, Gradients, QueryBlock, in_halves, in_pairs


@torch.library.custom_op("attention_zoo::relative_gate_attention", mutates_args=())
def relative_gate_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    phase: Tensor,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    """The outputs (b, h, i, e_v).

    Args:
        q: (b, h, i, e), scaled, at the end of the keys; k, v: (b, h, j, e), (b, h, j, e_v). All at least float32.
        log, phase: (b, h, j, e / 2) float64, of the gates multiplied up along the sequence.
        mask: (b, j) bool.
        softmax: False for the raw scores as weights.
        dropout, seed: probability with which a weight is dropped, and which ones.
    """
    out = v.new_empty(*q.shape[:3], v.shape[3])
    q, keys = in_halves(q), GatedKeys.of(k, log, phase)
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = QueryBlock.of(q, keys, start)
        weights = weigh(block.scores(), _seen_keys(mask, block), softmax)
        if dropout:
            weights = weights * _kept(weights, dropout, seed, start)
        out[:, :, block.rows] = weights @ v[:, :, : block.stop]
    return out


@torch.library.custom_op("attention_zoo::relative_gate_attention_backward", mutates_args=())
def relative_gate_blocks_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    phase: Tensor,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log and phase."""
    q, keys = in_halves(q), GatedKeys.of(k, log, phase)
    grads = Gradients(*(tensor.new_zeros(tensor.shape) for tensor in (q, k, v, log, phase)))
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = QueryBlock.of(q, keys, start)
        weights = weigh(block.scores(), _seen_keys(mask, block), softmax)
        here, values = grad[:, :, block.rows], v[:, :, : block.stop]
        to_weights = here @ values.transpose(-1, -2)
        used = weights
        if dropout:
            kept = _kept(weights, dropout, seed, start)
            used, to_weights = weights * kept, to_weights * kept
        grads.v[:, :, : block.stop] += used.transpose(-1, -2) @ here
        if softmax:
            to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
        else:
            seen = _visible(to_weights, _seen_keys(mask, block))
            to_scores = to_weights if seen is None else to_weights.masked_fill(~seen, 0.0)
        block.add_gradients(to_scores, grads)
    return in_pairs(grads.q), in_pairs(grads.k), grads.v, grads.log, grads.phase


def relative_gate_scores(q: Tensor, k: Tensor, log: Tensor, phase: Tensor) -> Tensor:
    """All scores (b, h, i, j), 0 for the future; arguments as `relative_gate_blocks` has them."""
    q, keys, rows = in_halves(q), GatedKeys.of(k, log, phase), []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        scores = QueryBlock.of(q, keys, start).scores()
        rows.append(F.pad(scores, (0, k.shape[2] - scores.shape[-1])))
    return torch.cat(rows, dim=2)


def weigh(scores: Tensor, mask: Tensor | None, softmax: bool) -> Tensor:
    """The weights of causal queries at the end of the keys for their scores; mask (b, j)."""
    seen = _visible(scores, mask)
    weights = scores
    if softmax:
        hidden = scores if seen is None else scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = hidden.softmax(-1)
    return weights if seen is None else weights.masked_fill(~seen, 0.0)


def _visible(scores: Tensor, mask: Tensor | None) -> Tensor | None:
    return visible(*scores.shape[-2:], mask=mask, causal=True, device=scores.device)


def _seen_keys(mask: Tensor | None, block: QueryBlock) -> Tensor | None:
    return None if mask is None else mask[:, : block.stop]


def _kept(weights: Tensor, dropout: float, seed: Tensor, start: int) -> Tensor:
    """What dropout multiplies the weights of one block with, the same in forward and backward."""
    generator = torch.Generator(weights.device).manual_seed((int(seed) + start) % 2**63)
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout
    return kept.to(weights.dtype) / (1 - dropout) if dropout < 1 else kept.to(weights.dtype)


@relative_gate_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    phase: Tensor,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


@relative_gate_blocks_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    phase: Tensor,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_q, to_k, to_v, to_log, to_phase = (tensor.new_empty(tensor.shape) for tensor in (q, k, v, log, phase))
    return to_q, to_k, to_v, to_log, to_phase


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.softmax, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    with no_autocast(grad):
        grads = relative_gate_blocks_backward(grad, *tensors, ctx.softmax, ctx.dropout, seed)
    return *grads, None, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "attention under relative gates has no second derivative on its fast path: "
        "compute it inside `with attention_zoo.reference():`"
    )


relative_gate_blocks.register_autograd(_backward, setup_context=_save)
relative_gate_blocks_backward.register_autograd(_refuse)
