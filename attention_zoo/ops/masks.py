"""Masks: boolean, True = allowed, or additive. Alignment is bottom-right: the last query is at the last key."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention_zoo._checks import check_boolean

HUGE = 1e4  # magnitude of features whose products stay finite in every dtype, float16 included


def causal_mask(queries: int, keys: int, *, device: torch.device | None = None) -> Tensor:
    """The keys up to the position of each query.

    Returns:
        (i, j) bool, True where key j <= query i + (keys - queries).
    """
    position = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= position[:, None]


def key_mask(mask: Tensor) -> Tensor:
    """A padding mask (b, j), True = a valid token, as a mask of keys (b, 1, 1, j)."""
    return mask[:, None, None, :]


def visible(queries: int, keys: int, *, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """The mask of allowed keys: padding, or a mask of pairs, combined with causal masking. All implementations use it.

    Args:
        queries: number of queries i.
        keys: number of keys j.
        mask: None, padding (b, j), or four axes that broadcast to (b, h, i, j); boolean, True = allowed.
        causal: causal masking.
        device: device of a mask that is built here.

    Returns:
        A boolean tensor that broadcasts to (b, h, i, j), or None if every key is allowed for every query.
    """
    if mask is not None and mask.ndim == 2:
        mask = key_mask(mask)
    if not causal or queries == 1:  # a single query is at the position of the last key
        return mask
    triangle = causal_mask(queries, keys, device=device)
    return triangle[None, None] if mask is None else mask & triangle


def hide_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Features without the content of masked tokens that could reach valid ones: NaN, infinite and huge numbers are 0.

    A product with a weight of 0 would not remove them, neither in outputs nor in gradients. Other features of masked
    tokens stay, because outputs at masked tokens are computed from them.

    Args:
        x: (b, n, d) or (b, s, n, d).
        mask: (b, n) bool, True = a valid token; None: `x` is returned as it is.
    """
    if mask is None:
        return x
    valid = mask[..., None] if x.ndim == 3 else mask[:, None, :, None]
    return torch.where(valid | (x.abs() < HUGE), x, torch.zeros((), dtype=x.dtype, device=x.device))


def combine_masks(mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """A padding mask and an attention mask as one mask of an attention operation.

    Args:
        mask: (b, j) bool, True = a valid token, or None.
        attn_mask: (i, j), (b, i, j) or (b, h, i, j), where b and h may be 1; boolean, True = allowed, or additive; or
            None.

    Returns:
        `mask`, or four axes that broadcast to (b, h, i, j), of the dtype of `attn_mask`.
    """
    return mask if attn_mask is None else hide_keys(attn_mask, mask)


def hide_keys(attn_mask: Tensor, mask: Tensor | None) -> Tensor:
    """An attention mask in four axes, restricted to the valid keys of padding (b, j)."""
    return as_pairs(attn_mask) if mask is None else restrict(attn_mask, key_mask(mask))


def restrict(attn_mask: Tensor, allowed: Tensor) -> Tensor:
    """An attention mask in four axes, boolean or additive, restricted to the allowed pairs, four axes of bool."""
    attn_mask = as_pairs(attn_mask)
    return attn_mask & allowed if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~allowed, -math.inf)


def as_pairs(attn_mask: Tensor) -> Tensor:
    """(i, j), (b, i, j) or (b, h, i, j) as (b, h, i, j), where b and h may be 1."""
    return attn_mask if attn_mask.ndim == 4 else attn_mask[None, None] if attn_mask.ndim == 2 else attn_mask[:, None]


def check_mask(mask: Tensor | None, batch: int, heads: int, queries: int, keys: int, *, additive: bool = False) -> None:
    """Check that a mask fits the scores (b, h, i, j).

    Args:
        mask: the mask, or None.
        batch, heads, queries, keys: b, h, i, j.
        additive: whether a mask of four axes may be floating point.

    Raises:
        TypeError: `mask` has the wrong dtype.
        ValueError: `mask` is neither (b, j) nor four axes that broadcast to (b, h, i, j).
    """
    if mask is None:
        return
    if not (additive and isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point()):
        check_boolean(mask=mask)
    want = (batch, heads, queries, keys)
    if mask.ndim == 2 and mask.shape == (batch, keys):
        return
    if mask.ndim == 4 and all(got in (1, size) for got, size in zip(mask.shape, want, strict=True)):
        return
    raise ValueError(
        f"mask must be (b, j) = {(batch, keys)} or, with four axes, broadcast to (b, h, i, j) = {want}, "
        f"got shape {tuple(mask.shape)}"
    )
