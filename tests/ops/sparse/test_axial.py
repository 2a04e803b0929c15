"""Axial attention."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.ops import TextImageLayout, axial_attention, axial_mask
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

NAMES = [name for name in MAKE_CASE if "axial" in name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [LAYOUT, IMAGE], ids=["text", "no text"])
def test_axial_mask_equals_the_definition(layout: TextImageLayout, name: str) -> None:
    assert_mask_equals_definition(MAKE_CASE[name](layout), layout.length)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[pytest.mark.slow] * (place == 2)) for place, layout in enumerate(LENGTHS)],
    ids=["text", "no text", "long text"],
)
def test_axial_tiles_equal_the_reference_in_outputs_and_gradients(layout: TextImageLayout, name: str) -> None:
    attention = MAKE_CASE[name](layout).attention
    for n in LENGTHS[layout]:
        assert_tiles_equal_reference(attention, n, torch.float32, 1e-5)
    assert_tiles_equal_reference(attention, LENGTHS[layout][-2], torch.bfloat16, 3e-2)


@pytest.mark.parametrize("name", NAMES)
def test_every_axial_implementation_equals_attention_one_query_at_a_time(name: str) -> None:
    assert_every_implementation_equals_formula(MAKE_CASE[name](LAYOUT))


def test_invalid_axial_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r"axis must be one of .*got axis='col'"):
        axial_attention(*inputs(47), layout=LAYOUT, axis="col")
    with pytest.raises(ValueError, match="stop must hold at most the 47 tokens"):
        axial_mask(LAYOUT, stop=99)
