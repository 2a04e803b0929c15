"""Softmax attention: every implementation against a formula that computes one query at a time."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import attention_zoo
from attention_zoo.ops import (
    DistanceBias,
    cosine_sim_attention,
    softmax_attention,
    softmax_attention_weights,
    talking_heads_attention,
    tiling,
)
from attention_zoo.ops.softmax import distance_bias, sdpa, tiled
from tests.formulas import allowed_pairs, attend_one_by_one, bias_of_pairs, relative_error
from tests.ops.fast_code import forbid

FAST_CODE = (sdpa, tiled, distance_bias, tiling)
PATHS = ("reference", "sdpa", "tiled")
B, H, KV, E, EV = 2, 4, 2, 6, 3
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query tiles of three, so that small inputs cross tile boundaries."""
    monkeypatch.setattr(tiled, "QUERY_TILE", 3)
    monkeypatch.setattr(distance_bias, "QUERY_TILE", 3)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(out: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs, cotangent.to(out.dtype)))


MASKS = {
    "none": lambda i, j: None,
    "padding": lambda i, j: torch.cat((torch.rand(1, j) < 0.6, torch.zeros(1, j, dtype=torch.bool))),
    "pairs": lambda i, j: torch.rand(B, H, i, j) < 0.5,
    "keys of a row": lambda i, j: torch.rand(B, 1, 1, j) < 0.5,
    "queries": lambda i, j: torch.rand(1, 1, i, 1) < 0.5,
}
BIASES = {
    "none": None,
    "distance": lambda i, j: (H, i + j - 1),
    "(i, j)": lambda i, j: (i, j),
    "(h, i, j)": lambda i, j: (H, i, j),
    "(b, 1, i, j)": lambda i, j: (B, 1, i, j),
    "(1, h, 1, j)": lambda i, j: (1, H, 1, j),
    "(b, h, i, 1)": lambda i, j: (B, H, i, 1),
}


