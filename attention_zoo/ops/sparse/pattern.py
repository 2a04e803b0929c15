"""Attention under a fixed pattern of what sees what: dense by its definition, by tiles, or one query at a time."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import key_mask
from attention_zoo.ops.softmax import check_heads, softmax_attention, softmax_attention_weights

DENSE_UP_TO = 256  # tokens, up to which the full score matrix is cheaper than a loop over tiles


class Pattern(Protocol):
    """Which tokens of a sequence see which; a query sees no key after the last one that exists."""

    def check(self, tokens: int, *, name: str) -> None:
        """Refuse a sequence that the pattern does not hold."""

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The definition: (stop - start, stop) bool, what the queries start ... stop - 1 see of the first stop keys."""

    def keys(self, position: int) -> list[slice | list[int]]:
        """The keys that the last of position + 1 tokens sees, in parts: runs, with steps or without; single ones."""

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The whole sequence by tiles."""


def pattern_attention(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T) v over the keys that the pattern and the padding leave.

    Args:
        pattern: what sees what.
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, h, j, e).
        mask: (b, j) bool, True = a real token.
        dropout: probability with which a weight is dropped; takes the dense path. Pass 0 outside training.
        impl: "auto", "reference" (full score matrix, twice differentiable), "dense" (torch's fused kernel under the
            full mask), "tiled" (queries of the whole sequence), "gather" (one query, its own keys alone).

    Returns:
        (b, h, i, e). A query that sees no key gets exactly 0, and gives zero gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    impl = choose(impl, ("dense", "tiled", "gather"))
    _check(pattern, q, k, v, mask)
    i, j = q.shape[2], k.shape[2]
    if impl == "auto":
        impl = _cheapest(i, j, dropout)
    if impl == "tiled" and i == j and not dropout:
        return pattern.tiled(q, k, v, mask)
    if impl == "gather" and i == 1:
        parts = pattern.keys(j - 1)
        k, v = _gather(k, parts, axis=2), _gather(v, parts, axis=2)
        mask = None if mask is None else _gather(mask, parts, axis=1)
        return softmax_attention(q, k, v, mask=mask, dropout=dropout)
    if impl in ("tiled", "gather"):
        raise ValueError(f"impl must fit the queries, got {impl=} for {i} queries of {j} keys and {dropout=}")
    seen = _seen(pattern, i, j, mask, q.device)
    return softmax_attention(q, k, v, mask=seen, dropout=dropout, impl="reference" if impl == "reference" else "sdpa")


def pattern_weights(pattern: Pattern, q: Tensor, k: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The weights (b, h, i, j) by which `pattern_attention` multiplies the values."""
    _check(pattern, q, k, k, mask)
    return softmax_attention_weights(q, k, mask=_seen(pattern, q.shape[2], k.shape[2], mask, q.device))


def _cheapest(queries: int, keys: int, dropout: float) -> str:
    whole = queries == keys and not dropout
    if torch.compiler.is_compiling():  # a trace would hold the keys of one position, or serve one range of lengths
        return "tiled" if whole else "dense"
    if queries == 1 and keys > 1:
        return "gather"
    return "tiled" if whole and keys > DENSE_UP_TO else "dense"


def _gather(x: Tensor, parts: list[slice | list[int]], *, axis: int) -> Tensor:
    """Parts of x along an axis, side by side: runs as they lie, and only single ones picked one by one."""
    before = (slice(None),) * axis
    taken = [
        x[*before, part] if isinstance(part, slice) else x.index_select(axis, torch.tensor(part, device=x.device))
        for part in parts
    ]
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=axis)


def _seen(pattern: Pattern, queries: int, keys: int, mask: Tensor | None, device: torch.device) -> Tensor:
    seen = pattern.mask(keys - queries, keys, device)[None, None]
    return seen if mask is None else seen & key_mask(mask)


def _check(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    check_heads(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must have the same number of heads, got {q.shape[1]} and {k.shape[1]}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must be the last of the tokens of k, got {q.shape[2]} queries of {k.shape[2]} keys")
    pattern.check(k.shape[2], name="k")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, True = a real token, got dtype {mask.dtype}")
    if mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"mask must be (b, j) = {(k.shape[0], k.shape[2])}, got shape {tuple(mask.shape)}")
