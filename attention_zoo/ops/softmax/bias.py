"""Biases of the scores: one number per pair of query and key, or per distance between them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


def pairs_of_distances(bias: DistanceBias, queries: int, keys: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """The bias of every pair as a mask of torch's kernels: (h, i, j) in `dtype`, shifted per head, -inf where masked.

    The largest visible bias of a head becomes 0, which softmax does not notice and which rounds the biases that matter
    least. The gradients of all pairs of a distance are summed in at least float32. Memory O(h i j).

    Args:
        bias: of `queries` queries, at most `keys`.
        queries, keys: i, j.
        causal: causal masking, aligned bottom-right.
        dtype: dtype of the scores.
    """
    values = at_least_float32(bias.values)
    seen = values[:, :keys] if causal else values  # the other distances are those of later keys
    values = torch.nn.functional.pad(seen - seen.detach().amax(-1, keepdim=True), (0, queries - 1), value=-math.inf)
    values = values[:, : queries + keys - 1]
    if torch.compiler.is_compiling():
        return DistanceBias(values).pairs(queries, keys).to(dtype)
    pairs: Tensor = _Pairs.apply(values, queries, keys, dtype)  # type: ignore[no-untyped-call]
    return pairs


class _Pairs(torch.autograd.Function):
    """Values per distance (h, i + j - 1) as pairs (h, i, j) in another dtype, in one copy."""

    @staticmethod
    def forward(values: Tensor, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).unfold(-1, keys, 1).flip(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_by_distance(gradient, ctx.dtype), None, None, None


def sum_by_distance(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (h, i, j) over all pairs of a distance, in `dtype`: (h, i + j - 1), in the order of `DistanceBias`."""
    h, i, j = pairs.shape
    width = i + j - 1
    skewed = pairs.new_zeros(h, i, width)
    # row r is shifted right by i - 1 - r, which puts the pairs of a distance into one column
    skewed.as_strided((h, i, j), (i * width, max(width - 1, 1), 1), i - 1).copy_(pairs)
    return skewed.sum(1, dtype=dtype)


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
