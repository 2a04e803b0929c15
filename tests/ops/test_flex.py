"""FlexAttention: its masks and scores as functions of indices, and its eager forward on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attention_zoo
from attention_zoo import AxialAttention, FullAttention, RelativeBias
from attention_zoo.ops import DistanceBias, TextImageLayout, softmax_attention
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.flex import hide_pairs
from attention_zoo.ops.implementation import is_preferred
from attention_zoo.ops.softmax import flex as softmax_flex
from attention_zoo.ops.sparse import (
    AxialPattern,
    BlockSparsePattern,
    ConvPattern,
    MaskPattern,
    Pattern,
    choose_blocks,
    flex,
    pattern_attention,
)
from tests.formulas import allowed_pairs, attend_one_by_one, bias_of_pairs, relative_error
from tests.ops.sparse.patterns import LAYOUT, padding_mask

N = LAYOUT.length
PATTERNS: dict[str, Pattern] = {
    "conv": ConvPattern(LAYOUT, 3, 2),
    "wrapped conv": ConvPattern(LAYOUT, 3, window="wrapped"),
    "centred conv": ConvPattern(LAYOUT, 5, causal=False),
    "row": AxialPattern(LAYOUT, "row"),
    "wrapped row": AxialPattern(LAYOUT, "wrapped_row"),
    "column": AxialPattern(LAYOUT, "column"),
    "column in both directions": AxialPattern(LAYOUT, "column", causal=False),
    "blocks": BlockSparsePattern(choose_blocks(6), 8, False, 48),
    "table": MaskPattern(torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < 0.5, causal=True),
}
B, H = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]


def indices(i: int, j: int) -> tuple[Tensor, Tensor]:
    return torch.arange(i)[:, None], torch.arange(j)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_mask_of_a_pattern_as_a_function_equals_its_boolean_mask(pattern: Pattern) -> None:
    query, key = indices(N, N)
    zero = torch.tensor(0)
    assert torch.equal(flex.mask_mod(pattern)(zero, zero, query, key), pattern.mask(0, N, None))
    assert torch.equal(flex.mask_mod(pattern, 20)(zero, zero, query[:9], key[:29]), pattern.mask(20, 29, None))


def test_the_masks_of_causality_and_documents_equal_their_definitions() -> None:
    query, key = indices(5, 7)
    want = allowed_pairs((1, 1, 5, 7), mask=None, causal=True)[0, 0]
    assert torch.equal(softmax_flex.causal_mod(2)(B, H, query, key), want)
    documents = Documents(torch.tensor([[3, 3, 1, 1, 1, 3], [2, 5, 5, 5, 5, 5]]))
    query, key = indices(6, 6)
    for causal in (False, True):
        found = softmax_flex.document_mod(documents.first, causal)(B, H[:1], query, key)
        assert torch.equal(found[:, 0], documents.pairs & ((key <= query) | (not causal)))


def test_the_score_of_a_bias_and_a_mask_equals_their_sum() -> None:
    i, j = 5, 7
    query, key = indices(i, j)
    q, k, score = torch.zeros(2, 3, i, 4), torch.zeros(2, 3, j, 4), torch.randn(2, 3, i, j)
    values = torch.randn(3, i + j - 1)
    pairs = bias_of_pairs(values, i, j)
    for bias, want in ((None, score), (DistanceBias(values), score + pairs), (pairs[:1], score + pairs[:1])):
        change = softmax_flex.bias_mod(bias, q, k) or (lambda score, *index: score)
        torch.testing.assert_close(change(score, B, H, query, key), want)
        for mask in (torch.rand(2, j) < 0.5, torch.rand(2, 1, i, j) < 0.5, torch.rand(1, 3, 1, j) < 0.5):
            hidden = hide_pairs(mask, softmax_flex.bias_mod(bias, q, k))
            assert hidden is not None
            allowed = mask[:, None, None] if mask.ndim == 2 else mask
            torch.testing.assert_close(hidden(score, B, H, query, key), want.masked_fill(~allowed, -torch.inf))


def slow_but(*names: str) -> list[Any]:
    """Every eager call of FlexAttention takes seconds: by default only these patterns run."""
    return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in PATTERNS]


@pytest.mark.parametrize("name", slow_but("column"))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_a_pattern_equals_attention_one_query_at_a_time(name: str) -> None:
    pattern = PATTERNS[name]
    for n in (N, 30) if name == "column" else (N,):
        q, k, v = torch.randn(3, 2, 3, n, 8).unbind()
        mask = padding_mask(n)
        allowed = (pattern.mask(0, n, None) & mask[:, None])[:, None].expand(2, 3, n, n)
        want = attend_one_by_one(q, k, v, allowed, None, 8**-0.5)
        assert relative_error(pattern_attention(pattern, q, k, v, mask=mask, impl="flex"), want) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_grouped_heads_biases_and_documents_equals_the_reference() -> None:
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    ids = torch.tensor([[0] * 7 + [1] * 13, [2] * 20])
    bias, mask = DistanceBias(torch.randn(4, 39)), torch.rand(2, 20) < 0.6
    for options in (
        {"causal": True, "bias": bias, "mask": mask},
        {"causal": True, "document_ids": ids, "bias": bias},
        {"document_ids": ids, "mask": mask},
        {"mask": mask[:, None, None] & torch.ones(20, 20, dtype=torch.bool), "bias": torch.randn(20, 20), "scale": 0.3},
    ):
        got, want = (softmax_attention(q, k, v, impl=impl, **options) for impl in ("flex", "reference"))
        assert relative_error(got, want) < 1e-6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_layers_run_flex_attention_where_it_is_preferred_and_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(flex, "run_flex", lambda q, k, v, *rest: (runs.append("pattern"), v)[1])
    monkeypatch.setattr(softmax_flex, "run_flex", lambda q, k, v, *rest: (runs.append("bias"), v)[1])
    sizes: dict[str, Any] = {"heads": 2, "dim_head": 8}
    axial = AxialAttention(16, layout=TextImageLayout(2, 3, 4), dropout=0.1, **sizes)
    biased = FullAttention(16, bias=RelativeBias(2), **sizes)
    x = torch.randn(1, 14, 16)

    def run() -> list[str]:
        runs.clear()
        for layer in (axial, biased, FullAttention(16, **sizes)):
            layer(x)
        return runs

    axial.eval()
    with torch.no_grad():
        assert run() == []
        with attention_zoo.prefer("flex"):
            assert is_preferred("flex")
            assert run() == ["pattern", "bias"]
            axial.train()  # dropout
            assert run() == ["bias"]
            with attention_zoo.reference():
                assert run() == []
        assert run() == []
    axial.eval()
    with attention_zoo.prefer("flex"):
        assert run() == []  # gradients on the CPU


def test_flex_attention_that_is_impossible_raises() -> None:
    q, k, v = torch.randn(3, 1, 2, N, 8).unbind()
    bias = DistanceBias(torch.zeros(2, 2 * N - 1, requires_grad=True))
    pattern = PATTERNS["row"]
    needs = "impl='flex' needs no dropout"
    with pytest.raises(ValueError, match=needs):
        pattern_attention(pattern, q, k, v, impl="flex", dropout=0.1)
    with pytest.raises(ValueError, match=f"{needs}, no gradients on the CPU, no bias"):
        pattern_attention(pattern, q.requires_grad_(), k, v, impl="flex")
    with pytest.raises(ValueError, match=f"{needs} and no gradients on the CPU, got dropout=0.5"):
        softmax_attention(q.detach(), k, v, impl="flex", dropout=0.5)
    with pytest.raises(ValueError, match=needs):
        softmax_attention(q.detach(), k, v, impl="flex", bias=bias)
    with pytest.raises(ValueError, match=r"impl must be one of .*got impl='fast'"), attention_zoo.prefer("fast"):
        pass
