"""torch.compile and torch.export of every block: traced once, it runs at other lengths."""

from __future__ import annotations

import inspect
import os
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from attention_zoo import BLOCKS, TextImageLayout
from attention_zoo.testing.subject import seeded
from tests.formulas import relative_error

DIM = 16
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile's default backend needs a C++ compiler"
)
LAYOUT = TextImageLayout(text_len=20, height=18, width=18)


class Plain(nn.Module):
    """A block with positional arguments, as torch.export takes them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        others = {"context": context} if "context" in inspect.signature(self.block.forward).parameters else {}
        out: Tensor = self.block(x, **others, mask=mask)
        return out


def make(name: str) -> Plain:
    takes = inspect.signature(BLOCKS[name]).parameters
    options: dict[str, Any] = {"heads": 2, "dim_head": 8} if "dim_head" in takes else {}
    if "layout" in takes:
        options["layout"] = LAYOUT
    if name == "window":
        options |= {"window": 20}
    return Plain(BLOCKS[name](DIM, **options)).eval()


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.rand(2, n) < 0.8
    mask[:, -1] = True
    return torch.randn(2, n, DIM), torch.randn(2, 5, DIM), mask


def run_with_gradients(block: nn.Module, n: int) -> list[Tensor]:
    """The output at length n, then the gradients of x and of all weights."""
    with seeded(n):
        x, context, mask = inputs(n)
    x.requires_grad_()
    out = block(x, context, mask)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_exported_block_runs_at_other_lengths(name: str) -> None:
    block = make(name)
    length = Dim("length", min=2, max=LAYOUT.length)
    shapes = {"x": {1: length}, "context": {}, "mask": {1: length}}
    exported = torch.export.export(block, inputs(300), dynamic_shapes=shapes).module()
    for n in (300, 30, 340):
        given = inputs(n)
        assert relative_error(exported(*given), block(*given)) < 1e-5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", BLOCKS)
def test_block_compiled_by_the_default_backend_equals_eager(name: str) -> None:
    block = make(name)
    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(block, fullgraph=True, dynamic=True)
        for n in (30, 75):
            for want, got in zip(run_with_gradients(block, n), run_with_gradients(compiled, n), strict=True):
                assert relative_error(got, want) < 1e-5
    finally:
        torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_block_compiled_once_runs_at_other_lengths(name: str) -> None:
    block, counts = make(name), []
    counter = CompileCounterWithBackend("aot_eager")

    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
        for n in (300, 30, 340):
            for want, got in zip(run_with_gradients(block, n), run_with_gradients(compiled, n), strict=True):
                assert relative_error(got, want) < 1e-5
            counts.append(counter.frame_count)
        assert len(set(counts)) == 1, "a new length was compiled anew"
    finally:
        torch.compiler.reset()
