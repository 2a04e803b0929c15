"""Attention under a pattern by torch's fused kernels and the full mask: a fixed number of operations for any length.

The mask of a pattern is built once per device and dtype, for its longest sequence; shorter ones are slices of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from attention_zoo.ops import tiling
from attention_zoo.ops.masks import key_mask
from attention_zoo.ops.softmax import Bias, softmax_attention
from attention_zoo.ops.softmax.sdpa import sdpa_attention
from attention_zoo.ops.sparse.pattern import Pattern

Value = TypeVar("Value")
ALIGNMENT = 8  # elements to which torch's kernels for CUDA would otherwise pad, that is copy, the rows of a mask
REMEMBERED = 16  # values that are kept, of all patterns together

_remembered: dict[Hashable, tuple[object, list[Tensor]]] = {}


def dense_attention(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Bias | None, dropout: float
) -> Tensor:
    """Arguments as in `pattern_attention`."""
    i, j, longest = q.shape[2], k.shape[2], _longest(pattern, q)
    if mask is None and bias is None and pattern.sees_itself and longest is not None:
        added = _additive_mask(pattern, longest, q)[None, None, j - i : j, :j]
        return sdpa_attention(q, k, v, None, False, added, q.shape[-1] ** -0.5, dropout)
    # the mask is causal already; with a bias the flag lets query tiles skip the keys after them
    causal = bias is not None and pattern.is_causal
    return softmax_attention(q, k, v, mask=_allowed(pattern, q, k, mask), causal=causal, bias=bias, dropout=dropout)


def _allowed(pattern: Pattern, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The pattern and the mask as four axes that broadcast to (b, h, i, j)."""
    i, j, longest = q.shape[2], k.shape[2], _longest(pattern, q)
    if longest is None:
        allowed = pattern.mask(j - i, j, q.device)[None, None]
    else:
        whole = remember(pattern, ("boolean", q.device), lambda: pattern.mask(0, longest, q.device))
        allowed = whole[None, None, j - i : j, :j]
    return allowed if mask is None else allowed & (key_mask(mask) if mask.ndim == 2 else mask)


def _longest(pattern: Pattern, q: Tensor) -> int | None:
    """Length of the mask that is remembered; None: it is built at every call, as on the CPU, where that is cheap."""
    if tiling.prefers_tiles(q) or q.is_meta or torch.compiler.is_compiling():
        return None
    return pattern.longest()


def _additive_mask(pattern: Pattern, n: int, q: Tensor) -> Tensor:
    """0 or -inf, (n, n) in the dtype of q, with rows of a multiple of ALIGNMENT elements in memory."""

    def make() -> Tensor:
        added = torch.full((n, -(-n // ALIGNMENT) * ALIGNMENT), -math.inf, dtype=q.dtype, device=q.device)
        return added[:, :n].masked_fill_(pattern.mask(0, n, q.device), 0.0)

    return remember(pattern, ("additive", q.dtype, q.device), make)


def remember(pattern: Pattern, what: Hashable, make: Callable[[], Value]) -> Value:
    """`make()`, kept for a pattern and `what` until a table of the pattern is modified."""
    values = list(vars(pattern).values())
    tables = [value for value in values if isinstance(value, Tensor)]
    if any(table.is_inference() for table in tables):  # such a tensor does not count its modifications
        return make()
    identity = [(id(value), value._version) if isinstance(value, Tensor) else value for value in values]
    key = (type(pattern), *identity, what)
    if key not in _remembered:
        if len(_remembered) >= REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        with torch.inference_mode(False):  # the value is used outside inference mode too
            _remembered[key] = make(), tables  # tables that are alive keep their ids
    return _remembered[key][0]  # type: ignore[return-value]
