"""Data-parallel training on two processes equals training on one, and checkpoints resume on either number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import LanguageModel, Memformer, MultiStreamTransformer, Stack, TextToImageTransformer
from attention_zoo.models import Layer
from attention_zoo.ops.gate_loop import recurrence
from attention_zoo.ops.losses import LossTerm, total_loss
from attention_zoo.training import (
    DataParallelLoss,
    World,
    gather_weights,
    read_checkpoint,
    read_sharded,
    save_checkpoint,
    save_sharded,
    scatter_weights,
)
from attention_zoo.training.distributed import find_units
from tests.formulas import relative_error

STEPS, HALF = 20, 10
SMALL: dict[str, Any] = {"num_tokens": 32, "dim": 16, "depth": 3}
HYBRID: dict[str, Any] = {
    "attention": ["gate_loop", ("full", {"heads": 2, "kv_heads": 1, "dim_head": 8})],
    "tie_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    # all layers share one relative bias, so FSDP cannot wrap them one by one
    "full": {"heads": 2, "dim_head": 8, "positions": "t5", "checkpoint_layers": True},
    # As many heads as channels: the angle of a gate near 0 is ill-conditioned, and with two heads rounding errors grow
    # by a factor of 1e7 in 20 steps, also in one process.
    "gate loop": {"attention": "gate_loop"},
    "hybrid": HYBRID,
    "dropout": {**HYBRID, "ff_dropout": 0.2},
}
DETERMINISTIC = ("full", "gate loop", "hybrid")  # models without dropout
STRATEGIES = ("ddp", "fsdp")


class Encoder(nn.Module):
    """A model with two inputs and two loss terms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 4).double()

    def loss_terms(self, source: Tensor, target: Tensor, *, target_mask: Tensor, scale: Tensor) -> list[LossTerm]:
        errors = (self.linear(source) - target).square().mean(dim=2) * scale
        count = target_mask.sum()
        first = torch.where(target_mask, errors, 0).sum() / count.clamp(min=1)
        return [LossTerm(first, count), LossTerm(errors.abs().mean(), torch.tensor(len(source)), weight=0.3)]

    def loss(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        return total_loss(self.loss_terms(*inputs, **options))


def image_model() -> nn.Module:
    torch.manual_seed(4)
    return TextToImageTransformer(
        num_text_tokens=20, text_len=4, num_image_tokens=9, height=2, width=2, dim=16, depth=2, heads=2, dim_head=8,
        attention=["axial_row", "conv"],
    ).double()  # fmt: skip


def multi_stream_model() -> nn.Module:
    torch.manual_seed(5)
    return MultiStreamTransformer(
        num_tokens=32, dim=16, depth=2, streams=2, heads=2, dim_head=8, attention="talking_heads", causal=True
    ).double()


def segment_model() -> nn.Module:
    torch.manual_seed(6)
    return Memformer(
        dim=16, memory_slots=3, memory_heads=2, enc_num_tokens=11, enc_depth=1, enc_heads=2, dec_num_tokens=11,
        dec_depth=1, dec_heads=2,
    ).double()  # fmt: skip


def up_to(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


TOKENS = torch.arange(5 * 6).view(5, 6)
SOURCE, TARGET = torch.linspace(-1, 1, 2 * 5 * 4 * 4, dtype=torch.float64).view(2, 5, 4, 4).sin()
# Constructor, positional and keyword arguments of the loss; valid tokens are unevenly distributed over the rows.
LOSSES: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any]]] = {
    "two inputs": (Encoder, (SOURCE, TARGET), {"target_mask": up_to([1, 4, 2, 0, 1], 4), "scale": torch.tensor(2.0)}),
    "no targets": (Encoder, (SOURCE, TARGET), {"target_mask": up_to([0] * 5, 4), "scale": torch.tensor(1.0)}),
    "images": (image_model, (TOKENS[:, :4] % 19 + 1, TOKENS[:, :4] % 9), {"mask": up_to([1, 4, 2, 4, 3], 4)}),
    "streams": (multi_stream_model, (TOKENS,), {"mask": up_to([2, 3, 2, 6, 6], 6), "diversity_weight": 0.1}),
    "segments": (
        segment_model,
        (TOKENS % 11, TOKENS[:, 1:] % 11),
        {"mask": up_to([1, 4, 6, 6, 3], 6), "target_mask": up_to([2, 3, 2, 5, 5], 5)},
    ),
}


