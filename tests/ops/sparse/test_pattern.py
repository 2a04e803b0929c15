"""Attention under any pattern: implementations, biases, grouped heads, tables of pairs, arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import DistanceBias, TextImageLayout, conv_attention, tiling
from attention_zoo.ops.softmax import distance_bias, sdpa
from attention_zoo.ops.softmax import tiled as softmax_tiles
from attention_zoo.ops.sparse import (
    AxialPattern,
    BlockSparsePattern,
    ConvPattern,
    MaskPattern,
    Pattern,
    choose_blocks,
    dense,
    gather,
    pattern_attention,
    pattern_weights,
    tiles,
)
from tests.formulas import attend_one_by_one, bias_of_pairs, relative_error
from tests.ops.fast_code import forbid
from tests.ops.sparse.patterns import LAYOUT, inputs, padding_mask

N = LAYOUT.length
PATTERNS: dict[str, Pattern] = {
    "conv": ConvPattern(LAYOUT, 3),
    "axial": AxialPattern(LAYOUT, "column"),
    "blocks": BlockSparsePattern(choose_blocks(6), 8, False, 48),
    "table": MaskPattern(torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < 0.5),
    "causal table": MaskPattern(torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < 0.5, causal=True),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kind", ["no bias", "bias", "distance bias"])
@pytest.mark.parametrize("queries", [N, 5, 1])
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)], ids=["equal heads", "grouped heads"])
def test_attention_and_weights_equal_attention_one_query_at_a_time(
    pattern: Pattern, kind: str, queries: int, heads: tuple[int, int]
) -> None:
    h, kv = heads
    q = torch.randn(2, h, queries, 8, dtype=torch.float64)
    k, v = (torch.randn(2, kv, N, 8, dtype=torch.float64) for _ in range(2))
    values = torch.randn(h, queries + N - 1, dtype=torch.float64)
    pairs = bias_of_pairs(values, queries, N).expand(2, -1, -1, -1)
    bias = {"no bias": None, "bias": pairs, "distance bias": DistanceBias(values)}[kind]
    mask = padding_mask(N)
    allowed = (pattern.mask(N - queries, N, q.device) & mask[:, None]).unsqueeze(1).expand(-1, h, -1, -1)
    want = attend_one_by_one(q, k, v, allowed, None if bias is None else pairs, 8**-0.5)
    for impl in ("auto", "dense", "reference"):
        assert relative_error(pattern_attention(pattern, q, k, v, mask=mask, bias=bias, impl=impl), want) < 1e-6
    weights = pattern_weights(pattern, q, k, mask=mask, bias=bias)
    assert relative_error(weights @ v.repeat_interleave(h // kv, dim=1), want) < 1e-6
    assert not weights[~allowed].any()


@pytest.mark.parametrize("distance", [False, True])
def test_gradients_of_a_bias_equal_those_of_the_reference(distance: bool) -> None:
    q, k, v = inputs(N)
    values = torch.randn(3, 2 * N - 1) if distance else torch.randn(3, N, N)
    values.requires_grad_()
    weight = torch.randn(2, 3, N, 8)
    found = []
    for impl in ("auto", "reference"):
        bias = DistanceBias(values) if distance else values
        out = pattern_attention(PATTERNS["causal table"], q, k, v, mask=padding_mask(N) | True, bias=bias, impl=impl)
        found.append(torch.autograd.grad((out * weight).sum(), [q, k, v, values]))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-5


def test_dropout_zeroes_weights_and_keeps_their_mean() -> None:
    q, k, v = (torch.zeros(1, 3, 300, 8) for _ in range(3))
    layout = TextImageLayout(258, 6, 7)
    torch.manual_seed(0)
    for impl in ("auto", "reference"):
        out = conv_attention(q, k, v + 1, layout=layout, dropout=0.5, impl=impl)
        assert 0.9 < float(out[:, :, 200:].mean()) < 1.1
        assert float(out[:, :, 200:].std()) > 0.01


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_reference_is_twice_differentiable_and_runs_no_fast_code(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, tiles, gather, dense, sdpa, softmax_tiles, distance_bias, tiling)
    for name in ("tiled", "keys"):
        monkeypatch.setattr(type(pattern), name, None)
    n, mask = 9, torch.tensor([[True] * 9, [False] * 2 + [True] * 7])
    q = torch.randn(2, 2, n, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 1, n, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, 2 * n - 1, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return pattern_attention(pattern, q, k, v, mask=mask, bias=DistanceBias(bias), impl="reference")

    assert torch.autograd.gradcheck(attend, (q, k, v, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v, bias), fast_mode=True)


def test_patterns_say_whether_they_are_causal() -> None:
    assert {name: pattern.is_causal for name, pattern in PATTERNS.items()} == {
        "conv": True,
        "axial": True,
        "blocks": False,
        "table": False,
        "causal table": True,
    }


def attend(n: int = N, **changes: Any) -> Tensor:
    q, k, v = inputs(n)
    options: dict[str, Any] = {"pattern": PATTERNS["conv"], "q": q, "k": k, "v": v, **changes}
    return pattern_attention(options.pop("pattern"), options.pop("q"), options.pop("k"), options.pop("v"), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attend(48), ValueError, "k must hold at most the 47 tok"),
        (lambda: attend(61, pattern=PATTERNS["table"]), ValueError, "k must fit the pattern of 60 tokens, got 61"),
        (lambda: attend(q=torch.randn(2, 3, 48, 8)), ValueError, "q must be the last of the tok"),
        (lambda: attend(mask=torch.ones(2, 3).bool()), ValueError, r"mask must be .*\(2, 3\)"),
        (lambda: attend(mask=torch.ones(2, 47)), TypeError, "mask must be a boolean"),
        (lambda: attend(bias=torch.ones(3, 1, 5)), ValueError, r"bias must broadcast to .*\(3, 1, 5\)"),
        (lambda: attend(impl="fast"), ValueError, "impl must be one of"),
        (lambda: attend(impl="gather"), ValueError, "impl='gather' needs one query"),
        (lambda: attend(impl="tiled", dropout=0.1), ValueError, "impl='tiled' needs .*no dropout.*got .*dropout=0.1"),
        (lambda: attend(impl="tiled", bias=torch.ones(47, 47)), ValueError, "impl='tiled' needs .*no bias"),
        (lambda: attend(impl="tiled", pattern=PATTERNS["table"]), ValueError, "impl='tiled' needs .*with tiles"),
        (lambda: MaskPattern(torch.ones(3, 3)), TypeError, "allowed must be a boolean tensor, got dtype torch.float32"),
        (lambda: MaskPattern(torch.ones(3, 2).bool()), ValueError, r"allowed must be square, .*got shape \(3, 2\)"),
    ],
)
def test_invalid_pattern_arguments_raise(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_pattern_with_a_mask_of_four_axes_is_dense() -> None:
    layout = TextImageLayout(text_len=6, height=7, width=5)
    pattern = AxialPattern(layout, "row")
    q, k, v = (torch.randn(2, 3, 41, 8) for _ in range(3))
    boolean = torch.rand(2, 1, 41, 41) < 0.7
    additive = torch.randn(2, 3, 41, 41).masked_fill(~boolean, -torch.inf)
    allowed = (boolean & pattern.mask(0, 41, q.device)).expand(2, 3, 41, 41)
    for mask, bias in ((boolean, None), (additive, additive)):
        want = attend_one_by_one(q, k, v, allowed, bias, 8**-0.5)
        for impl in ("auto", "dense", "reference"):
            assert relative_error(pattern_attention(pattern, q, k, v, mask=mask, impl=impl), want) < 2e-6
        torch.testing.assert_close(pattern_weights(pattern, q, k, mask=mask) @ v, want, atol=1e-5, rtol=1e-5)
        for impl, queries in (("tiled", q), ("gather", q[:, :, -1:])):
            with pytest.raises(ValueError, match=f"impl='{impl}' needs .* no bias and no mask of four axes"):
                pattern_attention(pattern, queries, k, v, mask=mask[:, :, -queries.shape[2] :], impl=impl)
