"""Boolean masks, True = visible. They combine by `&`; positions are aligned bottom-right: last query, last key."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, *, device: torch.device | None = None) -> Tensor:
    """Which keys a causal query sees: those up to its own position, the last query standing at the last key.

    Returns:
        (i, j) bool, True where key j <= query i + (keys - queries).
    """
    position = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= position[:, None]


def key_mask(mask: Tensor) -> Tensor:
    """A padding mask (b, j), True = a real token, in the shape in which it hides keys: (b, 1, 1, j)."""
    return mask[:, None, None, :]


def visible(queries: int, keys: int, *, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """Padding or pattern together with causality.

    Args:
        queries: number of queries i.
        keys: number of keys j.
        mask: None, a padding mask (b, j), or any bool tensor that broadcasts to (b, h, i, j).
        causal: hide the keys after a query.
        device: where a mask that has to be built is built.

    Returns:
        A bool tensor that broadcasts to (b, h, i, j), or None where everything is visible.
    """
    if mask is not None and mask.ndim == 2:
        mask = key_mask(mask)
    if not causal or queries == 1:  # a single query stands at the last key and sees all
        return mask
    triangle = causal_mask(queries, keys, device=device)
    return triangle[None, None] if mask is None else mask & triangle


def check_mask(mask: Tensor | None, batch: int, heads: int, queries: int, keys: int) -> None:
    """Refuse a mask that an op would misread.

    Raises:
        TypeError: it is not a boolean tensor.
        ValueError: it is neither (b, j) nor broadcasts to (b, h, i, j).
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor, True where a key is visible, got {got}")
    want = (batch, heads, queries, keys)
    if mask.ndim == 2 and mask.shape == (batch, keys):
        return
    if mask.ndim == 4 and all(got in (1, size) for got, size in zip(mask.shape, want, strict=True)):
        return
    raise ValueError(
        f"mask must be (b, j) = {(batch, keys)} or, with four axes, broadcast to (b, h, i, j) = {want}, "
        f"got shape {tuple(mask.shape)}"
    )
