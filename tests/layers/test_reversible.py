"""Reversible streams: gradients of plain backpropagation without its memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from attention_zoo import Stack
from attention_zoo.layers.reversible import run_forward
from attention_zoo.models.stack import BlockInputs
from attention_zoo.testing.subject import seeded
from tests.formulas import relative_error


def stack(depth: int = 3, dim: int = 16, **options: Any) -> Stack:
    with seeded(0):
        return Stack(dim, depth, heads=2, dim_head=8, reversible=True, layer_scale=True, **options)


def plain(model: Stack, x: Tensor) -> Tensor:
    inputs = BlockInputs()
    subs = [sub for layer in model.layers for sub in layer.sublayers]
    first, second = run_forward([lambda x, sub=sub: sub.delta(x, inputs) for sub in subs], x, x)
    return model.norm((first + second) / 2)


def gradients(model: Stack, out: Tensor, x: Tensor) -> list[Tensor]:
    with seeded(7):
        weight = torch.randn(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"shared_ff_ids": [0], "residual": "sandwich"}], ids=["plain", "shared"])
def test_reversible_gradients_equal_those_of_plain_backpropagation(options: dict[str, Any], training: bool) -> None:
    model = stack(**options).double().train(training)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    for got, want in zip(gradients(model, model(x), x), gradients(model, plain(model, x), x), strict=True):
        assert relative_error(got, want) < 1e-10


def test_reversible_streams_replay_dropout_and_restore_the_random_state() -> None:
    model = stack(ff_dropout=0.5).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (model, lambda x: plain(model, x)):
        torch.manual_seed(3)
        found.append([*gradients(model, run(x), x), torch.rand(1)])
    assert all(relative_error(got, want) < 1e-10 for got, want in zip(*found, strict=True))


def test_reversible_gradients_under_autocast_equal_those_of_plain_backpropagation() -> None:
    model = stack()
    x = torch.randn(2, 9, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = model(x), plain(model, x)
    for a, b in zip(gradients(model, got, x), gradients(model, want, x), strict=True):
        assert relative_error(a, b) < 3e-2


def test_reversible_streams_handle_frozen_modules_and_inputs_without_gradient() -> None:
    model = stack()
    model.layers[1].requires_grad_(False)
    model(torch.randn(2, 5, 16)).sum().backward()
    assert model.layers[0].sublayers[0].block.to_qkv.weight.grad is not None
    assert model.layers[1].sublayers[0].block.to_qkv.weight.grad is None


def test_memory_saved_by_reversible_streams_is_independent_of_depth() -> None:
    def kept(depth: int) -> int:
        model, sizes = stack(depth), []
        parameters = {p.data_ptr() for p in model.parameters()}

        def count(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(torch.randn(2, 50, 16, requires_grad=True))
        return sum(sizes)

    assert kept(2) == kept(8)


def test_second_derivative_of_reversible_streams_raises() -> None:
    model = stack()
    x = torch.randn(1, 5, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative: use reversible=False"):
        torch.autograd.grad(model(x).square().sum() + x.square().sum(), x, create_graph=True)


def train_a_part(rank: int, store: str, parts: Tensor, out: str) -> None:
    """One of two processes: the gradients that DDP leaves after a step on its part of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(stack())
    model(parts[rank]).square().sum().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in model.parameters()], out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there abort an interpreter that shuts down in order


@pytest.mark.slow
def test_ddp_averages_gradients_of_reversible_streams(tmp_path: Path) -> None:
    parts = torch.randn(2, 2, 9, 16)
    arguments = (str(tmp_path / "store"), parts, str(tmp_path / "grads.pt"))
    torch.multiprocessing.spawn(train_a_part, arguments, nprocs=2)
    model = stack()
    (model(parts[0]).square().sum() / 2 + model(parts[1]).square().sum() / 2).backward()
    for got, parameter in zip(torch.load(tmp_path / "grads.pt"), model.parameters(), strict=True):
        assert relative_error(got, parameter.grad) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "post"}, "residual must add to the stream with reversible=True, got residual='post'"),
        ({"attention": [["full", "cross"]]}, "reversible must be False with blocks that read a context"),
    ],
)
def test_stack_rejects_options_that_cannot_be_reversible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack(**options)
