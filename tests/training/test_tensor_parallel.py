"""Tensor parallelism on two processes equals the plain model on one."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from attention_zoo import FullAttention, LanguageModel, TextToImageTransformer, generate
from attention_zoo.attention.base import SelfAttention
from attention_zoo.training import gather_weights, scatter_weights, tensor_parallel_plan
from attention_zoo.training.tensor_parallel import rows_by_process
from tests.formulas import relative_error

HEADS: dict[str, Any] = {"heads": 4, "dim_head": 8}


def language_model() -> nn.Module:
    attention = [
        ("full", {**HEADS, "kv_heads": 2, "qkv_bias": True, "out_bias": True}),
        "cosine_sim",
        "gate_loop",
        "talking_heads",
    ]
    return LanguageModel(
        num_tokens=32, dim=32, depth=4, attention=attention, feedforward="swiglu", positions="rotary",
        ff_dropout=0.1, attn_dropout=0.1,
    )  # fmt: skip


def image_model() -> nn.Module:
    return TextToImageTransformer(
        num_text_tokens=20, text_len=4, num_image_tokens=9, height=4, width=4, dim=32, depth=4,
        attention=["axial_row", "axial_col", "conv", "block_sparse"], **HEADS,
    )  # fmt: skip


def loss_of(model: Any, k: int) -> Tensor:
    """Loss of the k-th batch, equal on all ranks, with the same dropout."""
    torch.manual_seed(k)
    if isinstance(model, LanguageModel):
        mask = torch.ones(2, 13, dtype=torch.bool)
        mask[0, 9:] = False
        return model.loss(torch.randint(32, (2, 13)), mask=mask)
    return model.loss(torch.randint(1, 20, (2, 4)), torch.randint(9, (2, 16)))


def train(model: nn.Module) -> list[float]:
    losses = []
    for k in range(4):
        loss = loss_of(model.eval(), k)
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.3 * parameter.grad
        losses.append(loss.item())
    return losses


def work(rank: int, folder: Path) -> None:
    """Run by each of two processes."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for make in (language_model, image_model):
        torch.manual_seed(0)
        model = make()
        whole = sum(parameter.numel() for parameter in model.parameters())
        parallelize_module(model, mesh, tensor_parallel_plan(model, 2))
        local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
        losses, weights = train(model), gather_weights(model)
        found[make.__name__] = losses, weights, local / whole
        again = make()
        parallelize_module(again, mesh, tensor_parallel_plan(again, 2))
        scatter_weights(again, torch.load(folder / f"{make.__name__}.pt"))
        found[make.__name__, "loaded"] = gather_weights(again)
        if make is language_model:
            found["text"] = generate(again.eval(), torch.arange(5)[None], 6, temperature=0)
            model.train()
            found["dropout"] = loss_of(model, 9).item()
    with pytest.raises(ValueError, match=r"model must not be parallelized already, but stack\.layers\.0\.\S+ is"):
        tensor_parallel_plan(again, 2)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a regular interpreter shutdown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    for make in (language_model, image_model):
        torch.manual_seed(1)
        torch.save(make().state_dict(), folder / f"{make.__name__}.pt")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("make", [language_model, image_model])
def test_training_equals_the_plain_model(folder: Path, make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    want = train(model)
    for rank in (0, 1):
        losses, weights, share = torch.load(folder / f"{rank}.pt")[make.__name__]
        assert all(abs(a - b) < 1e-5 for a, b in zip(losses, want, strict=True))
        assert 0.5 <= share < 0.9
    losses, weights, _ = torch.load(folder / "0.pt")[make.__name__]
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert relative_error(weights[name], weight) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("make", [language_model, image_model])
def test_gathered_weights_equal_the_scattered_weights(folder: Path, make: Any) -> None:
    loaded = torch.load(folder / "0.pt")[make.__name__, "loaded"]
    for name, weight in torch.load(folder / f"{make.__name__}.pt").items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.slow
def test_generated_text_equals_that_of_the_plain_model(folder: Path) -> None:
    model = language_model().eval()
    model.load_state_dict(torch.load(folder / "language_model.pt"))
    want = generate(model, torch.arange(5)[None], 6, temperature=0)
    for rank in (0, 1):
        assert torch.equal(torch.load(folder / f"{rank}.pt")["text"], want)


@pytest.mark.slow
def test_dropout_is_equal_on_all_ranks(folder: Path) -> None:
    first, second = (torch.load(folder / f"{rank}.pt")["dropout"] for rank in (0, 1))
    assert first == second


@pytest.mark.parametrize("make", [language_model, image_model])
def test_mesh_of_one_process_equals_the_plain_model(make: Any) -> None:
    torch.manual_seed(0)
    plain = make()
    parallel = deepcopy(plain)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallelize_module(parallel, init_device_mesh("cpu", (1,)), tensor_parallel_plan(parallel, 1))
        assert loss_of(parallel.eval(), 0).item() == pytest.approx(loss_of(plain.eval(), 0).item(), abs=1e-6)
        for want in (plain.state_dict(), make().state_dict()):
            scatter_weights(parallel, want)
            for name, weight in gather_weights(parallel).items():
                assert torch.equal(weight, want[name]), name
    finally:
        torch.distributed.destroy_process_group()


def test_rows_of_each_process_are_contiguous() -> None:
    rows = rows_by_process({"q": 4, "k": 2, "v": 2}, 2)
    assert rows.tolist() == [0, 1, 4, 6, 2, 3, 5, 7]


class Own(FullAttention):
    """A user-defined block, whose heads may depend on each other."""


def test_plan_leaves_modules_with_dependent_heads_replicated() -> None:
    def planned(**options: Any) -> set[str]:
        plan = tensor_parallel_plan(LanguageModel(num_tokens=8, dim=16, depth=1, **options), 2)
        return {name.rpartition(".")[2] for name in plan}

    feedforward = {"to_hidden", "to_out"}
    assert planned() == feedforward | {"block"}
    assert planned(feedforward="geglu") == feedforward | {"block", "to_gate"}
    assert planned(attention="talking_heads") == planned(attention="gate_loop") == feedforward
    assert planned(positions="t5") == planned(attention=Own) == feedforward
    assert issubclass(Own, SelfAttention)


def test_plan_rejects_sizes_that_are_not_divisible() -> None:
    def plan(processes: int, attention: Any = "full", **options: Any) -> None:
        tensor_parallel_plan(LanguageModel(num_tokens=8, dim=16, depth=1, attention=attention, **options), processes)

    with pytest.raises(ValueError, match=r"heads must be a multiple of the 3 processes, got 8 in stack\.layers\.0"):
        plan(3)
    with pytest.raises(ValueError, match="kv_heads must be a multiple of the 4 processes, got 2"):
        plan(4, ("full", {"kv_heads": 2}))
    with pytest.raises(ValueError, match="hidden_features must be a multiple of the 2 processes, got 25"):
        plan(2, ff_mult=25 / 16)
    with pytest.raises(ValueError, match="processes must be at least 1, got processes=0"):
        plan(0)
    with pytest.raises(ValueError, match="model must contain the modules to parallelize, not be one"):
        tensor_parallel_plan(FullAttention(16), 2)
