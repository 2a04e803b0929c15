"""Sharded checkpoints: what does not fit, is damaged or was cut off is refused whole, and the last good one stays."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, kind: str, before: int) -> None:
    def make(seed: int) -> dict[str, Any]:
        parts = make_parts(seed)
        parts["optimizer"] = getattr(torch.optim, kind)(parts["model"].parameters(), lr=1e-2)
        parts["schedule"] = torch.optim.lr_scheduler.CosineAnnealingLR(parts["optimizer"], 10)
        return parts

    unbroken = train(make(0), before + 4)
    parts = make(0)
    begun = train(parts, before)
    save_sharded(tmp_path, **parts, step=before)
    assert begun + train(parts, 4) == unbroken, "saving changed the run"
    resumed = make(1)  # other weights, other random states
    read_sharded(tmp_path).restore(**resumed)
    assert begun + train(resumed, 4) == unbroken


def test_two_places_are_written_in_turn_and_the_last_is_read(saved: Path) -> None:
    parts = make_parts()
    for step in (3, 4, 5):
        save_sharded(saved, **parts, step=step, extra={"step": step})
        found = read_sharded(saved)
        assert (found.step, found.extra) == (step, {"step": step})
    assert sorted(path.name for path in saved.iterdir()) == ["last.json", "shards_a", "shards_b"]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["os.fsync", "torch.save", "json.dumps", "os.replace"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(saved: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    owner, name = {"os": os, "torch": torch, "json": json}[step.split(".")[0]], step.split(".")[1]
    resumed = make_parts(1)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, no_space)
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
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt"])
def test_a_damaged_or_missing_file_is_refused_by_name(saved: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(saved / "shards_a" / name)
    with pytest.raises(ValueError, match=rf"shards_a/{name} must be (there|as it was written)"):
        read_sharded(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"last\.json must be JSON"),
        ("[]", r"last\.json must belong to a sharded checkpoint"),
        ("{}", r"last\.json must belong to a sharded checkpoint"),
        ('{"format": "attention_zoo.training.sharded", "version": 9}', "field 'version'"),
        ('{"format": "attention_zoo.training.sharded", "version": 1, "step": "x"}', "field 'step'"),
        ('{"format": "attention_zoo.training.sharded", "version": 1, "step": 1, "place": "../x"}', "field 'place'"),
        ('{"format": "attention_zoo.training.sharded", "version": 1, "step": 1, "place": "shards_a"}', "field 'files'"),
    ],
)
def test_a_pointer_that_is_no_pointer_is_refused(saved: Path, content: str, message: str) -> None:
    (saved / "last.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sharded(saved)


def test_a_folder_without_a_pointer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/last\.json does not exist"):
        read_sharded(tmp_path / "nowhere")


class Payload:
    """Pickled so that reading it carelessly would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [".metadata", "rest.pt"])
def test_code_in_a_file_is_refused_and_not_run(saved: Path, tmp_path: Path, name: str) -> None:
    data = pickle.dumps(Payload(tmp_path / "ran"), protocol=2)
    (saved / "shards_a" / name).write_bytes(data)
    pointer = json.loads((saved / "last.json").read_text())
    pointer["files"][name] = hashlib.sha256(data).hexdigest()  # whoever can change one file can change the other
    (saved / "last.json").write_text(json.dumps(pointer))
    with pytest.raises(ValueError, match=rf"{name} must be"):
        read_sharded(saved).restore(**make_parts())
    assert not (tmp_path / "ran").exists()


