"""Two processes train as one does: the same losses, the same weights, and checkpoints that either goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import LanguageModel, Stack
from attention_zoo.models import Layer
from attention_zoo.ops.gate_loop import recurrence
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
    # every layer has the bias of all, so that FSDP cannot take the layers one by one
    "full": {"heads": 2, "dim_head": 8, "positions": "t5", "checkpoint_layers": True},
    # Not fewer heads than channels: the angle of a gate near 0 is anyone's guess, and with two heads rounding alone
    # grows ten-million-fold in 20 steps, in one process too.
    "gate loop": {"attention": "gate_loop"},
    "hybrid": HYBRID,
    "dropout": {**HYBRID, "ff_dropout": 0.2},
}
NUMBERS = ("full", "gate loop", "hybrid")  # those whose losses do not hang on who draws the dropout
STRATEGIES = ("ddp", "fsdp")


class Run:
    """A small model in training, alone or in several processes."""

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
        """Steps on five rows, of which one process gets three; most of the real tokens are in the last rows."""
        losses = []
        for _ in range(steps):
            tokens = torch.randint(32, (5, 24), generator=self.generator)
            mask = torch.arange(24) < torch.tensor([2, 3, 9, 24, 20])[:, None]
            loss = self.loss(tokens, mask)
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
        """A loss without backward, after which FSDP has gathered weights where its shards were."""
        self.model.eval()
        loss = self.loss(torch.arange(20).view(2, 10))
        self.model.train()
        return loss.item()


def complaint(action: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def train_in_two(rank: int, folder: Path) -> None:
    """One of two processes: does all that takes two, and leaves what it found."""
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
        found["few rows", strategy] = complaint(lambda other=other: other.loss(torch.zeros(1, 5, dtype=torch.long)))
    found["single"] = complaint(lambda: Run("full", "single"))
    found["unused"] = unused_parameters()
    found["save"] = complaint(lambda: other.model.save(folder / "never"), TypeError)
    found["once"] = complaint(lambda: World.current().once(fail), OSError)
    found["oddly"] = complaint(lambda: World.current().once(fail_oddly), RuntimeError)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there abort an interpreter that shuts down in order


@pytest.fixture(scope="module", autouse=True)
def _without_compiling() -> Iterator[None]:
    """numba compiles for ten seconds in every process, which is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "HAS_NUMBA", False)
        yield


class Odd(Exception):
    """Cannot be made again from what it keeps."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def fail() -> None:
    raise OSError(28, "No space left on device")


def fail_oddly() -> None:
    raise Odd("this", "that")


class Half(nn.Module):
    """A model that leaves half of itself unused."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def loss(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.used(tokens[:, :4].float()).mean()


def unused_parameters() -> float:
    loss_of = DataParallelLoss(Half(), World.current(), strategy="ddp", unused_parameters=True)
    for _ in range(3):
        loss = loss_of(torch.ones(2, 5))
        loss.backward()
    return loss.item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and two checkpoints of one process that they went on from."""
    folder = tmp_path_factory.mktemp("two")
    one = Run("hybrid")
    one.train(HALF)
    save_sharded(folder / "of one process", **one.parts(), step=HALF)
    save_checkpoint(folder / "plain.pt", **one.parts(), step=HALF)
    torch.multiprocessing.spawn(train_in_two, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses and weights of one process."""
    found = {}
    for name in NUMBERS:
        run = Run(name)
        found[name] = run.train(STEPS), run.model.state_dict()
    return found


both = pytest.mark.parametrize("strategy", STRATEGIES)
Alone = dict[str, tuple[list[float], dict[str, Tensor]]]


def results(folder: Path, rank: int = 0) -> dict[Any, Any]:
    found: dict[Any, Any] = torch.load(folder / f"{rank}.pt")
    return found


def differences(got: list[float], want: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(got, want, strict=True)]


@both
@pytest.mark.parametrize("name", NUMBERS)
def test_two_processes_have_the_losses_and_the_weights_of_one(
    folder: Path, alone: Alone, strategy: str, name: str
) -> None:
    found, (losses, weights) = results(folder), alone[name]
    apart = differences(found["losses"][strategy, name], losses)
    assert apart[0] < 1e-6
    assert max(apart) < 1e-4
    assert found["weights"][strategy, name].keys() == weights.keys()
    for key, weight in weights.items():
        assert relative_error(found["weights"][strategy, name][key], weight) < 1e-3


