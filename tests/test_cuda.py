"""Layers and models on a CUDA device compute what they compute on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import LanguageModel, generate
from tests.cases import CASES, Case
from tests.formulas import relative_error

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def run(block: nn.Module, x: Tensor, others: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradients of the input and all weights."""
    x = x.detach().requires_grad_()
    out = block(x, **others)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    leaves = [x, *block.parameters()]
    found = torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)
    return [tensor.detach().cpu().double() for tensor in (out, *found)]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layer_on_the_device_equals_it_on_the_cpu(case: Case, padded: bool, dtype: torch.dtype) -> None:
    subject = case.subject(device="cuda")
    for length in case.lengths:
        padding = subject.paddings(length)["a mask with holes" if padded and length > 1 else "no mask"]
        block = subject.block(dtype=dtype)
        there = run(block, subject.x(length, dtype=dtype), padding.extra)
        wide = {name: value.cpu() for name, value in padding.extra.items()}
        wide = {name: value.double() if value.is_floating_point() else value for name, value in wide.items()}
        here = run(copy.deepcopy(block).cpu().double(), subject.x(length, dtype=dtype).cpu().double(), wide)
        for got, want in zip(there, here, strict=True):
            assert relative_error(got, want) < ERRORS[dtype] or float((got - want).abs().max()) < 1e-5


@pytest.mark.parametrize("attention", ["full", "gate_loop", ["simple_gate_loop", "full"]])
def test_a_model_on_the_device_trains_decodes_and_saves_as_on_the_cpu(attention: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel(num_tokens=64, dim=32, depth=2, attention=attention).double()
    tokens = torch.randint(64, (2, 33))
    ids = (torch.arange(33) // 12).expand(2, -1).contiguous()
    there = copy.deepcopy(model).cuda()
    for one, device in ((model, "cpu"), (there, "cuda")):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            one.loss(tokens.to(device), document_ids=ids.to(device)).backward()
            optimizer.step()
    for got, want in zip(there.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=1e-9, rtol=1e-6)
    new = generate(model, tokens[:, :9], 12, temperature=0)
    assert torch.equal(generate(there, tokens[:, :9].cuda(), 12, temperature=0).cpu(), new)
    there.save(tmp_path)
    assert torch.equal(generate(LanguageModel.load(tmp_path), tokens[:, :9], 12, temperature=0), new)