class Attribute:
    """Pickled as Python 3.11.2 pickles a member of an enum: `getattr(owner, name)`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.reference = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.reference


def test_metadata_may_name_a_member_of_an_enum_and_no_other_attribute() -> None:
    def read(value: object) -> Any:
        return MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()

    member = next(iter(_MEM_FORMAT_ENCODING))
    assert read(Attribute(_MEM_FORMAT_ENCODING, member.name)) is member
    for owner, name in ((_MEM_FORMAT_ENCODING, "mro"), (Path, "touch")):
        with pytest.raises((KeyError, pickle.UnpicklingError), match=name):
            read(Attribute(owner, name))


def sgd(parts: dict[str, Any]) -> None:
    parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=0.1)


def two_groups(parts: dict[str, Any]) -> None:
    first, *rest = parts["model"].parameters()
    parts["optimizer"] = torch.optim.AdamW([{"params": [first]}, {"params": rest}])


def backwards(parts: dict[str, Any]) -> None:
    parts["optimizer"] = torch.optim.AdamW(list(parts["model"].parameters())[::-1])


def no_schedule(parts: dict[str, Any]) -> None:
    parts["schedule"] = None


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ({"dim": 24}, None, r"must hold torch.float32 \(24, 16\) as '\S+', got torch.float32 \(16, 16\)"),
        ({"depth": 2}, None, r"lacks 'stack\.layers\.1\.\S+', which this model has"),
        ({"feedforward": None, "ff_dropout": 0.0}, None, r"holds 'stack\.layers\.0\.\S+', which this model has not"),
        ({}, lambda parts: parts["model"].double(), r"must hold torch.float64 .* got torch.float32"),
        ({}, sgd, "field 'optimizer' must hold the state of SGD, got that of AdamW"),
        ({}, two_groups, r"field 'optimizer' must have groups of \[1, \d+\] parameters, got \[\d+\]"),
        ({}, backwards, r"field 'optimizer' must have 'to_logits.weight' where it has 'token_embedding.weight'"),
        ({}, no_schedule, "field 'schedule' must hold the state of none, got that of LambdaLR"),
    ],
    ids=["dim", "deeper", "no feedforward", "dtype", "optimizer", "groups", "order", "no schedule"],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(
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


def test_the_weights_alone_are_loaded_without_an_optimizer(saved: Path, tmp_path: Path) -> None:
    parts, found = make_parts(), read_sharded(saved)
    found.restore(**parts)
    model = make_parts(1)["model"]
    found.load_weights(model)
    model.save(tmp_path / "plain")
    weights = LanguageModel.load(tmp_path / "plain").state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in parts["model"].state_dict().items())
    with pytest.raises(ValueError, match=r"lacks 'stack\.layers\.1\."):
        found.load_weights(make_parts(depth=2)["model"])


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shards_a").mkdir()
    (tmp_path / "shards_a" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"shards_a must hold shards alone.* but thesis\.txt is there"):
        save_sharded(tmp_path, **make_parts(), step=0)
    assert (tmp_path / "shards_a" / "thesis.txt").read_text() == "years of work"


def numpy_rate(parts: dict[str, Any]) -> None:
    parts["optimizer"].param_groups[0]["lr"] = np.float64(0.1)


def path_in_schedule(parts: dict[str, Any]) -> None:
    parts["schedule"].last_file = Path("x")


@pytest.mark.parametrize("save", [save_sharded, save_checkpoint])
@pytest.mark.parametrize(
    ("change", "step", "message"),
    [
        (numpy_rate, 1, "optimizer's lr must be made of numbers"),
        (path_in_schedule, 1, "schedule's state must be made of numbers"),
        (lambda parts: None, "one", "step must be an int of at least 0, got 'one'"),
        (lambda parts: None, torch.tensor(1), r"step must be an int of at least 0, got tensor\(1\)"),
        (lambda parts: None, -1, "step must be an int of at least 0, got -1"),
    ],
)
def test_what_could_not_be_read_again_is_refused_before_anything_is_written(
    tmp_path: Path, save: Any, change: Any, step: Any, message: str
) -> None:
    parts = make_parts()
    change(parts)
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "new", **parts, step=step)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_in_whose_place_another_was_saved_must_be_read_again(saved: Path) -> None:
    old = read_sharded(saved)
    parts = make_parts(1)
    save_sharded(saved, **parts, step=3)
    for action in (lambda: old.restore(**parts), lambda: old.load_weights(parts["model"])):
        with pytest.raises(ValueError, match="must be read again: another checkpoint was saved there since step 2"):
            action()


def test_a_schedule_of_other_parts_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
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
            with pytest.raises(ValueError, match=f"field 'schedule' must have the state of {count} schedules, got 2"):
                found.restore(**parts)
            assert all(torch.equal(tensor, before[name]) for name, tensor in parts["model"].state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", 5),
        ("optimizer", {"class": "AdamW", "state": {}}),
        ("optimizer", {"class": "AdamW", "state": {"names": [], "values": {}, "settings": []}}),
        ("schedule", 3),
        ("generator", {}),
        ("random", []),
        ("random", [{"cpu": torch.ones(2), "cuda": []}]),
        ("extra", None),
    ],
)
def test_a_file_that_was_changed_with_its_checksum_is_refused_by_field(saved: Path, field: str, value: Any) -> None:
    path = saved / "shards_a" / "rest.pt"
    torch.save({**torch.load(path), field: value}, path)
    pointer = json.loads((saved / "last.json").read_text())
    pointer["files"]["rest.pt"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (saved / "last.json").write_text(json.dumps(pointer))
    parts = make_parts(1)
    before = {name: tensor.clone() for name, tensor in parts["model"].state_dict().items()}
    with pytest.raises(ValueError, match=f"field '{field}' must"):
        read_sharded(saved).restore(**parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts["model"].state_dict().items())


def test_an_extra_value_that_could_not_be_read_again_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"extra\['folder'\] must be made of numbers, strings"):
        save_sharded(tmp_path / "new", **make_parts(), step=0, extra={"folder": tmp_path})
    assert not (tmp_path / "new").exists()


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    parts = {**make_parts(), "model": make_parts()["model"]}
    with pytest.raises(ValueError, match="optimizer must have the model's parameters as they are after sharding"):
        save_sharded(tmp_path / "new", **parts, step=0)
