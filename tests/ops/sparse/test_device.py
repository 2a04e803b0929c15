"""Attention under patterns as on devices other than the CPU: the same code, with the choice by device patched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import TextImageLayout, tiling
from attention_zoo.ops.sparse import BlockSparsePattern, ConvPattern, MaskPattern, dense, pattern_attention
from tests.counting import count_operators, operators_of
from tests.formulas import attend_one_by_one, relative_error
from tests.ops.sparse.patterns import IMAGE, LAYOUT, MAKE_CASE, inputs, padding_mask, table, with_gradients

LENGTHS = {LAYOUT: (4, 6, 33), IMAGE: (7, 12)}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loops over tiles, and no masks of earlier tests."""
    monkeypatch.setattr(tiling, "prefers_tiles", lambda x: False)
    monkeypatch.setattr(dense, "_remembered", {})


@pytest.mark.parametrize("name", MAKE_CASE)
@pytest.mark.parametrize("layout", [LAYOUT, pytest.param(IMAGE, marks=pytest.mark.slow)], ids=["text", "no text"])
def test_outputs_and_gradients_equal_attention_one_query_at_a_time(layout: TextImageLayout, name: str) -> None:
    case = MAKE_CASE[name](layout)
    for n in LENGTHS[layout]:
        for mask in (None, padding_mask(n)):
            qkv, weight = inputs(n, torch.float64), torch.randn(2, 3, n, 8, dtype=torch.float64)
            allowed = table(case.attends, n).expand(2, 3, n, n)
            allowed = allowed if mask is None else allowed & mask[:, None, None]
            want = with_gradients(lambda q, k, v, a=allowed: attend_one_by_one(q, k, v, a, None, 8**-0.5), qkv, weight)
            for got, part in zip(with_gradients(case.attention, qkv, weight, mask=mask), want, strict=True):
                torch.testing.assert_close(got, part)


@pytest.mark.parametrize("name", [name for name in MAKE_CASE if MAKE_CASE[name](LAYOUT).causal])
def test_the_last_queries_attend_as_in_the_whole_sequence(name: str) -> None:
    case = MAKE_CASE[name](LAYOUT)
    q, k, v = inputs(30)
    for mask in (None, padding_mask(30)):
        whole = case.attention(q, k, v, mask=mask)
        for count in (1, 7):
            last = case.attention(q[:, :, -count:], k, v, mask=mask)
            torch.testing.assert_close(last, whole[:, :, -count:])


def test_grouped_heads_and_dropout_are_folded_too() -> None:
    case = MAKE_CASE["axial column"](LAYOUT)
    q, k, v = torch.randn(2, 4, 47, 8), torch.randn(2, 2, 47, 8), torch.randn(2, 2, 47, 8)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    torch.testing.assert_close(case.attention(q, k, v), case.attention(q, *repeated))
    torch.manual_seed(0)
    dropped = torch.stack([case.attention(q, k, v, dropout=0.3) for _ in range(300)]).mean(0)
    assert relative_error(dropped, case.attention(q, k, v)) < 0.1


@pytest.mark.parametrize("name", MAKE_CASE)
def test_the_number_of_operators_does_not_depend_on_the_length(name: str) -> None:
    counts = set()
    for side in (16, 24):
        case, n = MAKE_CASE[name](TextImageLayout(side, side, side)), side * side  # inside the last row
        qkv = inputs(n)

        def train() -> None:
            out = case.attention(*qkv)  # noqa: B023
            torch.autograd.grad(out.sum(), qkv)  # noqa: B023

        train()
        counts.add(count_operators(train))
    assert len(counts) == 1
    assert counts.pop() < 60


def test_the_mask_of_a_pattern_is_built_once_for_all_lengths() -> None:
    case = MAKE_CASE["conv 5"](LAYOUT)
    q, k, v = (x.detach() for x in inputs(47))
    assert "remainder" in operators_of(lambda: case.attention(q, k, v))
    for n in (47, 30, 1):
        part = [x[:, :, :n] for x in (q, k, v)]
        assert operators_of(lambda p=part: case.attention(*p)) == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert "remainder" in operators_of(lambda: case.attention(q.half(), k.half(), v.half()))


def test_rows_of_a_remembered_mask_are_aligned() -> None:
    mask = dense._additive_mask(ConvPattern(LAYOUT), 47, torch.zeros(1))
    assert mask.shape == (47, 47)
    assert mask.stride() == (48, 1)


@pytest.mark.parametrize(
    "make", [MaskPattern, lambda t: BlockSparsePattern(t, 1, False, len(t))], ids=["table", "blocks"]
)
def test_a_mask_is_built_again_for_a_modified_table(make: type[MaskPattern]) -> None:
    allowed = torch.eye(6, dtype=torch.bool)
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))

    def attend() -> Tensor:
        return pattern_attention(make(allowed), q, k, v)

    torch.testing.assert_close(attend(), v)
    allowed.copy_(allowed.flip(0))  # as loading a checkpoint does
    torch.testing.assert_close(attend(), v.flip(2))
    allowed[0] = False
    torch.testing.assert_close(attend()[:, :, 0], torch.zeros(1, 1, 4))
    with torch.inference_mode():
        frozen = make(torch.eye(6, dtype=torch.bool))
        torch.testing.assert_close(pattern_attention(frozen, q, k, v), v)


def test_remembered_masks_are_limited_in_number() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    for _ in range(dense.REMEMBERED + 3):
        pattern_attention(MaskPattern(torch.ones(6, 6, dtype=torch.bool)), q, k, v)
    assert len(dense._remembered) == dense.REMEMBERED
