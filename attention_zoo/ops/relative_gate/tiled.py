"""Attention with relative gates in query tiles, with an explicit backward.

With the cumulative log-magnitude L and phase phi of the gates, each pair p of features is folded into four numbers,
    q'_i = [q_i cos phi_i, q_i sin phi_i],  k'_j = [k_j cos phi_j, k_j sin phi_j],
and attention needs only the decay of the magnitudes:
    sim_ij = sum_p exp(L_ip - L_jp) (q'_ip . k'_jp)
Folding is left to autograd; the operator holds the scores of one tile at a time and recomputes them in backward. It
never divides by a product of gates: for keys before the tile, exp(L_i - L_j) is the decay from the key to the first
token of the tile times the decay from there to the query; inside the tile it is computed for each pair.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.gate_loop.gates import flush_denormal_, log_and_phase, magnitude
from attention_zoo.ops.tiling import QueryTile, dropout_mask, dropout_seed, masked_softmax, query_tiles, tile_mask

QUERY_TILE = 32  # smaller than elsewhere: the decays inside a tile take 32 e / 2 numbers per query


class RelativeGateInputs(NamedTuple):
    """Inputs of the operator, in at least float32.

    q: scaled and folded queries, (b, h, i, 4, e / 2), aligned with the last keys.
    k: folded keys, (b, h, j, 4, e / 2).
    v: (b, h, j, e_v).
    log: cumulative log-magnitude of the gates, (b, h, j, e / 2) float64.
    mask: (b, j) bool, True = a valid token.
    softmax: whether the weights are the softmax of the scores, or the scores.
    dropout, seed: probability of dropping a weight, and the seed of the dropout masks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log: Tensor
    mask: Tensor | None
    softmax: bool
    dropout: float
    seed: Tensor


def tiled_relative_gate_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None, softmax: bool, dropout: float
) -> Tensor:
    """The outputs (b, h, i, e_v); arguments as in `relative_gate_attention`, in at least float32 and complex64."""
    q, k, log = _fold(q, k, gate)
    return _operator(RelativeGateInputs(q, k, v, log, mask, softmax, dropout, dropout_seed(dropout)))[0]


def tiled_relative_gate_weights(q: Tensor, k: Tensor, gate: Tensor, mask: Tensor | None, softmax: bool) -> Tensor:
    """The weights (b, h, i, j); arguments as in `tiled_relative_gate_attention`."""
    q, keys, log = _fold(q, k, gate)
    inputs = RelativeGateInputs(q, keys, k, log, mask, softmax, 0.0, dropout_seed(0.0))
    rows = [F.pad(part.weights(softmax), (0, k.shape[2] - part.tile.keys)) for part in _tiles(inputs)]
    return torch.cat(rows, dim=2)


