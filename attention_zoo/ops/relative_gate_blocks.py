"""Attention under relative gates in blocks of queries, its backward written by hand.

A block's scores are held at a time and computed again in backward. Custom ops, so that torch.compile sees no loop over
the sequence.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import no_autocast

QUERY_BLOCK = 32  # queries whose scores are held at a time; among themselves they cost 32 e / 2 products each


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
    q, keys = _halves(q), _Turned.of(k, log, phase)
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = _Block.of(q, keys, start)
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
    q, keys = _halves(q), _Turned.of(k, log, phase)
    grads = _Gradients(*(tensor.new_zeros(tensor.shape) for tensor in (q, k, v, log, phase)))
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = _Block.of(q, keys, start)
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
    return _pairs(grads.q), _pairs(grads.k), grads.v, grads.log, grads.phase


def relative_gate_scores(q: Tensor, k: Tensor, log: Tensor, phase: Tensor) -> Tensor:
    """All scores (b, h, i, j), 0 for the future; arguments as `relative_gate_blocks` has them."""
    q, keys, rows = _halves(q), _Turned.of(k, log, phase), []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        scores = _Block.of(q, keys, start).scores()
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


def _halves(x: Tensor) -> Tensor:
    """The features (..., e) with the first ones of all pairs before the second ones, so that gates lie along them."""
    return x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)


def _pairs(x: Tensor) -> Tensor:
    """The features as they were before `_halves`."""
    return x.reshape(*x.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2)


def _visible(scores: Tensor, mask: Tensor | None) -> Tensor | None:
    return visible(*scores.shape[-2:], mask=mask, causal=True, device=scores.device)


class _Gradients(NamedTuple):
    """What the blocks of queries add to."""

    q: Tensor
    k: Tensor
    v: Tensor
    log: Tensor
    phase: Tensor


class _Turned(NamedTuple):
    """Keys, their features in halves, and the gates multiplied up.

    log: in float64; cos, sin: of the phase, in the keys' dtype.
    """

    k: Tensor
    log: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, k: Tensor, log: Tensor, phase: Tensor) -> _Turned:
        return cls(_halves(k), log, phase.cos().to(k.dtype), phase.sin().to(k.dtype))

    def part(self, part: slice) -> _Turned:
        """Those of some tokens."""
        return _Turned(*(tensor[:, :, part] for tensor in self))


class _Block(NamedTuple):
    """A block of queries: its rows among the queries, the keys of the same tokens, and those before them.

    No product is divided by: queries and the keys before them meet at the block's first token, from where both sides
    only shrink.
    """

    q: Tensor
    rows: slice
    here: _Turned
    before: _Turned

    @classmethod
    def of(cls, q: Tensor, keys: _Turned, start: int) -> _Block:
        stop = min(start + QUERY_BLOCK, q.shape[2])
        offset = keys.k.shape[2] - q.shape[2]
        near, far = slice(offset + start, offset + stop), slice(0, offset + start)
        return cls(q[:, :, start:stop], slice(start, stop), keys.part(near), keys.part(far))

    @property
    def first(self) -> int:
        """Keys before the block."""
        return self.before.k.shape[2]

    @property
    def stop(self) -> int:
        """Keys up to the last of the block."""
        return self.first + self.here.k.shape[2]

    def scores(self) -> Tensor:
        """(b, h, i, stop)."""
        sizes, products = self._near()
        near = products.mul_(sizes).mul_(self._turns()).sum(2)
        if not self.first:
            return near
        query, key = self._far()
        return torch.cat((query @ key.transpose(-1, -2), near), dim=-1)

    def add_gradients(self, to_scores: Tensor, grads: _Gradients) -> None:
        """Add what the gradient of the scores gives to those of q, k, log and phase."""
        near = slice(self.first, self.stop)
        sizes, products = self._near()
        weighted = to_scores[:, :, None, :, near] * sizes  # (b, h, p, i, j)
        imaginary = weighted * self._turns(imaginary=True) * products
        weighted.mul_(self._turns())
        grads.q[:, :, self.rows] += _together(weighted @ _apart(self.here.k))
        grads.k[:, :, near] += _together(weighted.transpose(-1, -2) @ _apart(self.q))
        weighted.mul_(products)
        grads.log[:, :, near] += (weighted.sum(4) - weighted.sum(3)).transpose(2, 3)
        grads.phase[:, :, near] += (imaginary.sum(3) - imaginary.sum(4)).transpose(2, 3)
        if not self.first:
            return
        far = slice(0, self.first)
        grad = to_scores[..., far]
        query, key = self._far()
        self._add(grad @ key, query, grads.q[:, :, self.rows], grads, near, self._left(), 1)
        self._add(grad.transpose(-1, -2) @ query, key, grads.k[:, :, far], grads, far, self._right(), -1)

    def _near(self) -> tuple[Tensor, Tensor]:
        """|a_{j+1} ... a_i|, 0 for j > i, and the products of queries and keys: (b, h, p, i, j) each."""
        log = self.here.log.transpose(2, 3)
        sizes = (log[..., :, None] - log[..., None, :]).to(self.q.dtype).exp_().tril_()
        return sizes, _apart(self.q) @ _apart(self.here.k).transpose(-1, -2)

    def _turns(self, *, imaginary: bool = False) -> Tensor:
        """Cosine, or sine, of the phase from key to query, (b, h, p, i, j)."""
        cos, sin = self.here.cos.transpose(2, 3), self.here.sin.transpose(2, 3)
        left = (sin, -cos) if imaginary else (cos, sin)
        return torch.stack(left, -1) @ torch.stack((cos, sin), -2)

    def _left(self) -> tuple[Tensor, Tensor]:
        """From the block's first token to each of its own: real and imaginary part, (b, h, i, p)."""
        _, log, cos, sin = self.here
        size = (log - log[:, :, :1]).to(cos.dtype).exp()
        return size * cos, size * sin

    def _right(self) -> tuple[Tensor, Tensor]:
        """From each key before the block to its first token."""
        _, log, cos, sin = self.before
        size = (self.here.log[:, :, :1] - log).to(cos.dtype).exp()
        return size * cos, size * sin

    def _far(self) -> tuple[Tensor, Tensor]:
        """Queries (b, h, i, 2e) and earlier keys (b, h, j, 2e) whose products are the scores."""
        return _turn(self.q, self._left()), _turn(self.before.k, self._right())

    def _add(
        self,
        grad: Tensor,
        turned: Tensor,
        to_x: Tensor,
        grads: _Gradients,
        tokens: slice,
        gates: tuple[Tensor, Tensor],
        sign: int,
    ) -> None:
        """Add what the gradient of turned queries or keys (..., 2e) gives to theirs, and to log and phase."""
        cos, sin = (_split(part) for part in grad.chunk(2, dim=-1))
        to_x += (cos * gates[0][..., None, :] + sin * gates[1][..., None, :]).flatten(-2)
        real, imaginary = (_split(part) for part in turned.chunk(2, dim=-1))
        grads.log[:, :, tokens] += sign * (real * cos + imaginary * sin).sum(-2)
        grads.phase[:, :, tokens] += (real * sin - imaginary * cos).sum(-2)


def _turn(x: Tensor, gates: tuple[Tensor, Tensor]) -> Tensor:
    """Features (..., e) times the real and the imaginary part of a gate per pair, side by side: (..., 2e)."""
    halves = _split(x)
    return torch.cat([(halves * gate[..., None, :]).flatten(-2) for gate in gates], dim=-1)


def _split(x: Tensor) -> Tensor:
    """Features in halves, (..., e), as (..., 2, p)."""
    return x.reshape(*x.shape[:-1], 2, -1)


def _apart(x: Tensor) -> Tensor:
    """Features in halves, (b, h, n, e), by pairs: (b, h, p, n, 2)."""
    return _split(x).permute(0, 1, 4, 2, 3)


def _together(pairs: Tensor) -> Tensor:
    """(b, h, p, n, 2) as features in halves, (b, h, n, e)."""
    return pairs.permute(0, 1, 3, 4, 2).flatten(-2)


def _seen_keys(mask: Tensor | None, block: _Block) -> Tensor | None:
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
