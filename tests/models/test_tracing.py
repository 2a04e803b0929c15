"""Decoding under torch.compile and torch.export: no recompilation per token, and states as inputs and outputs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.export import Dim, ShapesCollection, export
from torch.utils import _pytree as pytree

from attention_zoo import BLOCKS, LanguageModel, TextImageLayout
from attention_zoo.models import LanguageModelState
from tests.attention.test_tracing import needs_compiler


def make(name: str) -> LanguageModel:
    torch.manual_seed(0)
    takes = inspect.signature(BLOCKS[name]).parameters
    options: dict[str, Any] = {"heads": 2, "dim_head": 8} if "dim_head" in takes else {}
    if "layout" in takes:
        options["layout"] = TextImageLayout(text_len=20, height=8, width=8)
    if name == "window":
        options |= {"window": 2, "sinks": 1}
    return LanguageModel(num_tokens=64, max_seq_len=64, dim=32, depth=2, attention=[(name, options)]).eval()


causal = pytest.mark.parametrize("name", [name for name in BLOCKS if name != "cross"])


@pytest.mark.slow
@causal
def test_compiled_step_does_not_recompile_after_the_first_tokens(name: str) -> None:
    torch.compiler.reset()
    model, counter = make(name), CompileCounter()
    compiled = torch.compile(model.step, backend=counter, fullgraph=True)
    tokens = torch.randint(0, 64, (2, 12))
    eager_state = state = None
    with torch.no_grad():
        for t in range(12):
            want, eager_state = model.step(tokens[:, t : t + 1], eager_state)
            got, state = compiled(tokens[:, t : t + 1], state)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            if t == 3:
                after_the_first = counter.frame_count
    assert counter.frame_count == after_the_first
    torch.compiler.reset()


class Step(nn.Module):
    """torch.export takes a module's forward."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: LanguageModelState) -> tuple[Tensor, LanguageModelState]:
        return self.model.step(tokens, state)


def growing(state: LanguageModelState, longer: LanguageModelState) -> ShapesCollection:
    """The axes of a state that grow with every token."""
    shapes = ShapesCollection()
    for now, then in zip(pytree.tree_leaves(state), pytree.tree_leaves(longer), strict=True):
        axes = {axis: Dim.DYNAMIC for axis in range(now.ndim) if now.shape[axis] != then.shape[axis]}
        if axes:
            shapes[now] = axes
    return shapes


@pytest.mark.slow
@causal
def test_exported_step_runs_at_other_lengths_and_returns_a_state(name: str) -> None:
    model, tokens = make(name), torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        (_, state), (_, longer) = model.step(tokens[:, :7]), model.step(tokens[:, :8])
        lengths = growing(state, longer)
        program = export(Step(model), (tokens[:, :1], state), dynamic_shapes=lengths).module()
        for n in (7, 13):
            _, state = model.step(tokens[:, :n])
            want, _ = model.step(tokens[:, n : n + 1], state)
            got, new = program(tokens[:, n : n + 1], state)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert isinstance(new, LanguageModelState)
            assert new.length == n + 1


@pytest.mark.slow
@needs_compiler
def test_training_compiled_by_inductor_has_the_losses_of_eager_at_every_length() -> None:
    def train(compiling: bool) -> list[float]:
        torch.manual_seed(0)
        model = LanguageModel(num_tokens=64, dim=32, depth=2, heads=2, attention=["full", "gate_loop"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss_of: Any = torch.compile(model.loss, backend=counter, fullgraph=True) if compiling else model.loss
        losses = []
        for n in (40, 33, 57, 64, 35):
            loss = loss_of(torch.randint(64, (2, n)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    try:
        for want, got in zip(train(False), train(True), strict=True):
            assert abs(got - want) < 1e-4
        assert counter.frame_count <= 2, "one graph for the first length, one for all others"
    finally:
        torch.compiler.reset()
