"""Block-sparse attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import TextImageLayout, block_sparse_attention, block_sparse_mask, choose_blocks
from tests.ops.sparse.patterns import (
    IMAGE,
    LAYOUT,
    LENGTHS,
    MAKE_CASE,
    assert_every_implementation_equals_formula,
    assert_mask_equals_definition,
    assert_tiles_equal_reference,
    inputs,
)

NAMES = [name for name in MAKE_CASE if "blocks" in name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [LAYOUT, IMAGE], ids=["text", "no text"])
def test_block_sparse_mask_equals_the_definition(layout: TextImageLayout, name: str) -> None:
    assert_mask_equals_definition(MAKE_CASE[name](layout), layout.length)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LENGTHS, ids=["text", "no text", "long text"])
def test_block_sparse_tiles_equal_the_reference_in_outputs_and_gradients(layout: TextImageLayout, name: str) -> None:
    attention = MAKE_CASE[name](layout).attention
    for n in LENGTHS[layout]:
        assert_tiles_equal_reference(attention, n, torch.float32, 1e-5)
    assert_tiles_equal_reference(attention, LENGTHS[layout][-2], torch.bfloat16, 3e-2)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_sparse_implementation_equals_attention_one_query_at_a_time(name: str) -> None:
    assert_every_implementation_equals_formula(MAKE_CASE[name](LAYOUT))


def test_random_blocks_depend_on_the_seed_and_the_others_on_the_definition() -> None:
    options = {"local_blocks": 4, "global_blocks": 2, "random_blocks": 3}
    blocks = choose_blocks(20, **options)
    assert torch.equal(blocks, choose_blocks(20, **options))
    assert not torch.equal(blocks, choose_blocks(20, seed=1, **options))
    assert torch.equal(choose_blocks(20, causal=True, **options), blocks.tril())
    assert bool(blocks[:, :2].all())
    for row in range(20):
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        assert bool(blocks[row, list(group)].all())
        others = [column for column in range(20) if column >= 2 and column not in group and blocks[row, column]]
        assert len(others) <= 3
    assert int(choose_blocks(20, local_blocks=1, random_blocks=0).sum()) == 20


def attend(blocks: Tensor, block_size: int = 8) -> Tensor:
    return block_sparse_attention(*inputs(47), blocks=blocks, block_size=block_size)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attend(torch.ones(3, 3).bool()), ValueError, "k must hold at most 24 tokens, got 47"),
        (lambda: attend(torch.ones(3, 3).int()), TypeError, "blocks must be a boolean tensor, got dtype torch.int32"),
        (lambda: attend(torch.ones(2, 3).bool()), ValueError, r"blocks must be square, .* got shape \(2, 3\)"),
        (lambda: attend(torch.ones(6, 6).bool(), 0), ValueError, "block_size must be at least 1, got block_size=0"),
        (lambda: block_sparse_mask(torch.ones(3, 3).bool(), block_size=8, stop=25), ValueError, "stop must be at most"),
        (lambda: choose_blocks(9, local_blocks=0), ValueError, "local_blocks must be at least 1, got local_blocks=0"),
        (lambda: choose_blocks(9, random_blocks=-1), ValueError, "random_blocks must be at least 0"),
    ],
)
def test_invalid_block_sparse_arguments_raise(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
