"""Softmax attention as on devices other than the CPU: the same code, with the choice by device patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import DistanceBias, softmax_attention, tiling
from attention_zoo.ops.softmax.bias import sum_by_distance
from tests.counting import check_no_synchronisation, count_operators
from tests.formulas import allowed_pairs, attend_one_by_one, bias_of_pairs, relative_error


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loops over tiles."""
    monkeypatch.setattr(tiling, "prefers_tiles", lambda x: False)


def inputs(i: int, j: int, dtype: torch.dtype = torch.float64, kv_heads: int = 2) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(2, 2, i, 4), torch.randn(2, kv_heads, j, 4), torch.randn(2, kv_heads, j, 4)
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v, 3 * torch.randn(2, i + j - 1)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 5), (1, 6), (3, 9), (6, 3)], ids=str)
def test_a_distance_bias_equals_attention_one_query_at_a_time(
    sizes: tuple[int, int], padded: bool, causal: bool
) -> None:
    q, k, v, values = inputs(*sizes)
    mask = torch.rand(2, sizes[1]) < 0.6 if padded else None
    allowed = allowed_pairs((2, 2, *sizes), mask=mask, causal=causal)
    found = []
    for out in (
        softmax_attention(q, k, v, mask=mask, causal=causal, bias=DistanceBias(values)),
        attend_one_by_one(q, k, v, allowed, bias_of_pairs(values, *sizes).expand(2, -1, -1, -1), 0.5),
    ):
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        gradients = torch.autograd.grad((out * weight).sum(), [q, k, v, values], allow_unused=True)
        found.append([out, *(torch.zeros_like(q) if g is None else g for g in gradients)])
    for got, want in zip(*found, strict=True):
        if want.any() or got.any():
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_the_gradient_of_a_distance_bias_is_summed_in_float32(impl: str) -> None:
    n = 300
    q, k, v, values = inputs(n, n, torch.bfloat16)
    values = values.detach().float().requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, values)]
    weight = torch.rand(2, 2, n, 4)

    def gradient(q: Tensor, k: Tensor, v: Tensor, values: Tensor, impl: str) -> Tensor:
        out = softmax_attention(q, k, v, causal=True, bias=DistanceBias(values), impl=impl)
        return torch.autograd.grad((out * weight).sum(), values)[0]

    got = gradient(q, k, v, values, impl)
    assert got.dtype == torch.float32
    assert relative_error(got, gradient(*wide, "reference")) < 2e-2


def test_the_pairs_of_a_distance_are_counted_exactly_in_float32() -> None:
    n = 300  # 257 is no bfloat16 number
    counts = sum_by_distance(torch.ones(1, n, n, dtype=torch.bfloat16), torch.float32)[0]
    assert counts.tolist() == [*range(1, n + 1), *range(n - 1, 0, -1)]


def test_no_row_of_a_mask_is_empty_because_kernels_differ_in_what_they_return(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, values = inputs(5, 5)
    mask = torch.tensor([[False, False, True, True, True], [False] * 5])
    attend, given = torch.nn.functional.scaled_dot_product_attention, []

    def record(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, *args: object, **options: Any) -> Tensor:
        given.append(attn_mask.expand(2, -1, 5, 5))
        return attend(q, k, v, attn_mask, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    for bias in (None, DistanceBias(values), bias_of_pairs(values, 5, 5)):
        softmax_attention(q, k, v, mask=mask, causal=True, bias=bias)
    assert len(given) == 3
    assert all(bool(part.isfinite().any(-1).all()) for part in given)


def test_a_large_distance_bias_keeps_its_precision_in_half_precision() -> None:
    n = 300
    q, k, v, _ = (x.detach() for x in inputs(n, n, torch.bfloat16))
    values = torch.linspace(-n, n, 2 * n - 1).expand(2, -1)  # a slope that rises towards later keys, which are masked
    got = softmax_attention(q, k, v, causal=True, bias=DistanceBias(values))
    want = softmax_attention(q.double(), k.double(), v.double(), causal=True, bias=DistanceBias(values.double()))
    assert relative_error(got, want) < 2e-2


def test_a_query_without_a_key_gets_zero_and_zero_gradient() -> None:
    q, k, v, values = inputs(5, 5)
    mask = torch.tensor([[False, False, True, True, True], [False] * 5])
    for bias in (None, DistanceBias(values), bias_of_pairs(values, 5, 5)):
        out = softmax_attention(q, k, v, mask=mask, causal=True, bias=bias)
        empty = out[0, :, :2].sum() + out[1].sum()
        assert not empty.detach().any()
        for gradient in torch.autograd.grad(out[0, :, :2].sum() + out[1].sum(), [q, k, v], retain_graph=True):
            assert not gradient.any()


@pytest.mark.parametrize("kind", ["no bias", "distance", "pairs"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_number_of_operators_does_not_depend_on_the_length(kind: str, padded: bool) -> None:
    counts = set()
    for n in (64, 256, 1024):
        q, k, v, values = (torch.empty_like(x, device="meta", requires_grad=True) for x in inputs(n, n))
        bias = {"no bias": None, "distance": DistanceBias(values), "pairs": values[:, :n].unsqueeze(1)}[kind]
        mask = torch.ones(2, n, dtype=torch.bool, device="meta") if padded else None

        def train() -> None:
            out = softmax_attention(q, k, v, mask=mask, causal=True, bias=bias)  # noqa: B023
            out.backward(out)

        check_no_synchronisation(train)
        counts.add(count_operators(train))
    assert len(counts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_a_compiled_distance_bias_equals_the_eager_one(causal: bool) -> None:
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    for n in (5, 9, 17):
        q, k, v, values = inputs(n, n)
        found = []
        for attend in (compiled, softmax_attention):
            out = attend(q, k, v, causal=causal, bias=DistanceBias(values))
            found.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, values])])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
    torch.compiler.reset()
