"""Biases of the scores: one number per pair of query and key, or per distance between them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.masks import check_mask
from attention_zoo.ops.precision import at_least_float32


class DistanceBias(NamedTuple):
    """Relative position bias that depends on the distance of query and key only, stored per distance.

    values: (h, i + j - 1). With bottom-right alignment the distances, key - query, are -(j - 1) ... i - 1. Entry d is
        the bias of all pairs with (key index) - (query index) + i - 1 = d, both counted from 0.
    """

    values: Tensor

    def pairs(self, queries: int, keys: int) -> Tensor:
        """The bias of every pair, (h, queries, keys), as a view in which each row is shifted by one key.

        In at least float32, the dtype in which the gradients of all pairs of a distance are summed.
        """
        values = at_least_float32(self.values)
        if queries == 1:
            return values[:, None]
        if torch.compiler.is_compiling():  # a trace is specialised on the sizes given to unfold
            entry = (
                torch.arange(keys, device=values.device) - torch.arange(1 - queries, 1, device=values.device)[:, None]
            )
            return values[:, entry]
        return values.unfold(-1, keys, 1).flip(-2)

    def rows(self, start: int, stop: int, queries: int, keys: int) -> DistanceBias:
        """The bias of the queries `start` ... `stop` - 1 of `queries` and the first `keys` keys."""
        return DistanceBias(self.values[:, queries - stop : queries - start - 1 + keys])


Bias = Tensor | DistanceBias


def split_mask(mask: Tensor | None, bias: Bias | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, Bias | None]:
    """Check a mask and a bias, and split an additive mask into a boolean mask, False where it is -inf, and a bias.

    Args:
        mask: padding (b, j), or four axes that broadcast to (b, h, i, j); boolean, or with four axes additive.
        bias: broadcasts to (b, h, i, j), or a `DistanceBias`.
        q: (b, h, i, e).
        k: (b, kv_h, j, e).

    Returns:
        The boolean mask, and the bias with the finite entries of an additive mask added.

    Raises:
        TypeError, ValueError: see `check_mask` and `check_bias`.
    """
    i, j = q.shape[2], k.shape[2]
    check_mask(mask, q.shape[0], q.shape[1], i, j, additive=True)
    check_bias(bias, q, k)
    if mask is None or mask.dtype == torch.bool:
        return mask, bias
    added = mask.to(torch.promote_types(q.dtype, torch.float32))
    hidden = added == -math.inf
    added = added.masked_fill(hidden, 0.0)  # finite: -inf in every entry of a row would give NaN
    if bias is not None:
        added = added + (bias.pairs(i, j) if isinstance(bias, DistanceBias) else bias)
    return ~hidden, added


def check_bias(bias: Bias | None, q: Tensor, k: Tensor) -> None:
    """Check that a bias fits the scores (b, h, i, j).

    Raises:
        TypeError: `bias` is not floating point (a boolean mask is passed as `mask`).
        ValueError: `bias` does not broadcast to (b, h, i, j), or a `DistanceBias` is not (h, i + j - 1).
    """
    if bias is None:
        return
    values = bias.values if isinstance(bias, DistanceBias) else bias
    if not values.is_floating_point():
        raise TypeError(f"bias must be floating point, got dtype {values.dtype}")
    b, h, i, j = *q.shape[:3], k.shape[-2]
    if isinstance(bias, DistanceBias):
        if values.shape != (h, i + j - 1):
            raise ValueError(f"bias.values must be (h, i + j - 1) = {(h, i + j - 1)}, got shape {tuple(values.shape)}")
        return
    sizes = (b, h, i, j)[-bias.ndim :]
    if bias.ndim not in (2, 3, 4) or any(got not in (1, want) for got, want in zip(bias.shape, sizes, strict=True)):
        raise ValueError(f"bias must broadcast to (b, h, i, j) = {(b, h, i, j)}, got shape {tuple(bias.shape)}")
