"""Gate loop layers under torch.compile and torch.export: one graph for all lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from attention_zoo import GateLoopAttention, RelativeGateAttention, SimpleGateLoop
from tests.formulas import relative_error

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "gate_loop": lambda: GateLoopAttention(16, sub_norm=True),
    "gate_loop, 4 heads": lambda: GateLoopAttention(16, heads=4),
    "simple_gate_loop": lambda: SimpleGateLoop(16),
    "relative_gate": lambda: RelativeGateAttention(16, heads=2, dim_head=8),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


@pytest.mark.slow  # test_tracing.py compiles each block with a mask
@blocks
def test_gate_loop_compiled_once_runs_at_every_length(name: str) -> None:
    block, counts = BLOCKS[name](), []
    counter = CompileCounterWithBackend("aot_eager")

    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
        for n in (65, 7, 131):
            found = []
            for run in (block, compiled):
                x = torch.linspace(-2, 2, 2 * n * 16).view(2, n, 16).sin().requires_grad_()
                out = run(x)
                found.append((out, *torch.autograd.grad(out.square().sum(), (x, *block.parameters()))))
            for want, got in zip(*found, strict=True):
                assert relative_error(got, want) < 1e-5
            counts.append(counter.frame_count)
        assert len(set(counts)) == 1, "a new length was compiled anew"
    finally:
        torch.compiler.reset()


@pytest.mark.slow
@blocks
def test_exported_gate_loop_runs_at_other_lengths(name: str) -> None:
    block = BLOCKS[name]().eval()
    length = torch.export.Dim("n", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(block, (torch.randn(2, 33, 16),), dynamic_shapes={"x": {1: length}}).module()
        for n in (12, 131):
            x = torch.randn(2, n, 16)
            assert relative_error(exported(x), block(x)) < 1e-5
