"""Talking heads: the paper's formula, and the fast implementation against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import tiling
from attention_zoo.ops.talking_heads import (
    HeadMix,
    HeadMLP,
    diversity,
    head_mixing,
    mix_heads,
    talking_heads_attention,
    talking_heads_weights,
    tiled,
)
from attention_zoo.ops.tiling import QUERY_TILE
from tests.counting import largest_tensor
from tests.formulas import relative_error
from tests.ops.fast_code import forbid
from tests.ops.talking_heads.mixes import HEADS, inputs, make_mix, tensors_of


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_maps_are_mixed_at_every_pair_before_and_after_the_softmax(causal: bool, impl: str) -> None:
    q, k, v = inputs(7, 7, torch.float64)
    pre_softmax, post_softmax = make_mix("linear", torch.float64), make_mix("mlp", torch.float64)
    assert isinstance(pre_softmax, Tensor)
    assert isinstance(post_softmax, HeadMLP)
    want = torch.zeros(2, HEADS, 7, 5, dtype=torch.float64)
    for b in range(2):
        for i in range(7):
            keys = range(i + 1) if causal else range(7)
            scores = torch.stack([pre_softmax @ (q[b, :, i] * k[b, :, j]).sum(-1) * 8**-0.5 for j in keys], dim=1)
            for j, weights in zip(keys, scores.softmax(dim=1).unbind(1), strict=True):
                unit = weights / (weights.square().mean() + 1e-5).sqrt() * post_softmax.norm
                hidden = post_softmax.w1 @ unit
                mixed = weights + post_softmax.w2 @ (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
                want[b, :, i] += mixed[:, None] * v[b, :, j]
    got = talking_heads_attention(q, k, v, pre_softmax, post_softmax, causal=causal, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def with_gradients(impl: str, qkv: list[Tensor], mixes: list[HeadMix], weight: Tensor, **options: Any) -> list[Tensor]:
    out = talking_heads_attention(*qkv, *mixes, impl=impl, **options)
    return [out, *torch.autograd.grad((out * weight).sum(), [*qkv, *tensors_of(*mixes)])]


@pytest.mark.parametrize("kinds", [("linear", "linear"), ("mlp", "mlp"), ("linear", None), (None, "mlp"), (None, None)])
@pytest.mark.parametrize(
    ("i", "j"), [(1, 1), (QUERY_TILE - 1, QUERY_TILE - 1), (131, 131), (3, 67), (67, 131), (70, 67)]
)
@pytest.mark.parametrize("setting", ["causal", "causal, masked", "bidirectional", "bidirectional, masked"])
def test_tiled_implementation_equals_the_reference_in_outputs_and_gradients(
    kinds: tuple[str | None, ...], i: int, j: int, setting: str
) -> None:
    mixes = [make_mix(kind) for kind in kinds]
    mask = torch.rand(2, j) < 0.6 if "masked" in setting else None
    if mask is not None:
        mask[1] = False
    qkv, weight = inputs(i, j), torch.randn(2, HEADS, i, 5)
    got, want = (
        with_gradients(impl, qkv, mixes, weight, causal="causal" in setting, mask=mask)
        for impl in ("tiled", "reference")
    )
    for ours, theirs in zip(got, want, strict=True):
        assert ours.isfinite().all()
        assert relative_error(ours, theirs) < 2e-5 or (ours - theirs).abs().max() < 1e-6
    if mask is not None:  # no key is visible in the second row
        assert not got[0][1].any()
        assert not got[1][1].any()


@pytest.mark.parametrize("shape", [(2, HEADS, 67, 131), (1, 1, 67, 131), (2, 1, 1, 131), (1, HEADS, 67, 1)])
def test_mask_of_four_axes_masks_the_same_pairs_in_every_implementation(shape: tuple[int, ...]) -> None:
    qkv, weight = inputs(67, 131), torch.randn(2, HEADS, 67, 5)
    mixes, mask = [make_mix("linear"), make_mix("mlp")], torch.rand(shape) < 0.6
    got, want = (with_gradients(impl, qkv, mixes, weight, mask=mask) for impl in ("tiled", "reference"))
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_half_precision_output_is_near_float64_and_keeps_its_dtype(dtype: torch.dtype, impl: str) -> None:
    q, k, v = (t.detach().to(dtype) for t in inputs(131, 131))
    mixes = make_mix("linear"), make_mix("mlp")
    got = talking_heads_attention(q, k, v, *mixes, impl=impl)
    want = talking_heads_attention(q.double(), k.double(), v.double(), *mixes, impl="reference")
    assert got.dtype == dtype
    assert relative_error(got, want) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp", None])
def test_autocast_changes_neither_outputs_nor_gradients_of_the_tiled_implementation(kind: str | None) -> None:
    qkv, mixes, weight = inputs(131, 131), [make_mix(kind), make_mix(kind)], torch.randn(2, HEADS, 131, 5)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(with_gradients("tiled", qkv, mixes, weight))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-6


def test_dropout_drops_the_same_weights_in_backward_and_others_in_the_next_call() -> None:
    q, k, v = inputs(131, 131, torch.float64, batch=1)
    mixes = make_mix("linear", torch.float64), make_mix("linear", torch.float64)

    def run(v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return talking_heads_attention(q, k, v, *mixes, dropout=0.3)

    out = run(v)
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), v)
    step = torch.randn_like(v)
    slope = ((run(v + step) - out) * weight).sum()  # linear in v: exact if the same weights are dropped
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-8, atol=1e-8)
    assert not torch.equal(out, talking_heads_attention(q, k, v, *mixes, dropout=0.3))


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_dropout_keeps_the_mean_of_the_output(impl: str) -> None:
    q, k, v = (t.detach() for t in inputs(5, 5, batch=1))
    q, k, v = (t.expand(3000, -1, -1, -1) for t in (q, k, v))
    got = talking_heads_attention(q, k, v, None, None, dropout=0.4, impl=impl)
    want = talking_heads_attention(q[:1], k[:1], v[:1], None, None)
    torch.testing.assert_close(got.mean(0, keepdim=True), want, rtol=0, atol=0.12)


@pytest.mark.parametrize(("pre", "post"), [("linear", "mlp"), ("mlp", "linear"), (None, None)])
def test_reference_is_twice_differentiable_and_runs_no_fast_code(
    pre: str | None, post: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, head_mixing, tiled, diversity, tiling)
    q, k, v = (torch.randn(2, 2, 4, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    mixes = [make_mix(kind, torch.float64, heads=2) for kind in (pre, post)]
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    before = len(tensors_of(mixes[0]))

    def mix_of(parts: tuple[Tensor, ...]) -> HeadMix:
        return None if not parts else parts[0] if len(parts) == 1 else HeadMLP(*parts)

    def attend(q: Tensor, k: Tensor, v: Tensor, *parts: Tensor) -> Tensor:
        rebuilt = mix_of(parts[:before]), mix_of(parts[before:])
        return talking_heads_attention(q, k, v, *rebuilt, mask=mask, causal=True, impl="reference")

    leaves = (q, k, v, *tensors_of(*mixes))
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


def test_second_derivative_of_the_tiled_implementation_raises_and_names_the_reference() -> None:
    q, k, v = inputs(7, 7)
    out = talking_heads_attention(q, k, v, make_mix("linear"), None)
    (first,) = torch.autograd.grad(out.square().sum() + q.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention_zoo.reference\(\)"):
        first.square().sum().backward()


@pytest.mark.parametrize("n", [5, 67, 131])
def test_tiled_implementation_allocates_no_map_of_all_queries(n: int) -> None:
    q, k, v = inputs(n, n, batch=1)
    largest = largest_tensor(
        lambda: talking_heads_attention(q, k, v, make_mix("linear"), make_mix("linear")).sum().backward()
    )
    assert largest <= HEADS * max(min(n, QUERY_TILE) * n, n * 8)


def test_weights_mixed_after_the_softmax_multiply_the_values() -> None:
    q, k, v = inputs(7, 9)
    pre_softmax, post_softmax = make_mix("mlp"), make_mix("linear")
    mask = torch.rand(2, 9) < 0.6
    weights = talking_heads_weights(q, k, pre_softmax, mask=mask, causal=True, scale=0.3)
    want = mix_heads(weights, post_softmax) @ v
    got = talking_heads_attention(q, k, v, pre_softmax, post_softmax, mask=mask, causal=True, scale=0.3)
    assert relative_error(got, want) < 1e-5


def test_identity_mix_leaves_the_maps_unchanged() -> None:
    maps = torch.randn(2, HEADS, 3, 4)
    assert torch.equal(mix_heads(maps, None), maps)
    torch.testing.assert_close(mix_heads(maps, torch.eye(HEADS)), maps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pre_softmax": "linear"}, TypeError, "pre_softmax must be an .o, h. tensor, a HeadMLP or None, got str"),
        ({"post_softmax": (torch.ones(HEADS),) * 3}, TypeError, "post_softmax must be an .o, h. tensor.* got tuple"),
        ({"pre_softmax": torch.ones(2, 2)}, ValueError, "pre_softmax must mix the 6 heads"),
        (
            {"post_softmax": torch.eye(5)},
            ValueError,
            r"post_softmax must mix the 6 heads with shapes \[\(6, 6\)\], got \[\(5, 5\)\]",
        ),
        ({"pre_softmax": HeadMLP(1, 2, 3)}, TypeError, "pre_softmax must be a HeadMLP of tensors"),  # type: ignore[arg-type]
        ({"k": torch.randn(2, 3, 3, 8), "v": torch.randn(2, 3, 3, 5)}, ValueError, "k must have as many heads as q"),
        ({"dropout": 1.0}, ValueError, "dropout must lie in .0, 1., got dropout=1.0"),
        ({"impl": "blokcs"}, ValueError, "impl must be one of"),
    ],
)
def test_invalid_arguments_raise(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = inputs(3, 3)
    options: dict[str, Any] = {"q": q, "k": k, "v": v, "pre_softmax": None, "post_softmax": None, **changes}
    with pytest.raises(error, match=message):
        talking_heads_attention(**options)


@pytest.mark.parametrize("shape", [(2, HEADS, 67, 131), (1, 1, 67, 131), (2, 1, 1, 131), (1, HEADS, 67, 1)])
@pytest.mark.parametrize("kind", ["linear", "mlp", None])
@pytest.mark.parametrize("causal", [True, False])
def test_additive_mask_and_its_gradient_are_those_of_the_reference(
    causal: bool, kind: str | None, shape: tuple[int, ...]
) -> None:
    qkv, weight = inputs(67, 131), torch.randn(2, HEADS, 67, 5)
    mixes = [make_mix(kind), make_mix(kind)]
    added, hidden = torch.randn(shape, requires_grad=True), torch.rand(shape) < 0.3
    results = []
    for impl in ("tiled", "reference"):
        mask = added.masked_fill(hidden, -math.inf)
        out = talking_heads_attention(*qkv, *mixes, impl=impl, causal=causal, mask=mask)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [added, *qkv, *tensors_of(*mixes)])])
    for got, want in zip(*results, strict=True):  # a number for a whole row changes nothing: its gradient is 0
        assert relative_error(got, want) < 2e-5 or (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_additive_mask_in_bfloat16_is_near_float64(impl: str) -> None:
    q, k, v = (part.detach().bfloat16() for part in inputs(131, 131))
    mixes = make_mix("linear"), make_mix("mlp")
    mask = torch.randn(1, 1, 131, 131).bfloat16().masked_fill(torch.rand(131, 131) < 0.3, -math.inf)
    got = talking_heads_attention(q, k, v, *mixes, impl=impl, mask=mask)
    want = talking_heads_attention(q.double(), k.double(), v.double(), *mixes, impl="reference", mask=mask.double())
    assert relative_error(got, want) < 1e-2


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("kind", [None, "linear", "mlp"])
def test_a_nan_in_a_query_gives_nan_in_its_output(kind: str | None, impl: str) -> None:
    mixes = make_mix(kind), make_mix(kind)
    for i, j in [(1, 1), (1, 5), (7, 7), (3, 17)]:
        for causal in (False, True):
            q, k, v = (tensor.detach() for tensor in inputs(i, j))
            q[:, :, -1, 0] = torch.nan
            out = talking_heads_attention(q, k, v, *mixes, causal=causal, impl=impl)
            assert out[:, :, -1].isnan().all()
            assert not out[:, :, :-1].isnan().any()
