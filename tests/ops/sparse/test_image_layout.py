"""Geometry of sequences of text and image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attention_zoo.attention import AxialRowAttention, BlockSparseAttention, ConvAttention
from attention_zoo.ops.sparse import TextImageLayout, axial_attention, axial_mask, conv_attention, conv_mask


def test_rows_and_columns_follow_row_major_order_after_the_text() -> None:
    layout = TextImageLayout(text_len=3, height=2, width=4)
    row, column = layout.rows_and_columns(torch.arange(3, layout.length))
    assert row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert column.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert bool((layout.rows_and_columns(torch.arange(3))[0] < 0).all())
    assert (layout.image_len, layout.length) == (8, 11)


def test_offsets_count_rows_and_columns_from_key_to_query() -> None:
    layout = TextImageLayout(text_len=1, height=3, width=4)
    down, right = layout.offsets(torch.tensor([[8], [9]]), torch.arange(10))
    assert down.shape == right.shape == (2, 10)
    for query in (8, 9):
        for key in range(1, 10):
            (row, column), (key_row, key_column) = (divmod(t - 1, 4) for t in (query, key))
            assert (int(down[query - 8, key]), int(right[query - 8, key])) == (row - key_row, column - key_column)


def test_text_is_attended_to_and_later_keys_are_not_with_causal_masking() -> None:
    layout, index = TextImageLayout(text_len=2, height=1, width=2), torch.arange(4)
    query = index[2:, None]
    far, near = torch.zeros(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    assert layout.add_text(far, query, index, causal=True).tolist() == [[True, True, False, False]] * 2
    assert layout.add_text(near, query, index, causal=True).tolist() == [[True] * 3 + [False], [True] * 4]


def test_text_attends_to_all_tokens_without_causal_masking() -> None:
    layout, index = TextImageLayout(text_len=2, height=1, width=2), torch.arange(4)
    far = torch.zeros(4, 4, dtype=torch.bool)
    want = [[True] * 4] * 2 + [[True, True, False, False]] * 2
    assert layout.add_text(far, index[:, None], index, causal=False).tolist() == want


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TextImageLayout(-1, 3, 3), ValueError, "text_len must be at least 0, got text_len=-1"),
        (lambda: TextImageLayout(1, 0, 3), ValueError, "height must be at least 1, got height=0"),
        (lambda: TextImageLayout(1, 3, 2.5), TypeError, "width must be an int, got width=2.5"),  # type: ignore[arg-type]
        (lambda: TextImageLayout(2, 3, 3).check(12), ValueError, "x must hold at most the 11 tok"),
    ],
)
def test_invalid_layout_arguments_raise(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda layout, q: conv_mask(layout),
        lambda layout, q: axial_mask(layout, axis="row"),
        lambda layout, q: conv_attention(q, q, q, layout=layout),
        lambda layout, q: axial_attention(q, q, q, layout=layout, axis="row"),
        lambda layout, q: ConvAttention(8, layout=layout),
        lambda layout, q: AxialRowAttention(8, layout=layout),
        lambda layout, q: BlockSparseAttention(8, layout=layout),
    ],
)
def test_layout_of_another_type_is_rejected_by_name(call: Any) -> None:
    with pytest.raises(TypeError, match=r"layout must be of type TextImageLayout.*, got list"):
        call([4, 3, 3], torch.zeros(1, 1, 13, 4))
