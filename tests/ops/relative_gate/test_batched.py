"""Relative gates as batched matrix products, and with cached keys, against the definition token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import relative_gate
from attention_zoo.ops.gate_loop import unit_gate
from attention_zoo.ops.relative_gate import (
    CHUNK,
    cached_relative_gate_attention,
    extend,
    no_keys,
    relative_gate_attention,
    relative_gate_weights,
)
from tests.counting import SYNCHRONISING, operators_of
from tests.formulas import relative_error


def make(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and gates; some gates are 0, tiny or 1."""
    q, k, v = (torch.randn(2, 2, n, 6, dtype=dtype) for n in (queries, keys, keys))
    gate = unit_gate(torch.randn(2, 2, keys, 3, 2, dtype=dtype))
    gate[:, :, 2 * keys // 3 :] /= gate[:, :, 2 * keys // 3 :].abs()
    gate[:, :, keys // 2] = 0
    gate[:, :, keys // 3] *= 1e-12
    return [t.requires_grad_() for t in (q, k, v, gate)]


def by_definition(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None, softmax: bool) -> Tensor:
    """Query by query, with the products of gates from the query back to every key."""
    outs, e = [], q.shape[3]
    for i in range(k.shape[2] - q.shape[2], k.shape[2]):
        product, scores = torch.ones_like(gate[:, :, 0]), []
        for j in range(i, -1, -1):
            pairs = (q[:, :, i - k.shape[2]] * k[:, :, j]).unflatten(-1, (-1, 2)).sum(-1)
            scores.insert(0, (pairs * product.real).sum(-1) / e**0.5)
            product = product * gate[:, :, j]
        weights = torch.stack(scores, dim=-1)
        allowed = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask[:, None, : i + 1]
        if softmax:
            weights = weights.masked_fill(~allowed, -1e9)
            weights = (weights - weights.amax(-1, keepdim=True)).exp() * allowed
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        outs.append((weights * allowed)[:, :, None] @ v[:, :, : i + 1])
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 2), (8, 8), (9, 9), (7, 17), (1, 33), (40, 40)])
def test_batched_products_equal_the_definition_in_outputs_and_gradients(queries: int, keys: int, softmax: bool) -> None:
    leaves, mask = make(queries, keys), torch.rand(2, keys) < 0.7
    weight = torch.randn(2, 2, queries, 6, dtype=torch.float64)
    for given in (None, mask):
        gate = leaves[3] if given is None else leaves[3].masked_fill(~given[:, None, :, None], 1.0)
        want = by_definition(*leaves[:3], gate, given, softmax)
        got = relative_gate_attention(*leaves, mask=given, softmax=softmax, impl="batched")
        found = [
            (out, *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)) for out in (want, got)
        ]
        for first, second in zip(*found, strict=True):
            error, size = (float(t.detach().abs().max()) for t in (first - second, first))
            assert error < 1e-12 * max(1.0, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_batched_products_equal_tiles_in_lower_precision(dtype: torch.dtype, masked: bool) -> None:
    q, k, v = (torch.randn(2, 2, 150, 8).to(dtype).requires_grad_() for _ in range(3))
    gate = unit_gate(torch.randn(2, 2, 150, 4, 2)).requires_grad_()
    mask = torch.rand(2, 150) < 0.7 if masked else None
    weight, found = torch.randn(2, 2, 150, 8), []
    for impl in ("tiled", "batched"):
        out = relative_gate_attention(q, k, v, gate, mask=mask, impl=impl)
        assert out.dtype == dtype
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v, gate))])
    for got, want in zip(*found, strict=True):
        got, want = (torch.view_as_real(t) if t.is_complex() else t for t in (got, want))
        assert relative_error(got.double(), want.double()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_second_derivatives_of_batched_products_are_right() -> None:
    q, k, v, gate = (t.detach()[:1, :1].requires_grad_() for t in make(11, 11))
    run = lambda *leaves: relative_gate_attention(*leaves, impl="batched")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (q, k, v, gate), fast_mode=True)


def test_dropout_drops_weights_and_backward_has_the_masks_of_forward() -> None:
    q, k, v, gate = make(20, 20)

    def run(*leaves: Tensor) -> Tensor:
        torch.manual_seed(3)
        return relative_gate_attention(*leaves, gate.detach(), dropout=0.3, impl="batched")

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)
    assert not bool(relative_gate_attention(q, k, v, gate, dropout=1.0, impl="batched").any())


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cached_keys_give_the_definition_over_any_split(dtype: torch.dtype, softmax: bool) -> None:
    q, k, v, gate = (t.detach() for t in make(3 * CHUNK, 3 * CHUNK, dtype))
    want = by_definition(*(t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (q, k, v, gate)),
                         None, softmax)  # fmt: skip
    for split in ([1] * 3 * CHUNK, [CHUNK - 1, 1, 1, CHUNK, 5, 1, CHUNK - 7], [2 * CHUNK + 3, CHUNK - 3]):
        cache, outs, start = no_keys(k, v, gate), [], 0
        for size in split:
            new = [t[:, :, start : start + size] for t in (q, k, v, gate)]
            outs.append(cached_relative_gate_attention(*new, cache, None, softmax, 0.0))
            after, start = extend(cache, *new[1:]), start + size
            keys, values = torch.cat((cache.keys, after.keys), 1), torch.cat((cache.values, after.values), 1)
            cache = after._replace(keys=keys, values=values)
        assert relative_error(torch.cat(outs, 2).double(), want) < (1e-12 if dtype == torch.float64 else 1e-6)


def count(run: Callable[[], object]) -> int:
    names = operators_of(run)
    assert not set(names) & set(SYNCHRONISING)
    return len(names)


def test_operators_on_other_devices_grow_with_the_logarithm_of_the_length_and_those_of_steps_do_not() -> None:
    def train(n: int) -> int:
        q, k, v = (torch.zeros(1, 1, n, 4, device="meta", requires_grad=True) for _ in range(3))
        gate = torch.zeros(1, 1, n, 2, dtype=torch.complex64, device="meta", requires_grad=True)
        mask = torch.ones(1, n, dtype=torch.bool, device="meta")
        run = lambda: relative_gate_attention(q, k, v, gate, mask=mask).sum().backward()  # noqa: E731
        return count(run)

    counts = [train(n) for n in (512, 1024, 2048)]
    assert counts[2] - counts[1] == counts[1] - counts[0] < 100
    assert counts[2] < 1000

    def decode(n: int) -> int:
        k = torch.zeros(1, 1, n, 4, device="meta")
        gate = torch.zeros(1, 1, n, 2, dtype=torch.complex64, device="meta")
        cache, new, one = extend(no_keys(k, k, gate), k, k, gate), k[:, :, :1], gate[:, :, :1]

        def run() -> None:
            cached_relative_gate_attention(new, new, new, one, cache, None, True, 0.0)
            extend(cache, new, new, one)

        return count(run)

    assert decode(CHUNK) == decode(100 * CHUNK) < 100


def test_weights_of_batched_products_equal_those_of_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _, gate = (t.detach() for t in make(21, 21))
    want = relative_gate_weights(q, k, gate)
    monkeypatch.setattr(relative_gate, "_fast_impl", lambda impl, q: "batched")
    assert relative_error(relative_gate_weights(q, k, gate), want) < 1e-12
