"""Single-file checkpoints: exact resumption, atomic saves, and rejection of files that do not fit."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attention_zoo.training import read_checkpoint, read_sharded, save_checkpoint, save_sharded
from attention_zoo.training.checkpoint.single_file import PARTIAL
from tests.training.checkpoint.runs import make_parts, train


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    parts = make_parts()
    train(parts, 2)
    save_checkpoint(path, **parts, step=2, extra={"note": "x"})
    return path


def test_resumed_run_repeats_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted = train(make_parts(), 7)
    parts = make_parts()
    begun = train(parts, 3)
    save_checkpoint(tmp_path / "checkpoint.pt", **parts, step=3)
    resumed = make_parts(seed=1)  # other weights, other random states
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.restore(**resumed)
    assert checkpoint.step == 3
    assert begun + train(resumed, 4) == uninterrupted


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    uninterrupted = train(make_parts(), 5)
    parts = make_parts()
    losses = []
    for step in range(5):
        losses += train(parts, 1)
        save_checkpoint(tmp_path / "checkpoint.pt", **parts, step=step)
    assert losses == uninterrupted


def test_training_after_restore_does_not_change_the_checkpoint(saved: Path) -> None:
    checkpoint, parts = read_checkpoint(saved), make_parts()
    checkpoint.restore(**parts)
    first = train(parts, 3)
    checkpoint.restore(**parts)
    assert train(parts, 3) == first


def test_extra_values_survive_a_round_trip(tmp_path: Path) -> None:
    extra = {"numbers": [1, 2.5, None, True], "nested": {"a": [(3, "b")], 4: "c"}, "tensor": torch.arange(3)}
    save_checkpoint(tmp_path / "new" / "checkpoint.pt", **make_parts(), step=0, extra=extra)
    back = read_checkpoint(tmp_path / "new" / "checkpoint.pt").extra
    assert torch.equal(back.pop("tensor"), extra.pop("tensor"))
    assert back == extra


def test_save_rejects_unreadable_extra_values_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"extra must be made of numbers, strings"):
        save_checkpoint(tmp_path / "checkpoint.pt", **make_parts(), step=0, extra={"fine": 1, "folder": tmp_path})
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_only_the_previous_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved.read_bytes()

    def fail(_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, **make_parts(), step=3)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_only_the_previous_checkpoint(saved: Path) -> None:
    old = saved.read_bytes()
    saved.with_name(f".{saved.name}{PARTIAL}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint\.pt could not be written"):
        save_checkpoint(saved, **make_parts(), step=3)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_save_overwrites_its_own_leftover_and_keeps_files_of_the_user(tmp_path: Path) -> None:
    path, parts = tmp_path / "run.pt", make_parts()
    kept = [tmp_path / name for name in (".run.pt.backup", ".run.pt.tmp", ".run.pt.abc123", "run.pt.old")]
    for file in kept:
        file.write_text("kept")
    (tmp_path / f".run.pt{PARTIAL}").write_text("left by a killed process")
    save_checkpoint(path, **parts, step=1)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, path])
    assert all(file.read_text() == "kept" for file in kept)
    assert read_checkpoint(path).step == 1


def make_twins(swapped: bool) -> dict[str, Any]:
    """Two layers of equal shapes in two groups of the optimizer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    order = [model["b"], model["a"]] if swapped else [model["a"], model["b"]]
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(order, (0.1, 0.2), strict=True)]
    return {"model": model, "optimizer": torch.optim.Adam(groups)}


@pytest.mark.parametrize(("save", "read"), [(save_checkpoint, read_checkpoint), (save_sharded, read_sharded)])
def test_swapped_groups_of_equal_shapes_are_rejected(tmp_path: Path, save: Any, read: Any) -> None:
    parts = make_twins(swapped=False)
    save(tmp_path / "twins", **parts, step=1)
    with pytest.raises(ValueError, match=r"group of 'b\.weight' in the optimizer must be 0, got 1"):
        read(tmp_path / "twins").restore(**make_twins(swapped=True))


