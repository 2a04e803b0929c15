"""Patterns with their definitions, and inputs, shared by the tests of sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops import (
    TextImageLayout,
    axial_attention,
    axial_mask,
    block_sparse_attention,
    block_sparse_mask,
    choose_blocks,
    conv_attention,
    conv_mask,
)
from tests.formulas import attend_one_by_one, relative_error

LAYOUT = TextImageLayout(text_len=5, height=6, width=7)
IMAGE = TextImageLayout(text_len=0, height=3, width=4)
WIDE_IMAGE = TextImageLayout(text_len=0, height=4, width=35)
LONG_TEXT = TextImageLayout(text_len=70, height=3, width=40)  # more than one tile of text, rows wider than a strip
LENGTHS = {LAYOUT: (1, 4, 5, 6, 12, 13, 30, 47), WIDE_IMAGE: (1, 34, 36, 140), LONG_TEXT: (64, 70, 71, 111, 190)}

Attends = Callable[[int, int], bool]


class Case(NamedTuple):
    """One pattern: its operation, its mask, and its definition, whether query i attends to key j."""

    attention: Callable[..., Tensor]
    mask: Callable[..., Tensor]
    attends: Attends
    causal: bool = True


def image_definition(
    layout: TextImageLayout, rule: Callable[[int, int], bool], *, causal: bool = True, wraps: bool = False
) -> Attends:
    """Definition of an image pattern.

    `rule` is given rows and columns from key to query; if it wraps, the number of tokens and 0.
    """

    def attends(i: int, j: int) -> bool:
        if causal and j > i:
            return False
        if j < layout.text_len or i < layout.text_len:
            return True
        if wraps:
            return rule(i - j, 0)
        (row, column), (key_row, key_column) = (divmod(t - layout.text_len, layout.width) for t in (i, j))
        return rule(row - key_row, column - key_column)

    return attends


def conv_case(layout: TextImageLayout, kernel_size: int, dilation: int = 1, window: str = "quadrant") -> Case:
    lowest = 0 if window == "quadrant" else -(kernel_size // 2)
    steps = [dilation * step for step in range(lowest, lowest + kernel_size)]
    causal = window != "centred"
    options: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, "window": window, "layout": layout}
    options["causal"] = causal
    if window == "wrapped":
        back = {row * layout.width + column for row in steps for column in steps}
        definition = image_definition(layout, lambda distance, _: distance in back, wraps=True)
    else:
        definition = image_definition(layout, lambda down, right: down in steps and right in steps, causal=causal)
    return Case(partial(conv_attention, **options), partial(conv_mask, **options), definition, causal)


def axial_case(layout: TextImageLayout, axis: str, *, causal: bool = True) -> Case:
    if axis == "wrapped_row":
        definition = image_definition(layout, lambda distance, _: distance <= layout.width, wraps=True)
    else:
        definition = image_definition(
            layout, lambda down, right: (down if axis == "row" else right) == 0, causal=causal
        )
    options: dict[str, Any] = {"layout": layout, "axis": axis, "causal": causal}
    return Case(partial(axial_attention, **options), partial(axial_mask, **options), definition, causal)


def block_case(layout: TextImageLayout, *, causal: bool) -> Case:
    count = -(-layout.length // 8)
    blocks = choose_blocks(count, local_blocks=2, global_blocks=1, random_blocks=1, causal=causal)
    options: dict[str, Any] = {"blocks": blocks, "block_size": 8, "causal": causal}
    return Case(
        partial(block_sparse_attention, **options),
        partial(block_sparse_mask, **options),
        lambda i, j: bool(blocks[i // 8, j // 8]) and (j <= i or not causal),
        causal,
    )


MAKE_CASE: dict[str, Callable[[TextImageLayout], Case]] = {
    "conv 5": lambda layout: conv_case(layout, 5),
    "conv 3 dilated": lambda layout: conv_case(layout, 3, 2),
    "conv 1": lambda layout: conv_case(layout, 1),
    "causal conv 5": lambda layout: conv_case(layout, 5, window="causal"),
    "causal conv 3 dilated": lambda layout: conv_case(layout, 3, 2, "causal"),
    "wrapped conv 5": lambda layout: conv_case(layout, 5, window="wrapped"),
    "wrapped conv 3 dilated": lambda layout: conv_case(layout, 3, 2, "wrapped"),
    "centred conv 5": lambda layout: conv_case(layout, 5, window="centred"),
    "centred conv 3 dilated": lambda layout: conv_case(layout, 3, 2, "centred"),
    "axial row": lambda layout: axial_case(layout, "row"),
    "axial column": lambda layout: axial_case(layout, "column"),
    "axial wrapped row": lambda layout: axial_case(layout, "wrapped_row"),
    "axial row in both directions": lambda layout: axial_case(layout, "row", causal=False),
    "axial column in both directions": lambda layout: axial_case(layout, "column", causal=False),
    "causal blocks": lambda layout: block_case(layout, causal=True),
    "blocks": lambda layout: block_case(layout, causal=False),
}


def table(attends: Attends, n: int) -> Tensor:
    return torch.tensor([[attends(i, j) for j in range(n)] for i in range(n)])


def padding_mask(n: int) -> Tensor:
    mask = torch.rand(2, n) < 0.6
    mask[0, : n // 2] = False  # left padding: the first queries have no visible key
    return mask


def inputs(n: int, dtype: torch.dtype = torch.float32, b: int = 2) -> list[Tensor]:
    return [torch.randn(b, n, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def with_gradients(op: Callable[..., Tensor], qkv: list[Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    out = op(*qkv, **options)
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]


def assert_tiles_equal_reference(op: Callable[..., Tensor], n: int, dtype: torch.dtype, limit: float) -> None:
    for mask in (None, padding_mask(n)):
        qkv, weight = inputs(n, dtype), torch.randn(2, 3, n, 8, dtype=dtype)
        want = with_gradients(op, qkv, weight, mask=mask, impl="reference")
        size = max(float(part.detach().norm()) for part in want)
        for got, part in zip(with_gradients(op, qkv, weight, mask=mask, impl="tiled"), want, strict=True):
            assert got.dtype == dtype
            assert float((got - part).detach().float().norm()) <= limit * max(float(part.detach().norm()), 1e-2 * size)


def assert_mask_equals_definition(case: Case, n: int) -> None:
    want = table(case.attends, n)
    assert torch.equal(case.mask(stop=n), want)
    assert torch.equal(case.mask(start=n - 3, stop=n - 1), want[n - 3 : n - 1, : n - 1])


def assert_every_implementation_equals_formula(case: Case) -> None:
    """Compare every implementation with attention one query at a time, under a padding mask."""
    for n in (3, 5, 6, 19, 47):
        q, k, v = (t.detach().double() for t in inputs(n, b=1))
        mask = padding_mask(n)[1:]
        allowed = table(case.attends, n) & mask
        want = attend_one_by_one(q, k, v, allowed.expand(1, 3, n, n), None, 8**-0.5)
        for impl in ("auto", "dense", "tiled", "reference"):
            assert relative_error(case.attention(q, k, v, mask=mask, impl=impl), want) < 1e-6
        if case.causal:  # otherwise the last query's keys may lie beyond the sequence
            for impl in ("auto", "gather"):
                last = case.attention(q[:, :, -1:], k, v, mask=mask, impl=impl)
                assert relative_error(last, want[:, :, -1:]) < 1e-6
        assert relative_error(case.attention(q[:, :, 2:], k, v, mask=mask), want[:, :, 2:]) < 1e-6