def train_on_losses(
    model: nn.Module, loss_fn: Any, arguments: tuple[Tensor, ...], options: dict[str, Any]
) -> list[float]:
    """Losses of a few steps of gradient descent."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        loss = loss_fn(*arguments, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Run:
    """A small training run on one or several processes."""

    def __init__(self, name: str, strategy: str = "single", *, evaluating: bool = False) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(**SMALL, **MODELS[name])
        self.loss = DataParallelLoss(self.model, World.current(), strategy=strategy)
        self.evaluating = evaluating
        if evaluating:
            self.evaluate()
        weights = list(self.model.parameters())
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.generator = torch.Generator().manual_seed(1)

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "generator")}

    def train(self, steps: int) -> list[float]:
        """Train on five rows, split unevenly over two processes, as are their valid tokens."""
        losses = []
        for _ in range(steps):
            tokens = torch.randint(32, (5, 24), generator=self.generator)
            mask = torch.arange(24) < torch.tensor([2, 3, 9, 24, 20])[:, None]
            loss = self.loss(tokens, mask=mask)
            self.optimizer.zero_grad()
            loss.backward()
            if self.evaluating:
                self.evaluate()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def evaluate(self) -> float:
        """A loss without backward, which unshards the parameters of FSDP."""
        self.model.eval()
        loss = self.loss(torch.arange(20).view(2, 10))
        self.model.train()
        return loss.item()


def error_message(action: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def train_in_two(rank: int, folder: Path) -> None:
    """Run by each of two processes: everything that needs two, with the results written to a file."""
    torch.set_num_threads(1)
    recurrence.HAS_NUMBA = False
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found: dict[str, Any] = {
        "seed": {},
        "losses": {},
        "weights": {},
        "resumed": {},
        "from one": {},
        "from a file": {},
        "evaluating": {},
        "models": {},
    }
    for strategy in STRATEGIES:
        for name in MODELS:
            key, run = (strategy, name), Run(name, strategy)
            found["seed"][key] = torch.initial_seed()
            losses = run.train(HALF)
            run.evaluate()
            path = folder / f"{strategy} {name}"
            save_sharded(path, **run.parts(), step=HALF, extra={"losses": losses})
            found["losses"][key] = losses + run.train(STEPS - HALF)
            found["weights"][key] = gather_weights(run.model)
            if name == "dropout":
                again = Run(name, strategy)
                again.train(1)
                again.evaluate()
                read_sharded(path).restore(**again.parts())
                found["resumed"][key] = again.train(STEPS - HALF)
        found["evaluating"][strategy] = Run("hybrid", strategy, evaluating=True).train(HALF)
        other = Run("hybrid", strategy)
        read_sharded(folder / "of one process").restore(**other.parts())
        found["from one"][strategy] = other.train(STEPS - HALF)
        other = Run("hybrid", strategy)
        other.evaluate()
        read_checkpoint(folder / "plain.pt").restore(**other.parts())
        found["from a file"][strategy] = other.train(STEPS - HALF)
        found["few rows", strategy] = error_message(lambda other=other: other.loss(torch.zeros(1, 5, dtype=torch.long)))
    for strategy in STRATEGIES:
        for name in ("images", "streams", "segments"):
            make, arguments, options = LOSSES[name]
            model = make()
            unused = name == "segments"  # a single segment does not use the memory that is written
            loss_fn = DataParallelLoss(model, World.current(), strategy=strategy, unused_parameters=unused)
            found["models"][strategy, name] = train_on_losses(model, loss_fn, arguments, options)
    found["single"] = error_message(lambda: Run("full", "single"))
    found["unused"] = unused_parameters()
    found["save"] = error_message(lambda: other.model.save(folder / "never"), TypeError)
    found["once"] = error_message(lambda: World.current().once(fail), OSError)
    found["oddly"] = error_message(lambda: World.current().once(fail_oddly), RuntimeError)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a regular interpreter shutdown


@pytest.fixture(scope="module", autouse=True)
def _without_compiling() -> Iterator[None]:
    """Disable numba, which compiles for ten seconds per process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "HAS_NUMBA", False)
        yield


class Odd(Exception):
    """An exception that pickle cannot restore."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def fail() -> None:
    raise OSError(28, "No space left on device")


def fail_oddly() -> None:
    raise Odd("this", "that")


class Half(nn.Module):
    """A model with unused parameters and without `loss_terms`."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.used(tokens[:, :4].float()).mean()


def unused_parameters() -> float:
    loss_fn = DataParallelLoss(Half(), World.current(), strategy="ddp", unused_parameters=True)
    for _ in range(3):
        loss = loss_fn(torch.ones(2, 5))
        loss.backward()
    return loss.item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two processes, and two checkpoints of one process that they resumed from."""
    folder = tmp_path_factory.mktemp("two")
    one = Run("hybrid")
    one.train(HALF)
    save_sharded(folder / "of one process", **one.parts(), step=HALF)
    save_checkpoint(folder / "plain.pt", **one.parts(), step=HALF)
    torch.multiprocessing.spawn(train_in_two, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses and weights of training on one process."""
    found = {}
    for name in DETERMINISTIC:
        run = Run(name)
        found[name] = run.train(STEPS), run.model.state_dict()
    return found