@pytest.mark.parametrize(("save", "read"), [(save_checkpoint, read_checkpoint), (save_sharded, read_sharded)])
def test_optimizer_state_follows_parameter_names_within_a_group(tmp_path: Path, save: Any, read: Any) -> None:
    parts = make_twins(swapped=False)
    parts["optimizer"] = torch.optim.Adam(parts["model"].parameters())
    (parts["model"]["a"].weight.sum() + 2 * parts["model"]["b"].weight.sum()).backward()  # biases have no state
    parts["optimizer"].step()
    save(tmp_path / "twins", **parts, step=1)
    other = make_twins(swapped=False)
    other["optimizer"] = torch.optim.Adam(list(other["model"].parameters())[::-1])
    read(tmp_path / "twins").restore(**other)
    for name, weight in other["model"].named_parameters():
        want = parts["optimizer"].state[parts["model"].get_parameter(name)]
        got = other["optimizer"].state[weight]
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_read_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        read_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_read_rejects_a_truncated_file(saved: Path, part: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be an? (undamaged )?checkpoint"):
        read_checkpoint(saved)


def test_read_rejects_a_changed_byte_in_the_weights(saved: Path) -> None:
    parts = make_parts()
    read_checkpoint(saved).restore(**parts)
    data = bytearray(saved.read_bytes())
    place = data.find(parts["model"].stack.norm.weight.detach().numpy().tobytes())
    assert place > 0
    data[place + 2] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be an? (undamaged )?checkpoint"):
        read_checkpoint(saved)


class Payload:
    """Unpickling it without restrictions creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_read_rejects_code_without_executing_it(tmp_path: Path) -> None:
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"format": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match=r"evil\.pt must be an? (undamaged )?checkpoint"):
            read_checkpoint(tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("foreign", [{"a": 1}, [1, 2], torch.ones(2), nn.Linear(2, 2).state_dict()])
def test_read_rejects_a_file_that_is_not_a_checkpoint(tmp_path: Path, foreign: object) -> None:
    torch.save(foreign, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt must be an undamaged checkpoint of"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "field", ["classes", "model", "optimizer", "groups", "schedule", "generator", "random", "step"]
)
def test_read_names_a_missing_field(saved: Path, field: str) -> None:
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
        ({"dim": 24}, None, r"model\['\S+'\] must be torch.float32 \(256, 24\), got torch.float32 \(256, 16\)"),
        ({"depth": 2}, None, r"model\['stack\.layers\.1\.\S+'\] must be torch.float32 \(.+\), got None"),
        (
            {"feedforward": None, "ff_dropout": 0.0},
            None,
            r"model\['stack\.layers\.0\.\S+'\] must be None, got torch.float32",
        ),
        ({}, lambda parts: parts["model"].double(), r"model\['\S+'\] must be torch.float64 .* got torch.float32"),
        ({}, sgd, "class of optimizer must be SGD, got AdamW"),
        ({}, two_groups, r"group of 'stack\S+' in the optimizer must be 1, got 0"),
        ({}, without("schedule"), "class of schedule must be NoneType, got LambdaLR"),
        ({}, without("generator"), "class of generator must be NoneType, got Generator"),
    ],
    ids=["dim", "deeper", "without feedforward", "dtype", "optimizer", "groups", "no schedule", "no generator"],
)
def test_restore_rejects_another_run_and_changes_nothing(
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


def test_restore_rejects_a_checkpoint_without_schedule_and_generator(tmp_path: Path) -> None:
    parts = make_parts()
    save_checkpoint(tmp_path / "plain.pt", model=parts["model"], optimizer=parts["optimizer"], step=1)
    read_checkpoint(tmp_path / "plain.pt").restore(model=parts["model"], optimizer=parts["optimizer"])
    with pytest.raises(ValueError, match="class of schedule must be LambdaLR, got NoneType"):
        read_checkpoint(tmp_path / "plain.pt").restore(**parts)