def _fold(q: Tensor, k: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled and folded queries, folded keys, and log-magnitudes, as in `RelativeGateInputs`."""
    log, phase = (part.cumsum(2) for part in log_and_phase(torch.view_as_real(gate)))
    if q.shape[2] == 1:  # phases relative to a single query: its sine is 0, so that the cosines suffice
        waves = (phase[:, :, -1:] - phase).cos()[:, :, :, None]
    else:
        waves = torch.stack((phase.cos(), phase.sin()), dim=3)
    waves = waves.to(k.dtype)  # (b, h, j, 2 or 1, p)

    def fold(x: Tensor, waves: Tensor) -> Tensor:
        halves = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).transpose(-1, -2)  # (b, h, n, 2, p)
        return (halves[:, :, :, None] * waves[:, :, :, :, None]).flatten(3, 4)

    return fold(q * q.shape[3] ** -0.5, waves[:, :, k.shape[2] - q.shape[2] :]), fold(k, waves), log


class _Tile(NamedTuple):
    """A query tile, its keys, and the decays between them.

    tile: position of the tile.
    allowed: allowed mask of the tile, (b or 1, 1, i, keys) or None.
    q, k: queries of the tile and keys of the same tokens, by pairs of features, (b, h, p, i, 4).
    decay: decay from each key of the tile to each query, (b, h, p, i, i); 1 where the key comes after the query.
    query_decay: decay from the first token of the tile to each query, (b, h, i, 1, p).
    key_decay: decay from each earlier key to the first token of the tile, (b, h, j, 1, p).
    decayed_q, decayed_k: queries and earlier keys times their decays, (b, h, i, 2e) and (b, h, j, 2e).
    """

    tile: QueryTile
    allowed: Tensor | None
    q: Tensor
    k: Tensor
    decay: Tensor
    query_decay: Tensor
    key_decay: Tensor
    decayed_q: Tensor
    decayed_k: Tensor

    def weights(self, softmax: bool) -> Tensor:
        """(b, h, i, keys)."""
        inside = (self.q @ self.k.transpose(-1, -2)).mul_(self.decay).sum(2)
        scores = torch.cat((self.decayed_q @ self.decayed_k.transpose(-1, -2), inside), dim=-1)
        return masked_softmax(scores, self.allowed) if softmax else self.mask(scores)

    def mask(self, x: Tensor) -> Tensor:
        """Set the entries of masked keys to 0."""
        return x if self.allowed is None else x.masked_fill(~self.allowed, 0.0)


def _tiles(inputs: RelativeGateInputs) -> Iterator[_Tile]:
    q, k, _, log, mask, *_ = inputs
    key_decay, previous = k.new_empty(log.shape), 0
    for tile in query_tiles(q.shape[2], k.shape[2], True, QUERY_TILE):
        first = tile.keys - (tile.stop - tile.start)
        start, here = log[:, :, first : first + 1], log[:, :, first : tile.keys]
        # Earlier keys decay from the first token of the previous tile, which is cheaper than exp of all differences.
        step = magnitude(start - log[:, :, previous : previous + 1], k.dtype)
        flush_denormal_(key_decay[:, :, :previous].mul_(step))
        key_decay[:, :, previous:first] = magnitude(start - log[:, :, previous:first], k.dtype)
        query_decay, decays = magnitude(here - start, k.dtype)[..., None, :], key_decay[:, :, :first, None]
        by_pair = here.transpose(2, 3).contiguous()
        yield _Tile(
            tile,
            tile_mask(tile, mask=mask, causal=True, device=q.device),
            _by_pair(q[:, :, tile.queries]),
            _by_pair(k[:, :, first : tile.keys]),
            magnitude(by_pair[..., :, None] - by_pair[..., None, :], k.dtype),
            query_decay,
            decays,
            (q[:, :, tile.queries] * query_decay).flatten(3),
            (k[:, :, :first] * decays).flatten(3),
        )
        previous = first


def _forward(inputs: RelativeGateInputs) -> list[Tensor]:
    v, out = inputs.v, _fake(inputs)[0]
    for part in _tiles(inputs):
        weights = part.weights(inputs.softmax)
        if inputs.dropout:
            weights = weights * dropout_mask(weights, inputs.dropout, inputs.seed, start=part.tile.start)
        out[:, :, part.tile.queries] = weights @ v[:, :, : part.tile.keys]
    return [out]


def _backward(inputs: RelativeGateInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    q, k, v = inputs[:3]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in _tiles(inputs):
        queries, keys, first = part.tile.queries, part.tile.keys, part.decayed_k.shape[2]
        weights, grad_out = part.weights(inputs.softmax), gradients[0][:, :, queries]
        used, grad = weights, grad_out @ v[:, :, :keys].transpose(-1, -2)
        if inputs.dropout:
            kept = dropout_mask(weights, inputs.dropout, inputs.seed, start=part.tile.start)
            used, grad = weights * kept, grad * kept
        grad_v[:, :, :keys] += used.transpose(-1, -2) @ grad_out
        grad = weights * (grad - (weights * grad).sum(-1, keepdim=True)) if inputs.softmax else part.mask(grad)
        earlier, inside = grad[..., :first], part.decay.mul_(grad[:, :, None, :, first:])
        grad_tile, grad_earlier = grad_q[:, :, queries], grad_k[:, :, :first]  # views
        grad_tile.copy_(_by_token(inside @ part.k))
        grad_tile.addcmul_((earlier @ part.decayed_k).view(grad_tile.shape), part.query_decay)
        grad_earlier.addcmul_((earlier.transpose(-1, -2) @ part.decayed_q).view(grad_earlier.shape), part.key_decay)
        grad_k[:, :, first:keys] += _by_token(inside.transpose(-1, -2) @ part.q)
    # L_i scales the query q'_i and -L_j the key k'_j.
    grad_log = -(k * grad_k).sum(3, dtype=torch.float64)
    grad_log[:, :, k.shape[2] - q.shape[2] :] += (q * grad_q).sum(3)
    grad_log[:, :, 0] -= grad_log.sum(2)  # only differences of L count, so their gradients sum to 0
    return [grad_q, grad_k, grad_v, grad_log]


def _fake(inputs: RelativeGateInputs) -> list[Tensor]:
    return [inputs.v.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])]


_operator = register_operator(
    "relative_gate_attention", RelativeGateInputs, _forward, _backward, _fake, save_outputs=False
)


def _by_pair(x: Tensor) -> Tensor:
    """(b, h, n, 4, p) as (b, h, p, n, 4)."""
    return x.permute(0, 1, 4, 2, 3)


def _by_token(x: Tensor) -> Tensor:
    """(b, h, p, n, 4) as (b, h, n, 4, p)."""
    return x.permute(0, 1, 3, 4, 2)