strategies = pytest.mark.parametrize("strategy", STRATEGIES)
slow = pytest.mark.slow  # starts two processes
Alone = dict[str, tuple[list[float], dict[str, Tensor]]]


def results(folder: Path, rank: int = 0) -> dict[Any, Any]:
    found: dict[Any, Any] = torch.load(folder / f"{rank}.pt")
    return found


def differences(got: list[float], want: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(got, want, strict=True)]


@slow
@strategies
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_losses_and_weights_of_two_processes_equal_those_of_one(
    folder: Path, alone: Alone, strategy: str, name: str
) -> None:
    found, (losses, weights) = results(folder), alone[name]
    apart = differences(found["losses"][strategy, name], losses)
    assert apart[0] < 1e-6
    assert max(apart) < 1e-4
    assert found["weights"][strategy, name].keys() == weights.keys()
    for key, weight in weights.items():
        assert relative_error(found["weights"][strategy, name][key], weight) < 1e-3


@slow
@strategies
def test_loss_is_global_and_weights_are_gathered_on_rank_zero(folder: Path, strategy: str) -> None:
    first, second = results(folder), results(folder, 1)
    assert first["losses"][strategy, "full"] == second["losses"][strategy, "full"]
    assert not second["weights"]["fsdp", "full"]


@slow
@strategies
def test_resumed_run_repeats_losses_with_dropout_exactly(folder: Path, strategy: str) -> None:
    for rank in (0, 1):
        found, key = results(folder, rank), (strategy, "dropout")
        assert found["resumed"][key] == found["losses"][key][HALF:]


@slow
@strategies
def test_evaluation_does_not_change_training(folder: Path, alone: Alone, strategy: str) -> None:
    """FSDP must reshard after an evaluation, before an optimizer is created or stepped."""
    assert max(differences(results(folder)["evaluating"][strategy], alone["hybrid"][0][:HALF])) < 1e-4


@slow
@strategies
def test_dropout_differs_between_ranks(folder: Path, strategy: str) -> None:
    seeds = [results(folder, rank)["seed"][strategy, "dropout"] for rank in (0, 1)]
    assert seeds[0] != seeds[1]


@slow
@strategies
@pytest.mark.parametrize("origin", ["from one", "from a file"])
def test_two_processes_resume_from_the_checkpoint_of_one(
    folder: Path, alone: Alone, strategy: str, origin: str
) -> None:
    assert max(differences(results(folder)[origin][strategy], alone["hybrid"][0][HALF:])) < 1e-4


@slow
@strategies
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_one_process_resumes_from_the_shards_of_two(
    folder: Path, alone: Alone, tmp_path: Path, strategy: str, name: str
) -> None:
    run, checkpoint = Run(name), read_sharded(folder / f"{strategy} {name}")
    checkpoint.restore(**run.parts())
    assert checkpoint.step == HALF
    run.model.save(tmp_path)
    tokens = torch.randint(32, (2, 9))
    assert torch.equal(LanguageModel.load(tmp_path)(tokens), run.model(tokens))
    losses = checkpoint.extra["losses"] + run.train(STEPS - HALF)
    assert max(differences(losses, alone[name][0])) < 1e-4


@slow
@strategies
def test_loss_rejects_fewer_rows_than_processes(folder: Path, strategy: str) -> None:
    assert results(folder)["few rows", strategy] == "batch must have at least one row for each of 2 processes, got 1"


@slow
def test_single_strategy_and_sharded_save_are_rejected_with_two_processes(folder: Path) -> None:
    found = results(folder)
    assert found["single"] == "strategy must be 'ddp' or 'fsdp' with 2 processes, got strategy='single'"
    assert "training.gather_weights(model)" in found["save"]
    assert not (folder / "never").exists()


@slow
def test_exception_on_rank_zero_is_raised_on_all_ranks(folder: Path) -> None:
    assert "No space left" in results(folder, 1)["once"]
    assert "this and that" in results(folder, 1)["oddly"]


@slow
def test_ddp_supports_unused_parameters(folder: Path) -> None:
    assert results(folder)["unused"] == results(folder, 1)["unused"]


@dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks that are threads of one process."""

    values: list[Tensor | None] = field(default_factory=list)
    barrier: Barrier = field(default_factory=lambda: Barrier(2))

    def sum(self, value: Tensor) -> Tensor:
        self.values[self.rank] = value.detach()
        self.barrier.wait()
        total = sum(self.values)
        self.barrier.wait()
        return total


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_term_is_averaged_over_the_targets_of_all_ranks(name: str) -> None:
    make, arguments, options = LOSSES[name]
    model = make()
    loss = model.loss(*arguments, **options)
    loss.backward()
    values, barrier, replicas = [None, None], Barrier(2), [make(), make()]

    def work(rank: int) -> float:
        loss_fn = DataParallelLoss(replicas[rank], World(), strategy="single")
        loss_fn.world = ThreadWorld(rank, 2, values=values, barrier=barrier)
        loss = loss_fn(*arguments, **options)
        loss.backward()
        return loss.item()

    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(work, (0, 1)))
    assert losses == pytest.approx([loss.item()] * 2, abs=1e-12)
    for weight, *local in zip(*(model.parameters() for model in (model, *replicas)), strict=True):
        gradients = [torch.zeros_like(weight) if x.grad is None else x.grad for x in (weight, *local)]
        torch.testing.assert_close((gradients[1] + gradients[2]) / 2, gradients[0], rtol=0, atol=1e-12)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process only."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_fsdp_on_one_process_equals_the_plain_model_and_resumes(tmp_path: Path) -> None:
    plain, sharded = Run("hybrid"), Run("hybrid", "fsdp")
    losses = plain.train(4)
    assert max(differences(sharded.train(2), losses[:2])) < 1e-6
    save_sharded(tmp_path, **sharded.parts(), step=2)
    with pytest.raises(ValueError, match="model must not be sharded: use save_sharded"):
        save_checkpoint(tmp_path / "file", **sharded.parts(), step=2)
    for strategy in ("single", "fsdp"):
        resumed = Run("hybrid", strategy)
        read_sharded(tmp_path).restore(**resumed.parts())
        assert max(differences(resumed.train(2), losses[2:])) < 1e-6
    assert gather_weights(resumed.model).keys() == plain.model.state_dict().keys()


@slow
@strategies
@pytest.mark.parametrize("name", ["images", "streams", "segments"])
def test_two_processes_have_the_losses_of_one_for_every_kind_of_model(folder: Path, strategy: str, name: str) -> None:
    make, arguments, options = LOSSES[name]
    model = make()
    want = train_on_losses(model, model.loss, arguments, options)
    for rank in (0, 1):
        assert max(differences(results(folder, rank)["models"][strategy, name], want)) < 1e-9


def test_loss_rejects_tensors_of_different_batch_sizes() -> None:
    loss_fn = DataParallelLoss(Encoder(), World(), strategy="single")
    loss_fn.world = World(size=2)
    with pytest.raises(ValueError, match=r"inputs must have one size of the batch axis, got \[2, 4\]"):
        loss_fn(torch.zeros(4, 1, 4), target=torch.zeros(2, 1, 4))


def test_loss_rejects_strategies_that_do_not_fit_the_world() -> None:
    model = LanguageModel(**SMALL)
    with pytest.raises(ValueError, match="got strategy='dpd'; did you mean 'ddp'"):
        DataParallelLoss(model, World(), strategy="dpd")
    with pytest.raises(ValueError, match="strategy must be 'single' without a process group, got strategy='ddp'"):
        DataParallelLoss(model, World(), strategy="ddp")


def test_loss_rejects_invalid_models_and_masks() -> None:
    with pytest.raises(TypeError, match=r"model must have a method loss_terms or loss, got Linear"):
        DataParallelLoss(nn.Linear(2, 2), World(), strategy="single")
    with pytest.raises(TypeError, match=r"unused_parameters must be a bool, got unused_parameters='no'"):
        DataParallelLoss(LanguageModel(**SMALL), World(), strategy="single", unused_parameters="no")
    loss_fn = DataParallelLoss(LanguageModel(**SMALL), World(), strategy="single")
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        loss_fn(torch.zeros(2, 5, dtype=torch.long), mask=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask must be \(b, n\) = \(2, 5\), got shape \(2, 4\)"):
        loss_fn(torch.zeros(2, 5, dtype=torch.long), mask=torch.ones(2, 4, dtype=torch.bool))


def test_scatter_weights_rejects_a_state_dict_of_another_model() -> None:
    model = nn.Linear(2, 3)
    for weights, message in (
        ({"weight": torch.ones(3, 2)}, r"weights must have \(3,\) as 'bias', got none"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, r"weights must have \(3, 2\) as 'weight', got \(2, 3\)"),
        ({**model.state_dict(), "more": torch.ones(1)}, r"weights must have none as 'more', got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scatter_weights(model, weights)


def test_fsdp_wraps_layers_that_do_not_share_parameters() -> None:
    plain = nn.Sequential(Stack(16, 3), nn.Linear(16, 4))
    assert find_units(plain) == list(plain[0].layers)
    assert all(isinstance(unit, Layer) for unit in find_units(plain))
    shared = Stack(16, 3, shared_ff_ids=[0, 1, 0])
    assert find_units(shared) == [shared.layers[1]]
    assert find_units(Stack(16, 3, reversible=True)) == []
    assert find_units(nn.Linear(3, 3)) == []
    assert find_units(multi_stream_model()) == []  # the diversity loss calls parts of layers
