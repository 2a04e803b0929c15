"""Splitting features into heads and merging heads into features."""

from __future__ import annotations

from torch import Tensor


# Plain torch, not einops: decoding calls both for every token.
def split_heads(x: Tensor, dim_head: int) -> Tensor:
    """(..., n, h e) -> (..., h, n, e) with e = `dim_head`."""
    return x.view(*x.shape[:-1], x.shape[-1] // dim_head, dim_head).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., h, n, e) -> (..., n, h e)."""
    return x.transpose(-3, -2).flatten(-2)
