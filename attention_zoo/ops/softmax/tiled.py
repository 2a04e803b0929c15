"""Softmax attention in query tiles, recomputed in backward: only the scores of one tile are held at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax.bias import Bias, DistanceBias
from attention_zoo.ops.tiling import QueryTile, masked_softmax, query_tiles, slice_pairs, tile_mask

QUERY_TILE = 128  # larger than that of the operators, because every checkpoint has a cost


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Arguments as in `softmax_attention`."""
    if isinstance(bias, DistanceBias):
        bias = DistanceBias(at_least_float32(bias.values))  # once, so that the gradients of the tiles are summed in it
    options = (mask, causal, bias, scale, dropout)
    outs = [
        checkpoint(_attend, tile, q, k, v, *options, use_reentrant=False)
        if torch.is_grad_enabled()
        else _attend(tile, q, k, v, *options)
        for tile in query_tiles(q.shape[-2], k.shape[-2], causal, QUERY_TILE)
    ]
    return torch.cat(outs, dim=-2)


def _attend(
    tile: QueryTile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """The output of one tile."""
    heads, queries = q.shape[1:3]
    k, v = (repeat_heads(x[..., : tile.keys, :], heads) for x in (k, v))
    with no_autocast(q):
        scores = scale * at_least_float32(q[..., tile.queries, :]) @ at_least_float32(k).transpose(-1, -2)
        if isinstance(bias, DistanceBias):
            scores = scores + bias.rows(*tile[:2], queries, tile.keys).pairs(*scores.shape[-2:])
        elif bias is not None:
            scores = scores + slice_pairs(bias, *tile)
        weights = masked_softmax(scores, tile_mask(tile, mask=mask, causal=causal, device=q.device))
        return (F.dropout(weights, dropout) @ at_least_float32(v)).to(v.dtype)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(b, kv_h, n, e) with each head repeated heads / kv_h times: (b, heads, n, e)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
