"""Cosine-sim attention: every implementation against a formula that computes one query at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attention_zoo
from attention_zoo.ops import DistanceBias, cosine_sim_attention, l2_normalize, tiling
from attention_zoo.ops.cosine_sim import fused_norm
from attention_zoo.ops.softmax import distance_bias, sdpa, tiled
from tests.formulas import allowed_pairs, attend_one_by_one, relative_error, unit_slices
from tests.ops.fast_code import forbid

FAST_CODE = (fused_norm, sdpa, tiled, distance_bias, tiling)
PATHS = ("auto", "reference", "sdpa", "tiled")
HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 3e-6, torch.float64: 1e-12}


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def slowly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float = 8.0,
    groups: int = 1,
) -> Tensor:
    """The definition, for (b, h, n, e) inputs in float64."""
    shape = (*q.shape[:3], k.shape[2])
    allowed = allowed_pairs(shape, mask=mask, causal=causal)
    unit = [unit_slices(x, groups, 1e-12) for x in (q, k)]
    return attend_one_by_one(*unit, v, allowed, None if bias is None else bias.expand(shape), scale)


def assert_same(got: Tensor, want: Tensor, inputs: list[Tensor], tolerance: float, message: object = None) -> None:
    """Outputs and all gradients agree."""
    assert relative_error(got, want) < tolerance, message
    cotangent = torch.randn(want.shape, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, inputs, cotangent.to(got.dtype))
    want_grads = torch.autograd.grad(want, inputs, cotangent.to(want.dtype), retain_graph=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert relative_error(got_grad, want_grad) < tolerance, message


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("groups", "scale", "kv_heads"), [(1, 8.0, 4), (2, 1.0, 2), (3, 10.0, 1)])
def test_every_path_equals_the_definition_with_all_options_combined(
    causal: bool, masked: bool, biased: bool, groups: int, scale: float, kv_heads: int
) -> None:
    inputs = leaves((2, 4, 5, 6), (2, kv_heads, 7, 6), (2, kv_heads, 7, 3), *([(4, 5, 7)] if biased else []))
    options = {
        "mask": torch.rand(2, 7) < 0.6 if masked else None,
        "causal": causal,
        "bias": inputs[3] if biased else None,
        "scale": scale,
        "groups": groups,
    }
    want = slowly(*inputs[:3], **options)
    for path in PATHS:
        assert_same(cosine_sim_attention(*inputs[:3], impl=path, **options), want, inputs, 1e-12, path)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_every_path_with_a_learned_scale_equals_the_definition_with_its_gradient(
    size: int, biased: bool, causal: bool
) -> None:
    shapes = [(2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3), (size,), *([(4, 5, 7)] if biased else [])]
    inputs = leaves(*shapes)
    options = {"mask": torch.rand(2, 7) < 0.6, "causal": causal, "bias": inputs[4] if biased else None}
    q, k, v, scale = inputs[:4]
    scale = 5 * scale
    unit_q, unit_k = (unit_slices(x, 1, 1e-12) for x in (q, k))
    scaled = torch.stack([unit_q[:, h] * scale[h % size] for h in range(4)], dim=1)
    allowed = allowed_pairs((2, 4, 5, 7), mask=options["mask"], causal=causal)
    bias = inputs[4].expand(2, 4, 5, 7) if biased else None
    want = attend_one_by_one(scaled, unit_k, v, allowed, bias, 1.0)
    for path in PATHS:
        got = cosine_sim_attention(q, k, v, scale=5 * inputs[3], impl=path, **options)
        assert_same(got, want, inputs, 1e-11, path)


@pytest.mark.parametrize("path", PATHS)
def test_a_learned_scale_is_applied_in_float32_to_half_precision_queries(path: str) -> None:
    q, k, v = (torch.randn(1, 2, 67, 8).bfloat16() for _ in range(3))
    scale = torch.tensor([19.97, 3.003])
    got = cosine_sim_attention(q, k, v, scale=scale, causal=True, impl=path)
    parts = [
        slowly(q[:, h : h + 1].double(), k[:, h : h + 1].double(), v[:, h : h + 1].double(), causal=True, scale=size)
        for h, size in enumerate(scale.tolist())
    ]
    assert got.dtype == torch.bfloat16
    assert relative_error(got, torch.cat(parts, dim=1)) < 2e-2


def test_the_reference_with_a_learned_scale_is_twice_differentiable() -> None:
    inputs = leaves((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3), (2,))

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return cosine_sim_attention(q, k, v, causal=True, scale=scale, impl="reference")

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


def test_packed_documents_have_the_learned_scale() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    scale, ids = torch.tensor([3.0, 12.0]), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    got = cosine_sim_attention(q, k, v, causal=True, scale=scale, document_ids=ids)
    parts = [(q[:, :, part], k[:, :, part], v[:, :, part]) for part in (slice(0, 4), slice(4, 9))]
    want = torch.cat([cosine_sim_attention(*part, causal=True, scale=scale) for part in parts], dim=2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_keys_and_values_without_a_head_axis_are_shared_by_all_heads(path: str) -> None:
    inputs = leaves((2, 3, 5, 8), (2, 7, 8), (2, 7, 4))
    q, k, v = inputs
    mask = torch.rand(2, 7) < 0.6
    got = cosine_sim_attention(q, k, v, mask=mask, causal=True, impl=path)
    assert_same(got, slowly(q, k[:, None], v[:, None], mask=mask, causal=True), inputs, 1e-12)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("bias_shape", [None, (5, 7), (1, 5, 7), (6, 5, 7), (6, 1, 7)])
def test_inputs_may_have_batch_and_heads_merged(path: str, bias_shape: tuple[int, ...] | None) -> None:
    inputs = leaves((6, 5, 8), (6, 7, 8), (6, 7, 3), *([bias_shape] if bias_shape else []))
    q, k, v = inputs[:3]
    bias = inputs[3] if bias_shape else None
    mask = torch.rand(6, 7) < 0.6
    got = cosine_sim_attention(q, k, v, mask=mask, causal=True, bias=bias, groups=2, impl=path)
    spread = None if bias is None else bias.expand(6, 5, 7)[:, None]
    want = slowly(q[:, None], k[:, None], v[:, None], mask=mask, causal=True, bias=spread, groups=2)[:, 0]
    assert got.shape == (6, 5, 3)
    assert_same(got, want, inputs, 1e-12)


def test_a_bias_may_differ_between_batch_rows() -> None:
    inputs = leaves((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 5, 7))
    got = cosine_sim_attention(*inputs[:3], bias=inputs[3])
    assert_same(got, slowly(*inputs[:3], bias=inputs[3]), inputs, 1e-12)


@pytest.mark.parametrize(("i", "j"), [(131, 131), (1, 512), (1, 523), (67, 523)])
def test_causal_attention_is_right_beyond_512_keys_in_every_dtype(i: int, j: int) -> None:
    # rounded to the coarsest dtype first, so that all dtypes start from the same numbers
    inputs = [torch.randn(1, h, n, 8).bfloat16().double().requires_grad_() for h, n in ((2, i), (1, j), (1, j))]
    want = slowly(*inputs, causal=True)
    cotangent = torch.randn_like(want).bfloat16()
    want_grads = torch.autograd.grad(want, inputs, cotangent.double())
    for dtype, tolerance in TOLERANCE.items():
        coarse = [leaf.detach().to(dtype).requires_grad_() for leaf in inputs]
        for path in PATHS:
            got = cosine_sim_attention(*coarse, causal=True, impl=path)
            assert got.dtype == dtype
            assert relative_error(got, want) < tolerance, (path, dtype)
            grads = torch.autograd.grad(got, coarse, cotangent.to(dtype))
            for grad, want_grad in zip(grads, want_grads, strict=True):
                assert relative_error(grad, want_grad) < 1.5 * tolerance, (path, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_query_without_an_allowed_key_gets_exactly_zero_and_no_gradient(path: str, dtype: torch.dtype) -> None:
    inputs = leaves((2, 2, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8), dtype=dtype)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    mask[1] = False
    out = cosine_sim_attention(*inputs, mask=mask, causal=True, impl=path)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert not out[0, :, :3].any()
    assert not out[1].any()
    assert out[0, :, 3:].any(-1).all()
    for grad in grads:
        assert not grad[0, :, :3].any()
        assert not grad[1].any()
        assert grad.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_a_query_of_zeros_attends_uniformly_with_finite_gradients(path: str, dtype: torch.dtype) -> None:
    q, k, v = leaves((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), dtype=dtype)
    q = q.detach().clone()
    q[:, :, 2] = 0
    q.requires_grad_()
    out = cosine_sim_attention(q, k, v, impl=path)
    out.float().mean().backward()
    assert relative_error(out[:, :, 2], v.double().mean(2)) < max(1e-6, torch.finfo(dtype).eps)
    for leaf in (q, k, v):
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("groups", "bias"), [(16, 0.0), (64, 0.0), (1, 90.0), (1, -90.0)])
def test_many_groups_and_a_large_bias_do_not_overflow(path: str, groups: int, bias: float) -> None:
    q, k, v = (torch.randn(1, 2, 5, 64) for _ in range(3))
    pairs = bias + torch.randn(2, 5, 5)
    got = cosine_sim_attention(q, k, v, causal=True, groups=groups, scale=10.0, bias=pairs, impl=path)
    want = slowly(q.double(), k.double(), v.double(), causal=True, groups=groups, scale=10.0, bias=pairs.double())
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_neither_dtype_nor_precision(path: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    want = cosine_sim_attention(q, k, v, causal=True, impl=path)
    with torch.autocast("cpu", torch.bfloat16):
        got = cosine_sim_attention(q, k, v, causal=True, impl=path)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_inputs_are_not_modified() -> None:
    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    before = [tensor.clone() for tensor in tensors]
    cosine_sim_attention(*tensors, causal=True)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("forced_by", ["impl", "context"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_is_twice_differentiable_and_runs_no_fast_code(
    forced_by: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, *FAST_CODE)
    inputs = leaves((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3), *([(2, 3, 5)] if biased else []))
    mask = torch.tensor([[True, False, True, True, True]])

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        impl = "reference" if forced_by == "impl" else "auto"
        return cosine_sim_attention(q, k, v, mask=mask, causal=True, bias=bias, groups=2, scale=2.0, impl=impl)

    def checked() -> bool:
        options = {"fast_mode": True}
        return torch.autograd.gradcheck(attend, inputs, **options) and torch.autograd.gradgradcheck(
            attend, inputs, **options
        )

    if forced_by == "impl":
        assert checked()
    else:
        with attention_zoo.reference():
            assert checked()


def test_the_reference_of_l2_normalize_is_twice_differentiable_and_runs_no_fast_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid(monkeypatch, *FAST_CODE)
    (x,) = leaves((2, 3, 6))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: l2_normalize(x, groups=2, impl="reference"), x)
    for impl in ("auto", "fused"):
        with pytest.raises(AssertionError, match="fast code ran"):
            l2_normalize(x, impl=impl)


@pytest.mark.parametrize("path", ["auto", "sdpa", "tiled"])
def test_fast_implementations_run_fast_code(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, *FAST_CODE)
    with pytest.raises(AssertionError, match="fast code ran"):
        cosine_sim_attention(*leaves((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 3)), impl=path)


@pytest.mark.parametrize("path", ["auto", "sdpa", "tiled"])
def test_a_second_derivative_on_a_fast_path_is_right_or_raises(path: str) -> None:
    inputs = leaves((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3))

    def attend(*qkv: Tensor) -> Tensor:
        return cosine_sim_attention(*qkv, causal=True, impl=path)

    try:
        assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)
    except RuntimeError as error:
        message = str(error)
        assert "derivative for aten::_scaled_dot_product" in message or "differentiate twice" in message


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_every_path_compiles_as_one_graph(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "QUERY_TILE", 3)
    inputs = leaves((2, 2, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3), (2, 5, 7))
    mask = torch.rand(2, 7) < 0.6

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return cosine_sim_attention(q, k, v, mask=mask, causal=True, bias=bias, groups=2, impl=path)

    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs)
    assert_same(got, attend(*inputs), inputs, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("groups", [1, 3])
def test_l2_normalize_divides_every_slice_by_its_norm(groups: int, impl: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 12).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, want = l2_normalize(x, groups=groups, impl=impl), unit_slices(wide, groups, 1e-12)
    cotangent = torch.randn(out.shape).to(dtype)
    (grad,) = torch.autograd.grad(out, x, cotangent)
    (want_grad,) = torch.autograd.grad(want, wide, cotangent.double())
    assert out.dtype == dtype
    assert relative_error(out, want) < TOLERANCE[dtype]
    assert relative_error(grad, want_grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_l2_normalize_divides_a_row_shorter_than_eps_by_eps(impl: str) -> None:
    x = torch.tensor([[3e-3, 4e-3], [0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    out = l2_normalize(x, eps=0.1, impl=impl)
    out.sum().backward()
    torch.testing.assert_close(out, torch.tensor([[3e-2, 4e-2], [0.0, 0.0], [0.6, 0.8]]))
    # (g - u (u . g)) / ||x|| for the long row, g / eps for the short ones
    torch.testing.assert_close(x.grad, torch.tensor([[10.0, 10.0], [10.0, 10.0], [0.16 / 5, -0.12 / 5]]))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_l2_normalize_keeps_a_row_of_zeros_with_a_finite_gradient(dtype: torch.dtype, impl: str) -> None:
    x = torch.zeros(2, 3, 64, dtype=dtype, requires_grad=True)
    out = l2_normalize(x, impl=impl)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_l2_normalize_does_not_overflow_in_float16(impl: str) -> None:
    x = torch.full((1, 64), 6e4, dtype=torch.float16, requires_grad=True)
    assert relative_error(l2_normalize(x, impl=impl), torch.full((1, 64), 1 / 8)) < 1e-3


BAD = {
    "groups": ({"groups": 3}, ValueError, r"groups must divide the features of a head, got groups=3 and 8 features"),
    "groups as a float": ({"groups": 2.0}, TypeError, "groups must be an int, got groups=2.0"),
    "no groups": ({"groups": 0}, ValueError, r"groups must divide .*got groups=0"),
    "q of two axes": ({"q": torch.zeros(5, 8)}, ValueError, r"q must be \(b, h, n, e\)"),
    "merged q beside heads": ({"q": torch.zeros(8, 5, 8)}, ValueError, r"k must have 3 axes where q has 3"),
    "features": ({"k": torch.zeros(2, 4, 7, 6)}, ValueError, r"same number of features, got 8 and 6"),
    "mask": ({"mask": torch.zeros(2, 5).bool()}, ValueError, r"mask must be .*got shape \(2, 5\)"),
    "mask dtype": ({"mask": torch.zeros(2, 7)}, TypeError, r"mask must be a boolean tensor"),
    "a merged bias beside heads": ({"bias": torch.zeros(2, 5, 7)}, ValueError, r"bias must broadcast to .*\(2, 5, 7\)"),
    "scale per key": (
        {"scale": torch.ones(7)},
        ValueError,
        r"scale must be \(1,\) or \(h,\) with h = 4, got shape \(7,\)",
    ),
    "integer scale": ({"scale": torch.ones(4).int()}, TypeError, "scale must be a floating point tensor"),
    "impl": ({"impl": "cuda"}, ValueError, r"impl must be one of .*got impl='cuda'"),
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_an_error_names_the_argument_that_does_not_fit(case: str, impl: str) -> None:
    changes, error, message = BAD[case]
    arguments = {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 4, 7, 8), "v": torch.zeros(2, 4, 7, 8), **changes}
    with pytest.raises(error, match=message):
        cosine_sim_attention(**{"impl": impl, **arguments})


@pytest.mark.parametrize("path", PATHS)
def test_cosine_sim_attention_accepts_a_distance_bias(path: str) -> None:
    inputs = leaves((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (3, 11))
    bias = DistanceBias(inputs[3])
    got = cosine_sim_attention(*inputs[:3], bias=bias, causal=True, impl=path)
    assert_same(got, slowly(*inputs[:3], bias=bias.pairs(5, 7), causal=True), inputs, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", PATHS)
def test_a_nan_in_a_query_gives_nan_in_its_output(impl: str, dtype: torch.dtype) -> None:
    for i, j in [(1, 1), (1, 5), (7, 7), (3, 15), (17, 17)]:
        q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (i, j, j))
        q[:, :, -1, 0] = torch.nan
        out = cosine_sim_attention(q, k, v, impl=impl)
        assert out[:, :, -1].isnan().all()
        assert not out[:, :, :-1].isnan().any()


def test_an_invalid_eps_raises_and_is_named() -> None:
    for eps, error in ((-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="eps must"):
            l2_normalize(torch.ones(2, 4), eps=eps)
        with pytest.raises(error, match="eps must"):
            cosine_sim_attention(*(torch.ones(1, 1, 3, 4) for _ in range(3)), eps=eps, impl="reference")
