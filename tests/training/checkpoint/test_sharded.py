"""Sharded checkpoints: exact resumption, atomic saves, and rejection of files that do not fit."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from attention_zoo import LanguageModel
from attention_zoo.training import read_checkpoint, read_sharded, save_checkpoint, save_sharded
from attention_zoo.training.checkpoint.shards import MetadataUnpickler
from tests.training.checkpoint.runs import make_parts, train


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    parts = make_parts()
    train(parts, 2)
    save_sharded(tmp_path / "checkpoint", **parts, step=2, extra={"note": "kept"})
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "NAdam", "Adagrad"])
@pytest.mark.parametrize("before", [0, 3])
def test_resumed_run_repeats_the_losses_of_an_uninterrupted_one(tmp_path: Path, kind: str, before: int) -> None:
    def make(seed: int) -> dict[str, Any]:
        parts = make_parts(seed)
        parts["optimizer"] = getattr(torch.optim, kind)(parts["model"].parameters(), lr=1e-2)
        parts["schedule"] = torch.optim.lr_scheduler.CosineAnnealingLR(parts["optimizer"], 10)
        return parts

    uninterrupted = train(make(0), before + 4)
    parts = make(0)
    begun = train(parts, before)
    save_sharded(tmp_path, **parts, step=before)
    assert begun + train(parts, 4) == uninterrupted, "saving changed the run"
    resumed = make(1)  # different weights and random states
    read_sharded(tmp_path).restore(**resumed)
    assert begun + train(resumed, 4) == uninterrupted


def test_saves_alternate_between_two_subdirectories(saved: Path) -> None:
    parts = make_parts()
    for step in (3, 4, 5):
        save_sharded(saved, **parts, step=step, extra={"step": step})
        found = read_sharded(saved)
        assert (found.step, found.extra) == (step, {"step": step})
    assert sorted(path.name for path in saved.iterdir()) == ["run.pt", "shards_a", "shards_b"]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_previous_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    resumed = make_parts(1)
    with monkeypatch.context() as patched:
        patched.setattr(os, step, no_space)
        with pytest.raises(OSError, match="No space left on device"):
            save_sharded(saved, **make_parts(), step=3)
    found = read_sharded(saved)
    assert (found.step, found.extra) == (2, {"note": "kept"})
    found.restore(**resumed)
    save_sharded(saved, **resumed, step=4)
    assert read_sharded(saved).step == 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_read_names_a_damaged_or_missing_file(saved: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(saved / "shards_a" / name)
    with pytest.raises(ValueError, match=rf"shards_a/{name} is missing or damaged"):
        read_sharded(saved)


@pytest.mark.parametrize("content", [b"", b"{}", pickle.dumps({})])
def test_read_rejects_a_damaged_run_file(saved: Path, content: bytes) -> None:
    (saved / "run.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt must be an? (undamaged )?checkpoint"):
        read_sharded(saved)


def test_read_names_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/run\.pt does not exist"):
        read_sharded(tmp_path / "nowhere")


class Payload:
    """Unpickling it without restrictions creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def rewrite(saved: Path, **fields: Any) -> None:
    """Change fields of `run.pt`, with valid checksums."""
    contents = torch.load(saved / "run.pt", weights_only=True)
    place = saved / contents["place"]
    contents["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in place.iterdir()}
    torch.save(contents | fields, saved / "run.pt")


def test_read_rejects_code_in_metadata_without_executing_it(saved: Path, tmp_path: Path) -> None:
    (saved / "shards_a" / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    rewrite(saved)
    with pytest.raises(ValueError, match="not allowed in metadata"):
        read_sharded(saved).restore(**make_parts())
    assert not (tmp_path / "ran").exists()


def test_read_rejects_pickled_values_in_shards_without_executing_them(saved: Path, tmp_path: Path) -> None:
    place, name = saved / "shards_a", "model.token_embedding.weight"
    for file in place.iterdir():
        file.unlink()
    dcp.save({name: Payload(tmp_path / "ran")}, storage_writer=dcp.FileSystemWriter(place))
    rewrite(saved)
    with pytest.raises(ValueError, match="BytesStorageMetadata is not allowed in metadata"):
        read_sharded(saved).restore(**make_parts())
    assert not (tmp_path / "ran").exists()


class Attribute:
    """Pickled as Python 3.11.2 pickles a member of an enum, `getattr(owner, name)`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.reference = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.reference


def test_metadata_may_contain_enum_members_but_no_other_attributes() -> None:
    def read(value: object) -> Any:
        return MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()

    member = next(iter(_MEM_FORMAT_ENCODING))
    assert read(Attribute(_MEM_FORMAT_ENCODING, member.name)) is member
    for owner, name in ((_MEM_FORMAT_ENCODING, "mro"), (Path, "touch")):
        with pytest.raises(KeyError, match=name):
            read(Attribute(owner, name))


def sgd(parts: dict[str, Any]) -> None:
    parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=0.1)


def two_groups(parts: dict[str, Any]) -> None:
    first, *rest = parts["model"].parameters()
    parts["optimizer"] = torch.optim.AdamW([{"params": [first]}, {"params": rest}])


def no_schedule(parts: dict[str, Any]) -> None:
    parts["schedule"] = None


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
        ({}, no_schedule, "class of schedule must be NoneType, got LambdaLR"),
    ],
    ids=["dim", "deeper", "no feedforward", "dtype", "optimizer", "groups", "no schedule"],
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
        read_sharded(saved).restore(**parts)
    assert all(torch.equal(tensor, parts["model"].state_dict()[name]) for name, tensor in before.items())
    assert not parts["optimizer"].state
    assert torch.equal(torch.get_rng_state(), state)


def test_load_weights_needs_no_optimizer(saved: Path, tmp_path: Path) -> None:
    parts, found = make_parts(), read_sharded(saved)
    found.restore(**parts)
    model = make_parts(1)["model"]
    found.load_weights(model)
    model.save(tmp_path / "plain")
    weights = LanguageModel.load(tmp_path / "plain").state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in parts["model"].state_dict().items())
    with pytest.raises(ValueError, match=r"model\['stack\.layers\.1\.\S+'\] must be torch.float32"):
        found.load_weights(make_parts(depth=2)["model"])


def test_save_removes_its_own_leftovers_and_keeps_files_of_the_user(tmp_path: Path) -> None:
    place = tmp_path / "shards_a"
    place.mkdir()
    (place / "notes.txt").write_text("kept")
    (place / "__7_0.distcp").write_text("left by a killed process")
    save_sharded(tmp_path, **make_parts(), step=0)
    assert sorted(file.name for file in place.iterdir()) == [".metadata", "__0_0.distcp", "notes.txt"]
    read_sharded(tmp_path).restore(**make_parts())


def numpy_rate(parts: dict[str, Any]) -> None:
    parts["optimizer"].param_groups[0]["lr"] = np.float64(0.1)


def path_in_schedule(parts: dict[str, Any]) -> None:
    parts["schedule"].last_file = Path("x")


@pytest.mark.parametrize("save", [save_sharded, save_checkpoint])
@pytest.mark.parametrize(
    ("change", "step", "message"),
    [
        (numpy_rate, 1, "groups must be made of numbers"),
        (path_in_schedule, 1, "schedule must be made of numbers"),
        (lambda parts: None, "one", "step must be an int of at least 0, got 'one'"),
        (lambda parts: None, torch.tensor(1), r"step must be an int of at least 0, got tensor\(1\)"),
        (lambda parts: None, -1, "step must be an int of at least 0, got -1"),
    ],
)
def test_save_rejects_unreadable_values_and_writes_nothing(
    tmp_path: Path, save: Any, change: Any, step: Any, message: str
) -> None:
    parts = make_parts()
    change(parts)
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "new", **parts, step=step)
    assert not (tmp_path / "new").exists()


def test_restore_rejects_a_checkpoint_that_was_overwritten(saved: Path) -> None:
    old = read_sharded(saved)
    parts = make_parts(1)
    save_sharded(saved, **parts, step=3)
    for action in (lambda: old.restore(**parts), lambda: old.load_weights(parts["model"])):
        with pytest.raises(ValueError, match="must be read again: it was overwritten since step 2 was read"):
            action()


def test_restore_rejects_a_schedule_of_other_parts_and_changes_nothing(tmp_path: Path) -> None:
    def make(count: int) -> dict[str, Any]:
        parts = make_parts(count)
        constant = torch.optim.lr_scheduler.ConstantLR
        parts["schedule"] = torch.optim.lr_scheduler.SequentialLR(
            parts["optimizer"], [constant(parts["optimizer"]) for _ in range(count)], list(range(5, 4 + count))
        )
        return parts

    save_sharded(tmp_path / "shards", **make(2), step=0)
    save_checkpoint(tmp_path / "file", **make(2), step=0)
    for found in (read_sharded(tmp_path / "shards"), read_checkpoint(tmp_path / "file")):
        for count in (1, 3):
            parts = make(count)
            before = {name: tensor.clone() for name, tensor in parts["model"].state_dict().items()}
            with pytest.raises(ValueError, match="schedule must be"):
                found.restore(**parts)
            assert all(torch.equal(tensor, before[name]) for name, tensor in parts["model"].state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"place": "../shards_a"},
        {"files": {"../secret": ""}},
        {"optimizer": 5},
        {"optimizer": {"elsewhere": {"step": torch.ones(())}}},
        {"optimizer": {"token_embedding.weight": 5}},
        {"groups": []},
        {"groups": [5]},
        {"model": {}},
        {"schedule": 3},
        {"generator": {}},
        {"random": [{"cpu": torch.ones(2), "cuda": {}}]},
        {"random": []},
        {"classes": {}},
    ],
    ids=str,
)
def test_restore_rejects_a_malformed_file_and_changes_nothing(saved: Path, fields: dict[str, Any]) -> None:
    rewrite(saved, **fields)
    parts = make_parts(1)
    before = {name: tensor.clone() for name, tensor in parts["model"].state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint.*( must | is malformed)"):
        read_sharded(saved).restore(**parts)
    assert all(torch.equal(tensor, parts["model"].state_dict()[name]) for name, tensor in before.items())
    assert not parts["optimizer"].state


def test_save_rejects_unreadable_extra_values_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"extra must be made of numbers, strings"):
        save_sharded(tmp_path / "new", **make_parts(), step=0, extra={"folder": tmp_path})
    assert not (tmp_path / "new").exists()


def test_save_rejects_the_optimizer_of_another_model(tmp_path: Path) -> None:
    parts = {**make_parts(), "model": make_parts()["model"]}
    with pytest.raises(ValueError, match="optimizer must have the model's parameters, sharded"):
        save_sharded(tmp_path / "new", **parts, step=0)
