"""The scores of one block of queries under relative gates, and what their gradient gives.

sim_ij = sum_p (q_{i,2p} k_{j,2p} + q_{i,2p+1} k_{j,2p+1}) Re(a_{j+1,p} ... a_{i,p})

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.gate_loop.gates import magnitude

QUERY_BLOCK = 32  # queries whose scores are held at a time; among themselves they cost 32 e / 2 products each


def in_halves(x: Tensor) -> Tensor:
    """The features (..., e) with the first ones of all pairs before the second ones, so that gates lie along them."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).transpose(-1, -2).flatten(-2)


def in_pairs(x: Tensor) -> Tensor:
    """The features as they were before `in_halves`."""
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).transpose(-1, -2).flatten(-2)


class Gradients(NamedTuple):
    """What the blocks of queries add to."""

    q: Tensor
    k: Tensor
    v: Tensor
    log: Tensor
    phase: Tensor


class GatedKeys(NamedTuple):
    """Keys, their features in halves, and the gates multiplied up.

    log: in float64; cos, sin: of the phase, in the keys' dtype.
    """

    k: Tensor
    log: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, k: Tensor, log: Tensor, phase: Tensor) -> GatedKeys:
        return cls(in_halves(k), log, phase.cos().to(k.dtype), phase.sin().to(k.dtype))

    def part(self, part: slice) -> GatedKeys:
        """Those of some tokens."""
        return GatedKeys(*(tensor[:, :, part] for tensor in self))


class QueryBlock(NamedTuple):
    """A block of queries: its rows among the queries, the keys of the same tokens, and those before them.

    No product is divided by: queries and the keys before them meet at the block's first token, from where both sides
    only shrink.
    """

    q: Tensor
    rows: slice
    here: GatedKeys
    before: GatedKeys

    @classmethod
    def of(cls, q: Tensor, keys: GatedKeys, start: int) -> QueryBlock:
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

    def add_gradients(self, to_scores: Tensor, grads: Gradients) -> None:
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
        sizes = magnitude(log[..., :, None] - log[..., None, :], self.q.dtype).tril_()
        return sizes, _apart(self.q) @ _apart(self.here.k).transpose(-1, -2)

    def _turns(self, *, imaginary: bool = False) -> Tensor:
        """Cosine, or sine, of the phase from key to query, (b, h, p, i, j)."""
        cos, sin = self.here.cos.transpose(2, 3), self.here.sin.transpose(2, 3)
        left = (sin, -cos) if imaginary else (cos, sin)
        return torch.stack(left, -1) @ torch.stack((cos, sin), -2)

    def _left(self) -> tuple[Tensor, Tensor]:
        """From the block's first token to each of its own: real and imaginary part, (b, h, i, p)."""
        _, log, cos, sin = self.here
        size = magnitude(log - log[:, :, :1], cos.dtype)
        return size * cos, size * sin

    def _right(self) -> tuple[Tensor, Tensor]:
        """From each key before the block to its first token."""
        _, log, cos, sin = self.before
        size = magnitude(self.here.log[:, :, :1] - log, cos.dtype)
        return size * cos, size * sin

    def _far(self) -> tuple[Tensor, Tensor]:
        """Queries (b, h, i, 2e) and earlier keys (b, h, j, 2e) whose products are the scores."""
        return _turn(self.q, self._left()), _turn(self.before.k, self._right())

    def _add(
        self,
        grad: Tensor,
        turned: Tensor,
        to_x: Tensor,
        grads: Gradients,
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
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)


def _apart(x: Tensor) -> Tensor:
    """Features in halves, (b, h, n, e), by pairs: (b, h, p, n, 2)."""
    return _split(x).permute(0, 1, 4, 2, 3)


def _together(pairs: Tensor) -> Tensor:
    """(b, h, p, n, 2) as features in halves, (b, h, n, e)."""
    return pairs.permute(0, 1, 3, 4, 2).flatten(-2)
