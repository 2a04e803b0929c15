"""Attention over tiles, without torch's flash kernel and in second derivatives."""

from __future__ import annotations

import pytest
import torch

from attention_zoo import reference
from attention_zoo.ops import conv_attention
from attention_zoo.ops.sparse import tiles
from tests.ops.sparse.patterns import LAYOUT, MAKE_CASE, assert_tiles_equal_reference, inputs


@pytest.mark.parametrize("name", MAKE_CASE)
def test_tiles_without_the_flash_kernel_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_has_flash", lambda q: False)
    for n in (4, 13, 47):
        assert_tiles_equal_reference(MAKE_CASE[name](LAYOUT).attention, n, torch.float32, 1e-5)


def test_second_derivative_of_tiles_raises_and_names_the_reference() -> None:
    q, k, v = inputs(47)
    out = conv_attention(q, k, v, layout=LAYOUT, impl="tiled")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*attention_zoo\.reference"):
        first.sum().backward()
    with reference():
        out = conv_attention(q, k, v, layout=LAYOUT, impl="tiled")
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        first.sum().backward()
