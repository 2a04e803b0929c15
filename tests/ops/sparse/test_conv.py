"""Convolution-like attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from attention_zoo.ops import TextImageLayout, conv_attention, conv_mask
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

NAMES = [name for name in MAKE_CASE if "conv" in name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [LAYOUT, IMAGE], ids=["text", "no text"])
def test_conv_mask_equals_the_definition(layout: TextImageLayout, name: str) -> None:
    assert_mask_equals_definition(MAKE_CASE[name](layout), layout.length)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[pytest.mark.slow] * (place == 2)) for place, layout in enumerate(LENGTHS)],
    ids=["text", "no text", "long text"],
)
def test_conv_tiles_equal_the_reference_in_outputs_and_gradients(layout: TextImageLayout, name: str) -> None:
    attention = MAKE_CASE[name](layout).attention
    for n in LENGTHS[layout]:
        assert_tiles_equal_reference(attention, n, torch.float32, 1e-5)
    assert_tiles_equal_reference(attention, LENGTHS[layout][-2], torch.bfloat16, 3e-2)


@pytest.mark.parametrize("name", NAMES)
def test_every_conv_implementation_equals_attention_one_query_at_a_time(name: str) -> None:
    assert_every_implementation_equals_formula(MAKE_CASE[name](LAYOUT))


def test_one_trace_of_conv_attention_serves_every_length() -> None:
    layout, count = TextImageLayout(5, 40, 9), 0

    def count_graphs(graph: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(partial(conv_attention, layout=layout), fullgraph=True, backend=count_graphs, dynamic=True)
    for n in (270, 301, 333, 365):
        q, k, v = (t.detach() for t in inputs(n))
        torch.testing.assert_close(compiled(q, k, v), conv_attention(q, k, v, layout=layout))
    torch.compiler.reset()
    assert count == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv_mask(LAYOUT, kernel_size=4), "kernel_size must be odd, got kernel_size=4"),
        (lambda: conv_mask(LAYOUT, kernel_size=-1), "kernel_size must be at least 1, got kernel_size=-1"),
        (lambda: conv_mask(LAYOUT, dilation=0), "dilation must be at least 1, got dilation=0"),
        (lambda: conv_mask(LAYOUT, window="full"), "window must be one of .*got window='full'"),
        (lambda: conv_mask(LAYOUT, stop=99), "stop must hold at most the 47 tokens"),
        (lambda: conv_attention(*inputs(47), layout=LAYOUT, kernel_size=4), "kernel_size must be odd"),
    ],
)
def test_invalid_conv_arguments_raise(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
