"""What a masked token holds reaches no valid output and no gradient, whatever it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import BiasedMemoryUpdate, MemoryUpdate, Stack
from tests.cases import CASES, Case, one_per_block

BAD = [torch.nan, torch.inf, -torch.inf, 1e30, 3e38]


def fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask[..., None] if x.ndim == 3 else mask[:, None, :, None], x, torch.tensor(value))


def same(got: Tensor, want: Tensor) -> bool:
    return bool(got.isfinite().all()) and float((got - want).norm()) <= 1e-5 * max(float(want.norm()), 1e-3)


@pytest.mark.parametrize("case", one_per_block(CASES))
def test_outputs_and_gradients_do_not_depend_on_masked_content(case: Case) -> None:
    subject = case.subject()
    n = min(41, max(subject.lengths))
    block, x, weight = subject.block(), subject.x(n), subject.x(n, seed=5)
    others = {name: value for name, value in subject.others(n).items() if name not in ("mask", "context_mask")}
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(x.shape[0], n, generator=generator) < 0.7
    weight = fill(weight, mask, 0.0)
    masks: dict[str, Any] = {"mask": mask}
    if "context" in others:
        masks["context_mask"] = torch.rand(others["context"].shape[:2], generator=generator) < 0.7

    def run(value: float | None) -> tuple[Tensor, list[Tensor]]:
        inputs, given = x, dict(others)
        if value is not None:
            inputs = fill(x, mask, value)
            if "context" in given:
                given["context"] = fill(given["context"], masks["context_mask"], value)
        inputs = inputs.clone().requires_grad_()
        out = block(inputs, **given, **masks)
        gradients = torch.autograd.grad((out * weight).sum(), [inputs, *block.parameters()], materialize_grads=True)
        return fill(out, mask, 0.0).detach(), list(gradients)

    want, want_gradients = run(None)
    for value in BAD:
        got, gradients = run(value)
        assert same(got, want), f"outputs with {value}"
        for gradient, other in zip(gradients[1:], want_gradients[1:], strict=True):
            assert same(gradient, other), f"gradients with {value}"
        assert gradients[0].isfinite().all(), f"gradient of x with {value}"


@pytest.mark.parametrize("value", BAD)
def test_stacks_and_memories_do_not_depend_on_masked_content(value: float) -> None:
    torch.manual_seed(0)
    x, memory = torch.randn(2, 9, 24), torch.randn(2, 3, 24)
    mask = torch.rand(2, 9) < 0.6
    mask[:, 0] = True
    stack, update = Stack(24, 2, attention=["full", "gate_loop"]), MemoryUpdate(24, heads=2)
    biased = BiasedMemoryUpdate(24, memory_slots=3, heads=2)
    for module, call in (
        (stack, lambda x: stack(x, mask=mask)[mask]),
        (stack, lambda x: stack.step(x, mask=mask)[0][mask]),
        (update, lambda x: update(memory, x, mask=mask)),
        (biased, lambda x: biased(memory, x, mask=mask)),
    ):
        parameters = list(module.parameters())
        want, got = call(x), call(fill(x, mask, value))
        assert same(got, want)
        gradients = [torch.autograd.grad(out.square().sum(), parameters, allow_unused=True) for out in (got, want)]
        for one, other in zip(*gradients, strict=True):
            assert one is None or same(one, other)


def test_finite_content_of_masked_tokens_stays() -> None:
    case = next(case for case in CASES if case.name == "full")
    block = case.make().eval()
    x = torch.randn(1, 5, 32)
    mask = torch.tensor([[True, True, True, True, False]])
    other = x.clone()
    other[:, 4] *= 2
    assert not torch.equal(block(x, mask=mask)[:, 4], block(other, mask=mask)[:, 4])


@pytest.mark.parametrize("name", ["gate_loop", "simple_gate_loop"])
def test_recurrences_per_channel_isolate_later_tokens_that_are_not_finite(name: str) -> None:
    block = next(case for case in CASES if case.name == name).make().eval()
    x = torch.randn(2, 20, 32)
    other = x.clone()
    other[:, 12:] = torch.nan
    assert torch.equal(block(x)[:, :12], block(other)[:, :12])