@cache
def problem(mask_kind: str, bias_kind: str, causal: bool, i: int, j: int):
    """Inputs, mask, output, cotangent and gradients by the formula."""
    torch.manual_seed(i)
    q, k, v = leaves((B, H, i, E), (B, KV, j, E), (B, KV, j, EV))
    mask = MASKS[mask_kind](i, j)
    bias = None if bias_kind == "none" else leaves(BIASES[bias_kind](i, j))[0]
    pairs = bias
    if bias_kind == "distance":
        pairs = bias_of_pairs(bias, i, j)
    allowed = allowed_pairs((B, H, i, j), mask=mask, causal=causal)
    want = attend_one_by_one(q, k, v, allowed, None if bias is None else pairs.expand(B, H, i, j), E**-0.5)
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    cotangent = torch.randn_like(want)
    return inputs, mask, want.detach(), cotangent, gradients(want, inputs, cotangent)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("i", "j"), [(5, 7), (11, 5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_output_and_gradients_equal_the_formula_on_every_path(
    mask_kind: str, bias_kind: str, causal: bool, i: int, j: int
) -> None:
    inputs, mask, want, cotangent, want_grads = problem(mask_kind, bias_kind, causal, i, j)
    bias = inputs[3] if len(inputs) == 4 else None
    bias = DistanceBias(bias) if bias_kind == "distance" else bias
    for path in (*PATHS, "auto"):
        out = softmax_attention(*inputs[:3], mask=mask, causal=causal, bias=bias, impl=path)
        # absolute tolerance: 0 is expected without an allowed key
        torch.testing.assert_close(out, want, atol=1e-12, rtol=0, msg=lambda text, path=path: f"{path}: {text}")
        for got, want_grad in zip(gradients(out, inputs, cotangent), want_grads, strict=True):
            torch.testing.assert_close(got, want_grad, atol=1e-11, rtol=0, msg=lambda t, path=path: f"{path}: {t}")


TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize(
    ("i", "j"),
    [
        (131, 131),
        (1, 521),
        pytest.param(67, 521, marks=pytest.mark.slow),
        pytest.param(149, 131, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_every_path_equals_the_formula_across_tile_boundaries_in_every_dtype(
    i: int, j: int, masked: bool, biased: bool
) -> None:
    mask = (torch.rand(1, j) < 0.7) if masked else None
    wide = leaves((1, 2, i, 8), (1, 1, j, 8), (1, 1, j, 8), *([(2, i + j - 1)] if biased else []))
    # rounded to the coarsest dtype first, so that all dtypes start from the same numbers
    wide = [leaf.detach().bfloat16().double().requires_grad_() for leaf in wide]
    pairs = bias_of_pairs(wide[3], i, j)[None] if biased else None
    want = attend_one_by_one(*wide[:3], allowed_pairs((1, 2, i, j), mask=mask, causal=True), pairs, 8**-0.5)
    cotangent = torch.randn_like(want).bfloat16().double()
    want_grads = gradients(want, wide, cotangent)
    for dtype, tolerance in TOLERANCE.items():
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in wide]
        for path in PATHS:
            bias = DistanceBias(inputs[3]) if biased else None
            out = softmax_attention(*inputs[:3], mask=mask, causal=True, bias=bias, impl=path)
            assert out.dtype == dtype
            assert relative_error(out, want) < tolerance, (path, dtype)
            for got, want_grad in zip(gradients(out, inputs, cotangent), want_grads, strict=True):
                assert relative_error(got, want_grad) < tolerance, (path, dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("bias_kind", ["none", "distance", "(h, i, j)"])
@pytest.mark.parametrize("path", PATHS)
def test_a_query_without_an_allowed_key_gets_exactly_zero_and_no_gradient(
    path: str, bias_kind: str, dtype: torch.dtype
) -> None:
    i, j = 11, 7
    q, k, v = leaves((B, H, i, E), (B, KV, j, E), (B, KV, j, EV), dtype=dtype)
    bias = None if bias_kind == "none" else 50 * torch.randn(BIASES[bias_kind](i, j))
    bias = DistanceBias(bias) if bias_kind == "distance" else bias
    mask = torch.ones(B, j, dtype=torch.bool)
    mask[0, :2] = False
    mask[1] = False
    out = softmax_attention(q, k, v, mask=mask, causal=True, bias=bias, impl=path)
    grads = gradients(out, [q, k, v], torch.ones_like(out))
    # in batch row 0 four queries precede all keys, and two more the first valid key
    assert not out[0, :, :6].any()
    assert not out[1].any()
    assert out[0, :, 6:].any(-1).all()
    assert not grads[0][0, :, :6].any()
    for grad in grads:
        assert not grad[1].any()
        assert grad.isfinite().all()
    for grad in grads[1:]:
        assert not grad[0, :, :2].any()


@pytest.mark.parametrize("path", PATHS)
def test_the_content_of_masked_keys_never_changes_the_output(path: str) -> None:
    q, k, v = leaves((1, 2, 5, E), (1, 2, 7, E), (1, 2, 7, E), dtype=torch.float32)
    mask = torch.tensor([[True, False, True, True, False, True, True]])
    changed = [leaf.detach().masked_fill(~mask[:, None, :, None], 1e30) for leaf in (k, v)]
    want = softmax_attention(q, k, v, mask=mask, impl=path)
    assert torch.equal(softmax_attention(q, *changed, mask=mask, impl=path), want)


@pytest.mark.parametrize("path", PATHS)
def test_inputs_are_not_modified_and_may_have_any_strides(path: str) -> None:
    q, k, v = (torch.randn(2, n, 3, 8).transpose(1, 2) for n in (5, 7, 7))
    bias, mask = torch.randn(7, 5).t(), torch.rand(2, 7) < 0.7
    before = [tensor.clone() for tensor in (q, k, v, bias, mask)]
    got = softmax_attention(q, k, v, mask=mask, bias=bias, causal=True, impl=path)
    want = softmax_attention(*(t.contiguous() for t in (q, k, v)), mask=mask, bias=bias, causal=True, impl=path)
    assert relative_error(got, want) < 1e-6
    for tensor, old in zip((q, k, v, bias, mask), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [90.0, 1e5])
def test_a_large_bias_does_not_reduce_accuracy_in_half_precision(size: float, dtype: torch.dtype, path: str) -> None:
    q, k, v = (torch.randn(2, 3, 13, 8).to(dtype) for _ in range(3))
    mask, bias = torch.rand(2, 13) < 0.8, size + torch.randn(3, 13, 13)
    out = softmax_attention(q, k, v, mask=mask, bias=bias, causal=True, impl=path)
    allowed = allowed_pairs((2, 3, 13, 13), mask=mask, causal=True)
    want = attend_one_by_one(q.double(), k.double(), v.double(), allowed, bias.double().expand(2, 3, 13, 13), 8**-0.5)
    assert relative_error(out, want) < 5e-3


@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize("biased", [False, True])
def test_autocast_changes_neither_dtype_nor_precision(path: str, biased: bool) -> None:
    inputs = leaves((1, 2, 7, 8), (1, 2, 7, 8), (1, 2, 7, 8), *([(2, 7, 7)] if biased else []), dtype=torch.float32)
    bias = inputs[3] if biased else None
    want = softmax_attention(*inputs[:3], bias=bias, causal=True, impl=path)
    want_grads = gradients(want, inputs, torch.ones_like(want))
    with torch.autocast("cpu", torch.bfloat16):
        got = softmax_attention(*inputs[:3], bias=bias, causal=True, impl=path)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    for got_grad, want_grad in zip(gradients(got, inputs, torch.ones_like(got)), want_grads, strict=True):
        assert torch.equal(got_grad, want_grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_weights_times_values_give_the_output(causal: bool, biased: bool) -> None:
    q, k, v = leaves((B, H, 7, E), (B, KV, 11, E), (B, KV, 11, EV))
    mask, bias = torch.rand(B, 11) < 0.6, torch.randn(H, 7, 11) if biased else None
    weights = softmax_attention_weights(q, k, mask=mask, causal=causal, bias=bias)
    allowed = allowed_pairs((B, H, 7, 11), mask=mask, causal=causal)
    assert not weights[~allowed].any()
    torch.testing.assert_close(weights.sum(-1), allowed.any(-1).double(), atol=1e-12, rtol=0)
    out = softmax_attention(q, k, v, mask=mask, causal=causal, bias=bias)
    torch.testing.assert_close(weights @ v.repeat_interleave(H // KV, dim=1), out, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("i", "j"), [(1, 1), (1, 7), (5, 7), (7, 5), (5, 1)])
def test_the_pairs_of_a_distance_bias_are_equal_along_diagonals(i: int, j: int) -> None:
    values = torch.randn(3, i + j - 1)
    assert torch.equal(DistanceBias(values).pairs(i, j), bias_of_pairs(values, i, j))


@pytest.mark.parametrize(("start", "stop", "keys"), [(0, 3, 7), (2, 5, 7), (4, 5, 3), (0, 5, 1), (1, 2, 0)])
def test_rows_of_a_distance_bias_are_rows_of_its_pairs(start: int, stop: int, keys: int) -> None:
    bias = DistanceBias(torch.randn(2, 5 + 7 - 1))
    rows = bias.rows(start, stop, 5, keys).pairs(stop - start, keys)
    assert torch.equal(rows, bias.pairs(5, 7)[:, start:stop, :keys])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("path", PATHS)
def test_dropout_drops_its_share_of_the_weights_and_scales_the_rest(path: str) -> None:
    n, p = 32, 0.3
    q, k = torch.randn(2, 3, n, 8), torch.randn(2, 3, n, 8)
    identity = torch.eye(n).expand(2, 3, n, n)  # the output is then the weights themselves
    whole = softmax_attention(q, k, identity, impl=path)
    out = softmax_attention(q, k, identity, dropout=p, impl=path)
    kept = out != 0
    torch.testing.assert_close(out[kept], whole[kept] / (1 - p))
    share, sigma = 1 - kept.double().mean(), (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(share - p) < 5 * sigma
    # every row of weights, and so every tile, has its own dropout mask
    assert len(set(map(tuple, kept.flatten(0, 2).tolist()))) == 2 * 3 * n


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_drops_the_weights_that_forward_dropped(path: str, compiled: bool) -> None:
    def drop(*inputs: Tensor) -> Tensor:
        return softmax_attention(*inputs, causal=True, dropout=0.4, impl=path)

    run = torch.compile(drop, fullgraph=True, backend="aot_eager") if compiled else drop
    q, k, v = leaves((1, 1, 10, 4), (1, 1, 10, 4), (1, 1, 10, 4))

    def same_seed(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run(*inputs)

    assert torch.autograd.gradcheck(same_seed, (q, k, v), fast_mode=True)


@pytest.mark.usefixtures("small_tiles")
def test_query_tiles_save_no_score_matrix_for_backward() -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    inputs = leaves((1, 2, 61, 2), (1, 2, 61, 2), (1, 2, 61, 2), (2, 121))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        softmax_attention(*inputs[:3], causal=True, bias=DistanceBias(inputs[3]))
    assert sum(saved) == sum(tensor.numel() for tensor in inputs)


DERIVATIVES = {
    "plain": {},
    "causal": {"causal": True},
    "masked": {"mask": torch.tensor([[True, False, True, True, False, True, True], [False] * 7])},
    "causal and masked": {"causal": True, "mask": torch.tensor([[False] * 3 + [True] * 4, [True] * 7])},
}


def differentiate_twice(path: str, case: str, bias_kind: str) -> bool:
    inputs = leaves((2, 2, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3))
    if bias_kind != "none":
        inputs += leaves((2, 11) if bias_kind == "distance" else (2, 5, 7))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        wrapped = DistanceBias(bias) if bias_kind == "distance" else bias
        return softmax_attention(q, k, v, bias=wrapped, impl=path, **DERIVATIVES[case])

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
    return torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bias_kind", ["none", "distance", "pairs"])
@pytest.mark.parametrize("case", DERIVATIVES)
def test_a_second_derivative_through_query_tiles_is_right_or_raises(case: str, bias_kind: str) -> None:
    if bias_kind == "distance":
        with pytest.raises(RuntimeError, match=r"attention_zoo\.reference\(\)"):
            differentiate_twice("tiled", case, bias_kind)
    else:
        assert differentiate_twice("tiled", case, bias_kind)


@pytest.mark.parametrize("bias_kind", ["none", "distance", "pairs"])
@pytest.mark.parametrize("case", DERIVATIVES)
def test_the_reference_is_twice_differentiable_and_runs_no_fast_code(
    case: str, bias_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, *FAST_CODE)
    assert differentiate_twice("reference", case, bias_kind)
    with attention_zoo.reference():
        assert differentiate_twice("auto", case, bias_kind)


@pytest.mark.parametrize("bias_kind", ["none", "distance", "pairs"])
@pytest.mark.parametrize("path", ["auto", "sdpa", "tiled"])
def test_fast_implementations_run_fast_code(path: str, bias_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, *FAST_CODE)
    with pytest.raises(AssertionError, match="fast code ran"):
        differentiate_twice(path, "causal", bias_kind)


def test_attention_weights_run_no_fast_code(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, *FAST_CODE)
    q, k = leaves((2, 4, 5, 6), (2, 2, 7, 6))
    assert torch.autograd.gradgradcheck(
        lambda q, k: softmax_attention_weights(q, k, causal=True), (q, k), fast_mode=True
    )


@pytest.mark.parametrize("bias_kind", ["none", "distance", "pairs"])
@pytest.mark.parametrize("case", DERIVATIVES)
def test_a_second_derivative_through_fused_kernels_is_right_or_raises(case: str, bias_kind: str) -> None:
    try:
        assert differentiate_twice("sdpa", case, bias_kind)
    except RuntimeError as error:
        assert "derivative for aten::_scaled_dot_product" in str(error)  # noqa: PT017  # either outcome is right


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("path", [*PATHS, "auto"])
def test_every_path_compiles_as_one_graph(path: str) -> None:
    inputs = leaves((2, 2, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3), (2, 11))
    mask = torch.rand(2, 7) < 0.6

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return softmax_attention(q, k, v, mask=mask, causal=True, bias=DistanceBias(bias), impl=path)

    want = attend(*inputs)
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(want)
    for got_grad, want_grad in zip(gradients(got, inputs, cotangent), gradients(want, inputs, cotangent), strict=True):
        torch.testing.assert_close(got_grad, want_grad, atol=1e-12, rtol=0)


def test_a_compiled_operation_follows_the_reference_context(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        kernels.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    attend = torch.compile(lambda *qkv: softmax_attention(*qkv, causal=True), fullgraph=True, backend=record)
    fast = attend(q, k, v)
    with attention_zoo.reference():
        slow = attend(q, k, v)
    attend(q, k, v)
    with attention_zoo.reference():
        attend(q, k, v)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=0)
    assert ["scaled_dot_product" in graph for graph in kernels] == [True, False]  # two graphs, both reused


def test_a_compiled_function_may_contain_the_reference_context() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with attention_zoo.reference():
            return softmax_attention(q, k, v, causal=True)

    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, softmax_attention(q, k, v, causal=True), atol=1e-6, rtol=0)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "q without heads": ({"q": zeros(2, 5, 6)}, ValueError, r"q must be \(b, h, n, e\), got shape \(2, 5, 6\)"),
    "features": ({"k": zeros(2, 2, 7, 3)}, ValueError, r"same number of features, got 6 and 3"),
    "length": ({"v": zeros(2, 2, 5, 6)}, ValueError, r"k and v their heads and length, got shapes"),
    "batch": ({"q": zeros(3, 4, 5, 6)}, ValueError, r"q, k and v must share the batch"),
    "heads": ({"k": zeros(2, 3, 7, 6), "v": zeros(2, 3, 7, 6)}, ValueError, r"heads of k must divide.*got 3 and 4"),
    "dtypes": ({"k": zeros(2, 2, 7, 6, dtype=torch.float64)}, TypeError, r"one floating dtype, got.*float32.*float64"),
    "mask of numbers": ({"mask": zeros(2, 7)}, TypeError, r"mask must be a boolean tensor.*got dtype torch.float32"),
    "mask of a list": ({"mask": [True]}, TypeError, r"mask must be a boolean tensor.*got list"),
    "mask shape": (
        {"mask": zeros(2, 5).bool()},
        ValueError,
        r"mask must be \(b, j\) = \(2, 7\) or.*got shape \(2, 5\)",
    ),
    "mask without batch": ({"mask": zeros(4, 5, 7).bool()}, ValueError, r"mask must be .*got shape \(4, 5, 7\)"),
    "mask batch": ({"mask": zeros(3, 1, 5, 7).bool()}, ValueError, r"mask must be .*got shape \(3, 1, 5, 7\)"),
    "mask heads": ({"mask": zeros(2, 3, 5, 7).bool()}, ValueError, r"mask must be .*got shape \(2, 3, 5, 7\)"),
    "bias shape": ({"bias": zeros(3, 5, 7)}, ValueError, r"bias must broadcast to .*got shape \(3, 5, 7\)"),
    "bias of a number": ({"bias": torch.tensor(1.0)}, ValueError, r"bias must broadcast to .*got shape \(\)"),
    "bias that is a mask": ({"bias": zeros(5, 7).bool()}, TypeError, r"bias must be floating point.*torch.bool"),
    "distances": (
        {"bias": DistanceBias(zeros(4, 12))},
        ValueError,
        r"bias.values must be .* = \(4, 11\), got shape \(4, 12\)",
    ),
}


@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize("case", BAD)
def test_an_error_names_the_argument_that_does_not_fit(case: str, path: str) -> None:
    changes, error, message = BAD[case]
    arguments = {"q": zeros(2, 4, 5, 6), "k": zeros(2, 2, 7, 6), "v": zeros(2, 2, 7, 6), **changes}
    with pytest.raises(error, match=message):
        softmax_attention(**arguments, impl=path)


ADDITIVE = {"(b, h, i, j)": (B, H, None, None), "(1, 1, i, j)": (1, 1, None, None), "(b, 1, 1, j)": (B, 1, 1, None)}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_kind", ["none", "distance", "(h, i, j)"])
@pytest.mark.parametrize("form", ADDITIVE)
def test_additive_mask_is_added_to_scores_and_bias_on_every_path(form: str, bias_kind: str, causal: bool) -> None:
    i, j = 11, 7
    b, h, rows, _ = ADDITIVE[form]
    added = torch.randn(b, h, rows or i, j, dtype=torch.float64)
    hidden = torch.rand(added.shape) < 0.4
    added.requires_grad_()
    inputs, _, _, cotangent, _ = problem("none", bias_kind, causal, i, j)
    bias = inputs[3] if len(inputs) == 4 else None
    pairs = added.expand(B, H, i, j)
    if bias is not None:
        pairs = pairs + (bias_of_pairs(bias, i, j) if bias_kind == "distance" else bias)
    allowed = allowed_pairs((B, H, i, j), mask=None, causal=causal) & ~hidden.expand(B, H, i, j)
    want = attend_one_by_one(*inputs[:3], allowed, pairs, E**-0.5)
    want_grads = gradients(want, [*inputs, added], cotangent)
    for path in (*PATHS, "auto"):
        mask = added.masked_fill(hidden, -torch.inf)
        given = DistanceBias(bias) if bias_kind == "distance" else bias
        out = softmax_attention(*inputs[:3], mask=mask, causal=causal, bias=given, impl=path)
        torch.testing.assert_close(out, want, atol=1e-12, rtol=0, msg=lambda text, path=path: f"{path}: {text}")
        for got, want_grad in zip(gradients(out, [*inputs, added], cotangent), want_grads, strict=True):
            torch.testing.assert_close(got, want_grad, atol=1e-11, rtol=0, msg=lambda t, path=path: f"{path}: {t}")
        weights = softmax_attention_weights(*inputs[:2], mask=mask, causal=causal, bias=given)
        torch.testing.assert_close(weights @ inputs[2].repeat_interleave(H // KV, 1), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_additive_mask_of_any_dtype_crosses_tile_boundaries(
    path: str, dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    q, k, v = (part.bfloat16().to(dtype) for part in leaves((2, 2, 131, 8), (2, 1, 131, 8), (2, 1, 131, 8)))
    mask = torch.randn(1, 2, 131, 131).bfloat16().to(mask_dtype).masked_fill(torch.rand(131, 131) < 0.4, -torch.inf)
    got = softmax_attention(q, k, v, mask=mask, causal=True, impl=path)
    allowed = allowed_pairs((2, 2, 131, 131), mask=None, causal=True) & (mask > -torch.inf)
    want = attend_one_by_one(q.double(), k.double(), v.double(), allowed, mask.double().expand(2, -1, -1, -1), 8**-0.5)
    assert got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]


def test_mask_of_padding_cannot_be_additive() -> None:
    q, k, v = leaves((B, H, 3, E), (B, KV, 3, E), (B, KV, 3, EV))
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor, got dtype torch.float64"):
        softmax_attention(q, k, v, mask=torch.zeros(B, 3, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [KV, H])
def test_a_nan_in_a_query_gives_nan_in_its_output_on_every_path(kv: int, causal: bool, dtype: torch.dtype) -> None:
    for i, j in [(1, 1), (1, 2), (2, 2), (3, 9), (1, 15), (15, 15), (16, 16), (1, 17), (18, 18), (2, 33)]:
        q, k, v = leaves((B, H, i, E), (B, kv, j, E), (B, kv, j, E), dtype=dtype)  # equal features: torch's CPU kernel
        with torch.no_grad():
            q[:, :, -1, 0] = torch.nan
        for impl in ("auto", *PATHS):
            for mask in (None, torch.ones(B, j, dtype=torch.bool)):
                with torch.no_grad():
                    assert softmax_attention(q, k, v, mask=mask, causal=causal, impl=impl)[:, :, -1].isnan().all()
                out = softmax_attention(q, k, v, mask=mask, causal=causal, impl=impl)
                assert out[:, :, -1].isnan().all(), (i, j, impl)
                assert not out[:, :, :-1].isnan().any(), (i, j, impl)
                (gradient,) = torch.autograd.grad(out.float().sum(), q)
                assert gradient[:, :, -1].isnan().all(), (i, j, impl)


def test_a_nan_in_a_query_gives_nan_in_its_output_when_compiled() -> None:
    torch.compiler.reset()
    compiled = torch.compile(softmax_attention, backend="aot_eager", fullgraph=True)
    for j in (20, 5, 3):  # the second length makes it a symbol of the trace
        q, k, v = (torch.randn(B, H, j, E) for _ in range(3))
        q[:, :, 2] = torch.nan
        out = compiled(q, k, v)
        assert torch.equal(out.isnan(), q.isnan())


BAD_OPTIONS = {
    "scale inf": ({"scale": float("inf")}, ValueError, r"scale must lie in \(-inf, inf\), got scale=inf"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must lie in .*got scale=nan"),
    "scale as a string": ({"scale": "1"}, TypeError, "scale must be a number, got scale='1'"),
    "dropout above 1": ({"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\], got dropout=1.5"),
    "dropout as a string": ({"dropout": "0.1"}, TypeError, "dropout must be a number, got dropout='0.1'"),
    "causal as a string": ({"causal": "no"}, TypeError, "causal must be a bool, got causal='no'"),
    "a list": ({"q": [1.0]}, TypeError, "q must be a dense tensor, got list"),
    "a sparse tensor": (
        {"k": torch.ones(1, 1, 3, 4).to_sparse()},
        TypeError,
        "k must be a dense tensor, got layout .*coo",
    ),
    "another device": ({"v": torch.ones(1, 1, 3, 4, device="meta")}, ValueError, "(one|the) device.*, got.* meta"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
@pytest.mark.parametrize("operation", [softmax_attention, cosine_sim_attention, talking_heads_attention])
def test_invalid_options_raise_and_are_named(operation, case: str) -> None:
    changes, error, message = BAD_OPTIONS[case]
    inputs = {name: torch.ones(1, 1, 3, 4) for name in ("q", "k", "v")}
    mixes = {"pre_softmax": None, "post_softmax": None} if operation is talking_heads_attention else {}
    if operation is cosine_sim_attention and case in ("a list", "a sparse tensor"):
        return  # it reads the axes of q and normalises k before these checks
    for impl in ("auto", "reference"):
        with pytest.raises(error, match=message):
            operation(**{**inputs, **mixes, **changes}, impl=impl)
