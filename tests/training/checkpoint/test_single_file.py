"""Checkpoints: a resumed run is the unbroken one, and a file that does not fit is refused whole."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attention_zoo.training import StopRequest, read_checkpoint, save_checkpoint
from attention_zoo.training.checkpoint import single_file as checkpoint
from tests.training.checkpoint.runs import make_parts, train


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    parts = make_parts()
    train(parts, 2)
    save_checkpoint(path, **parts, step=2, extra={"note": "x"})
    return path


def test_a_resumed_run_repeats_the_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = train(make_parts(), 7)
    parts = make_parts()
    begun = train(parts, 3)
    save_checkpoint(tmp_path / "checkpoint.pt", **parts, step=3)
    resumed = make_parts(seed=1)  # other weights, other random states
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.restore(**resumed)
    assert checkpoint.step == 3
    assert begun + train(resumed, 4) == unbroken


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    unbroken = train(make_parts(), 5)
    parts = make_parts()
    losses = []
    for step in range(5):
        losses += train(parts, 1)
        save_checkpoint(tmp_path / "checkpoint.pt", **parts, step=step)
    assert losses == unbroken


def test_a_checkpoint_does_not_follow_the_run_that_goes_on_after_it_was_restored(saved: Path) -> None:
    checkpoint, parts = read_checkpoint(saved), make_parts()
    checkpoint.restore(**parts)
    first = train(parts, 3)
    checkpoint.restore(**parts)
    assert train(parts, 3) == first


def test_extra_values_come_back_as_they_were(tmp_path: Path) -> None:
    extra = {"numbers": [1, 2.5, None, True], "nested": {"a": [(3, "b")], 4: "c"}, "tensor": torch.arange(3)}
    save_checkpoint(tmp_path / "new" / "checkpoint.pt", **make_parts(), step=0, extra=extra)
    back = read_checkpoint(tmp_path / "new" / "checkpoint.pt").extra
    assert torch.equal(back.pop("tensor"), extra.pop("tensor"))
    assert back == extra


def test_an_extra_value_that_could_not_be_read_again_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"extra\['folder'\] must be made of numbers, strings"):
        save_checkpoint(tmp_path / "checkpoint.pt", **make_parts(), step=0, extra={"fine": 1, "folder": tmp_path})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved.read_bytes()

    def fail(contents: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, **make_parts(), step=3)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        read_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(saved: Path, part: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be a whole checkpoint"):
        read_checkpoint(saved)


def test_a_changed_byte_among_the_weights_is_noticed(saved: Path) -> None:
    weights = make_parts()["model"]
    read_checkpoint(saved).restore(**{**make_parts(), "model": weights})
    data = bytearray(saved.read_bytes())
    place = data.find(weights.stack.norm.weight.detach().numpy().tobytes())
    assert place > 0
    data[place + 2] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be a whole checkpoint"):
        read_checkpoint(saved)


class Payload:
    """Pickled so that reading it carelessly would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_with_code_in_it_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"format": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match=r"evil\.pt must be a whole checkpoint"):
            read_checkpoint(tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("foreign", [{"a": 1}, [1, 2], torch.ones(2), nn.Linear(2, 2).state_dict()])
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, foreign: object) -> None:
    torch.save(foreign, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt must be a checkpoint of a training run"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("field", ["version", "model", "optimizer", "schedule", "generator", "random", "step", "extra"])
def test_a_checkpoint_without_a_field_is_refused_by_the_field(saved: Path, field: str) -> None:
    contents = torch.load(saved, weights_only=True)
    del contents[field]
    torch.save(contents, saved)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt.*'{field}'"):
        read_checkpoint(saved)


def sgd(parts: dict[str, Any]) -> None:
    parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=0.1)


def two_groups(parts: dict[str, Any]) -> None:
    first, *rest = parts["model"].parameters()
    parts["optimizer"] = torch.optim.AdamW([{"params": [first]}, {"params": rest}])


def without(field: str):
    def change(parts: dict[str, Any]) -> None:
        parts[field] = None

    return change


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ({"dim": 24}, None, r"field 'model' must hold torch.float32 \(24, 16\) as '\S+', got torch.float32 \(16, 16\)"),
        ({"depth": 2}, None, r"field 'model' lacks 'stack\.layers\.1\.\S+', which this model has"),
        (
            {"feedforward": None, "ff_dropout": 0.0},
            None,
            r"field 'model' holds 'stack\.layers\.0\.\S+', which this model has not",
        ),
        ({}, lambda parts: parts["model"].double(), r"field 'model' must hold torch.float64 .* got torch.float32"),
        ({}, sgd, "field 'optimizer' must hold the state of SGD, got that of AdamW"),
        ({}, two_groups, r"field 'optimizer' must have groups of \[1, \d+\] parameters, got \[\d+\]"),
        ({}, without("schedule"), "field 'schedule' must hold the state of none, got that of LambdaLR"),
        ({}, without("generator"), "field 'generator' must hold the state of none, got that of Generator"),
    ],
    ids=["dim", "deeper", "without feedforward", "dtype", "optimizer", "groups", "no schedule", "no generator"],
)
def test_a_checkpoint_of_another_run_names_the_field_and_changes_nothing(
    saved: Path, sizes: dict[str, Any], change: Any, message: str
) -> None:
    parts = make_parts(seed=1, **sizes)
    if change is not None:
        change(parts)
    before = {name: tensor.clone() for name, tensor in parts["model"].state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        read_checkpoint(saved).restore(**parts)
    after = parts["model"].state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_without_schedule_and_generator_is_not_given_those_of_one_with_them(tmp_path: Path) -> None:
    parts = make_parts()
    save_checkpoint(tmp_path / "plain.pt", model=parts["model"], optimizer=parts["optimizer"], step=1)
    read_checkpoint(tmp_path / "plain.pt").restore(model=parts["model"], optimizer=parts["optimizer"])
    with pytest.raises(ValueError, match="field 'schedule' must hold the state of LambdaLR, got that of none"):
        read_checkpoint(tmp_path / "plain.pt").restore(**parts)


def test_ctrl_c_asks_for_a_stop_and_a_second_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    # a shell that runs the tests in the background has them ignore Ctrl-C: start from Python's own handler
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            assert not stop.made
            signal.raise_signal(signal.SIGINT)
            assert stop.made
            signal.raise_signal(signal.SIGINT)  # a launcher passes on what the terminal has sent already
            monkeypatch.setattr(checkpoint, "ECHO", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
