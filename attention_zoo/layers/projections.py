"""Projections to attention heads and back: several linear projections as one matrix product, splitting and merging."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_has_data


class Projections(nn.Linear):
    """Named linear projections whose weights are consecutive rows of one matrix and whose outputs are concatenated.

    Args:
        dim: input features d.
        bias: whether the projections have a bias.
        sizes: output features of each projection, by name.

    Example:
        >>> to_qkv = Projections(512, q=512, k=128, v=128)
        >>> to_qkv.part("k").shape
        torch.Size([128, 512])
    """

    def __init__(self, dim: int, *, bias: bool = False, **sizes: int) -> None:
        super().__init__(dim, sum(sizes.values()), bias=bias)
        self.sizes = sizes

    def part(self, name: str, kind: str = "weight") -> Tensor:
        """The rows of `weight`, or of `bias`, of one projection: a view."""
        names = list(self.sizes)
        start = sum(self.sizes[other] for other in names[: names.index(name)])
        return getattr(self, kind).data[start : start + self.sizes[name]]


def project_logits(to_logits: nn.Module, x: Tensor) -> Tensor:
    """Logits to_logits(x).

    Raises:
        RuntimeError: the weight is on the meta device and `x` is not. torch's linear operator returns uninitialised
            memory there (as of 2.13).
    """
    check_has_data(to_logits, x)
    return to_logits(x)


# Plain torch, not einops: decoding calls both for every token.
def split_heads(x: Tensor, dim_head: int) -> Tensor:
    """(..., n, h e) -> (..., h, n, e) with e = `dim_head`."""
    return x.view(*x.shape[:-1], x.shape[-1] // dim_head, dim_head).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., h, n, e) -> (..., n, h e)."""
    return x.transpose(-3, -2).flatten(-2)


def map_queries_and_keys(function: Callable[[Tensor], Tensor], qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Apply `function` to queries and keys (..., heads + kv_heads, n, e), which share a tensor.

    One call for both halves the operators of a decoding step. Under torch.compile it is two calls: in torch 2.13
    a compiled graph saves slices for backward with the strides of the length that was traced first, which is wrong
    for other lengths.
    """
    if torch.compiler.is_compiling():
        return function(qk[..., :heads, :, :]), function(qk[..., heads:, :, :])
    qk = function(qk)
    return qk[..., :heads, :, :], qk[..., heads:, :, :]