@both
def test_both_processes_know_the_loss_of_all_and_one_has_the_weights(folder: Path, strategy: str) -> None:
    first, second = results(folder), results(folder, 1)
    assert first["losses"][strategy, "full"] == second["losses"][strategy, "full"]
    assert not second["weights"]["fsdp", "full"]


@both
def test_a_run_that_is_resumed_goes_on_exactly_dropout_included(folder: Path, strategy: str) -> None:
    for rank in (0, 1):
        found, key = results(folder, rank), (strategy, "dropout")
        assert found["resumed"][key] == found["losses"][key][HALF:]


@both
def test_an_evaluation_at_any_moment_leaves_training_as_it_was(folder: Path, alone: Alone, strategy: str) -> None:
    """FSDP gathers weights in the place of its shards, and must put these back before an optimizer looks for them."""
    assert max(differences(results(folder)["evaluating"][strategy], alone["hybrid"][0][:HALF])) < 1e-4


@both
def test_each_process_draws_its_own_dropout(folder: Path, strategy: str) -> None:
    seeds = [results(folder, rank)["seed"][strategy, "dropout"] for rank in (0, 1)]
    assert seeds[0] != seeds[1]


@both
@pytest.mark.parametrize("origin", ["from one", "from a file"])
def test_two_processes_go_on_from_the_checkpoint_of_one(folder: Path, alone: Alone, strategy: str, origin: str) -> None:
    assert max(differences(results(folder)[origin][strategy], alone["hybrid"][0][HALF:])) < 1e-4


@both
@pytest.mark.parametrize("name", NUMBERS)
def test_one_process_goes_on_from_the_shards_of_two_and_saves_them_whole(
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


@both
def test_more_processes_than_rows_are_refused(folder: Path, strategy: str) -> None:
    assert results(folder)["few rows", strategy] == "batch must have at least one row for each of 2 processes, got 1"


def test_what_cannot_be_done_in_two_processes_is_said(folder: Path) -> None:
    found = results(folder)
    assert found["single"] == "strategy must be 'ddp' or 'fsdp' with 2 processes, got strategy='single'"
    assert "training.gather_weights(model)" in found["save"]
    assert not (folder / "never").exists()


def test_what_fails_in_the_first_process_fails_in_all(folder: Path) -> None:
    assert "No space left" in results(folder, 1)["once"]
    assert "this and that" in results(folder, 1)["oddly"]


def test_parameters_may_be_left_unused_where_that_is_said(folder: Path) -> None:
    assert results(folder)["unused"] == results(folder, 1)["unused"]


def test_a_strategy_must_be_known_and_have_its_processes() -> None:
    model = LanguageModel(**SMALL)
    with pytest.raises(ValueError, match="got strategy='dpd'; did you mean 'ddp'"):
        DataParallelLoss(model, World(), strategy="dpd")
    with pytest.raises(ValueError, match="strategy must be 'single' without torchrun's processes, got strategy='ddp'"):
        DataParallelLoss(model, World(), strategy="ddp")


def test_what_the_loss_cannot_take_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must have a method loss\(tokens, mask\), got Linear"):
        DataParallelLoss(nn.Linear(2, 2), World(), strategy="single")
    loss_of = DataParallelLoss(LanguageModel(**SMALL), World(), strategy="single")
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        loss_of(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask must be \(b, n\) = \(2, 5\), got shape \(2, 4\)"):
        loss_of(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))


def test_weights_that_do_not_fit_are_not_scattered() -> None:
    model = nn.Linear(2, 3)
    for weights, message in (
        ({"weight": torch.ones(3, 2)}, r"weights must have \(3,\) as 'bias', got none"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, r"weights must have \(3, 2\) as 'weight', got \(2, 3\)"),
        ({**model.state_dict(), "more": torch.ones(1)}, r"weights must have none as 'more', got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scatter_weights(model, weights)


def test_layers_are_the_units_to_shard_unless_they_share_weights_or_run_in_parts() -> None:
    plain = nn.Sequential(Stack(16, 3), nn.Linear(16, 4))
    assert find_units(plain) == list(plain[0].layers)
    assert all(isinstance(unit, Layer) for unit in find_units(plain))
    shared = Stack(16, 3, shared_ff_ids=[0, 1, 0])
    assert find_units(shared) == [shared.layers[1]]
    assert find_units(Stack(16, 3, reversible=True)) == []
    assert find_units(nn.Linear(3, 3)) == []
