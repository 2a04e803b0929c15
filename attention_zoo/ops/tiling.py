"""Query tiles: shared by the implementations that hold the scores of a few queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.masks import visible

QUERY_TILE = 64  # queries whose scores are held at a time; a file imports it or defines its own, with the reason


def prefers_tiles(x: Tensor) -> bool:
    """Whether a loop over tiles is fast where `x` is: on the CPU. On other devices every tile costs kernel launches."""
    return x.device.type == "cpu"


class QueryTile(NamedTuple):
    """The queries start ... stop - 1, which attend to none but the first `keys` keys."""

    start: int
    stop: int
    keys: int

    @property
    def queries(self) -> slice:
        """The queries as an index."""
        return slice(self.start, self.stop)


def query_tiles(queries: int, keys: int, causal: bool, size: int) -> Iterator[QueryTile]:
    """Split the queries into tiles.

    Args:
        queries: number of queries i.
        keys: number of keys j.
        causal: causal masking, aligned bottom-right: a tile ends at the last key of its last query, which leaves no key
            at all (`keys` = 0) where there are more queries than keys.
        size: queries per tile; the last tile holds the rest.
    """
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield QueryTile(start, stop, max(keys - queries + stop, 0) if causal else keys)


def slice_mask(mask: Tensor | None, start: int, stop: int, keys: int) -> Tensor | None:
    """The part of a mask for the queries start ... stop - 1 and the first `keys` keys.

    Args:
        mask: None, (b, j), or four axes that broadcast to (b, h, i, j).
    """
    if mask is None:
        return None
    return mask[:, :keys] if mask.ndim == 2 else slice_pairs(mask, start, stop, keys)


def slice_pairs(pairs: Tensor, start: int, stop: int, keys: int) -> Tensor:
    """As `slice_mask`, for a tensor that broadcasts to (..., i, j)."""
    rows = pairs if pairs.shape[-2] == 1 else pairs[..., start:stop, :]
    return rows if rows.shape[-1] == 1 else rows[..., :keys]


def tile_mask(tile: QueryTile, *, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """The allowed mask of a tile, as `visible` returns it for all queries: None where every key is allowed."""
    return visible(tile.stop - tile.start, tile.keys, mask=slice_mask(mask, *tile), causal=causal, device=device)


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis restricted to the allowed keys; a row without any gets zeros, and zero gradients."""
    if allowed is None:
        return scores.softmax(dim=-1)
    # A finite fill keeps empty rows free of NaN; the second fill makes their weights, and gradients, exactly 0.
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0.0)


def dropout_seed(dropout: float) -> Tensor:
    """Seed of `dropout_mask`, a scalar int64 on the CPU, drawn from torch's default generator; 0 without dropout.

    Operators save the seed for backward, where it gives the dropout masks of forward, instead of the masks.
    """
    return torch.randint(2**62, (), device="cpu") if dropout else torch.zeros((), dtype=torch.int64)


def dropout_mask(weights: Tensor, dropout: float, seed: Tensor, *, row: int = 0, start: int = 0) -> Tensor:
    """Factors of the weights: 0 for a dropped weight, 1 / (1 - dropout) for a kept one.

    Equal arguments give equal masks, which is how backward recomputes those of forward.

    Args:
        weights: the weights of one tile; only shape, dtype and device are read.
        dropout: probability of dropping a weight.
        seed: from `dropout_seed`.
        row: batch row of the tile, where a tile is of one row.
        start: first query of the tile.
    """
    generator = torch.Generator(weights.device).manual_seed((int(seed) + 1_000_003 * row + start) % 2**63)
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout
    return kept.to(weights.dtype) / ((1 - dropout) or 1.0)
