"""Decoding with relative gates: new queries attend to cached keys, without any work on the gates of earlier tokens.

A cached key is multiplied by the gates after it up to a reference token, k_j a_{j+1} ... a_r, as in `fold_key`. The
products that are missing, a_{r+1} ... a_i, are those of the queries. The keys of a full chunk have one reference token
in common; the product of the gates since then is updated with every token, one number per chunk and pair of features.
Recent keys, which fill no chunk yet, are updated themselves. Nothing is divided, so that any gate, 0 too, is exact.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.gate_loop.gates import products_up_to
from attention_zoo.ops.masks import visible
from attention_zoo.ops.relative_gate.batched import (
    fold_key,
    fold_query,
    products_after,
    relative_scores,
    split_axis,
    turn_keys,
)
from attention_zoo.ops.tiling import masked_softmax

CHUNK = 20  # tokens of a chunk


class DecayedKeys(NamedTuple):
    """Keys, values and gates of earlier tokens: those of full chunks, then the recent ones.

    keys, values: full chunks, (b, N, h, c, 2e) in at least float32 and (b, N, h, c, e_v).
    recent_keys, recent_values: (b, h, r, 2e), times the gates up to the last token, and (b, h, r, e_v).
    since: product of the gates after the reference token of each chunk, (b, h, N, e / 2) complex.
    """

    keys: Tensor
    values: Tensor
    recent_keys: Tensor
    recent_values: Tensor
    since: Tensor


def no_keys(k: Tensor, v: Tensor, gate: Tensor) -> DecayedKeys:
    """The cache before the first of tokens (b, h, n, e), (b, h, n, e_v) and (b, h, n, e / 2)."""
    b, h, _, e = k.shape
    wide = gate.real.dtype
    keys, values = k.new_empty(b, 0, h, CHUNK, 2 * e, dtype=wide), v.new_empty(b, 0, h, CHUNK, v.shape[3])
    recent = k.new_empty(b, h, 0, 2 * e, dtype=wide)
    return DecayedKeys(keys, values, recent, v[:, :, :0], gate[:, :, :0])


def extend(cache: DecayedKeys, k: Tensor, v: Tensor, gate: Tensor) -> DecayedKeys:
    """The cache after new tokens (b, h, t, e), whose `keys` and `values` are those of the new chunks only."""
    total = products_up_to(gate)[:, :, -1:]
    recent = torch.cat(
        (turn_keys(cache.recent_keys, total), fold_key(k.to(gate.real.dtype), products_after(gate))), dim=2
    )
    values = torch.cat((cache.recent_values, v), dim=2)
    full = recent.shape[2] // CHUNK * CHUNK
    sizes = full // CHUNK, CHUNK
    chunks = [split_axis(x[:, :, :full], 2, sizes).transpose(1, 2) for x in (recent, values)]
    since = torch.cat((cache.since * total, total.new_ones(*total.shape[:2], full // CHUNK, total.shape[3])), dim=2)
    return DecayedKeys(chunks[0], chunks[1], recent[:, :, full:].clone(), values[:, :, full:].clone(), since)


def cached_relative_gate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cache: DecayedKeys,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
) -> Tensor:
    """The outputs (b, h, t, e_v) of new tokens, which attend to those of the cache and to each other.

    Args:
        q, k, v, gate: of the new tokens, (b, h, t, e), (b, h, t, e), (b, h, t, e_v) and (b, h, t, e / 2).
        cache: the earlier tokens.
        mask: (b, j) bool of all tokens, True = a valid token.
        softmax, dropout: as in `relative_gate_attention`.
    """
    dtype, (q, k, v) = v.dtype, (x.to(gate.real.dtype) for x in (q, k, v))
    keys, values, new = cache.keys, cache.values.to(v.dtype), q.shape[2]
    through = products_up_to(gate)
    scaled = q * q.shape[3] ** -0.5
    queries = fold_query(scaled, through)
    if new >= CHUNK:  # fewer keys than queries of all chunks: multiply the keys, and drop the axis of chunks
        keys = turn_keys(keys, cache.since.transpose(1, 2)[:, :, :, None]).transpose(1, 2).flatten(2, 3)
        values = values.transpose(1, 2).flatten(2, 3)
        old = queries @ keys.transpose(-1, -2)
    else:
        factors = (through[:, :, None] * cache.since[:, :, :, None]).transpose(1, 2)  # (b, N, h, t, p)
        old = fold_query(scaled[:, None], factors) @ keys.transpose(-1, -2)
        old = old.permute(0, 2, 3, 1, 4).flatten(3)
    scores = (old, queries @ cache.recent_keys.transpose(-1, -2), relative_scores(q, k, gate))
    weights = torch.cat(scores, dim=-1)
    allowed = visible(*weights.shape[2:], mask=mask, causal=True, device=q.device)
    if softmax:
        weights = masked_softmax(weights, allowed)
    elif allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    weights = F.dropout(weights, dropout)
    by_chunk, later = weights.tensor_split((old.shape[3],), dim=-1)
    out = later @ torch.cat((cache.recent_values.to(v.dtype), v), dim=2)
    if new >= CHUNK:
        return (out + by_chunk @ values).to(dtype)
    by_chunk = split_axis(by_chunk, 3, (values.shape[1], CHUNK)).permute(0, 3, 1, 2, 4)
    return (out + (by_chunk @ values).sum(1)).to(dtype)
