"""Saved models: atomic writing, exact loading, errors for files that do not fit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import attention_zoo
from attention_zoo import GEGLU, FullAttention, LanguageModel, LayerNorm, cosine_sim_lm
from attention_zoo.saving import SavedModel
from attention_zoo.saving import saved_model as saving

SMALL = {"num_tokens": 17, "dim": 12, "depth": 2, "heads": 2, "dim_head": 6}
MODELS = {
    "plain": {},
    "hybrid": {"attention": ["full", ("cosine_sim", {"groups": 3, "scale": 1.0})], "positions": "rotary"},
    "two blocks a layer": {"attention": [["full", ("full", {"kv_heads": 1})], "cosine_sim"]},
    "one block with options": {"attention": ("cosine_sim", {"groups": 3})},
    "tied": {"tie_embeddings": True},
    "learned": {"positions": "learned", "max_seq_len": 31},
    "a shared bias": {"positions": "t5"},
    "no positions": {"positions": None},
    "every choice": {
        "feedforward": ("swiglu", {"bias": True}),
        "ff_mult": 2.5,
        "norm": "rms",
        "residual": "deepnorm",
        "attn_dropout": 0.1,
        "ff_dropout": 0.2,
    },
}


def build(**options: object) -> LanguageModel:
    return LanguageModel(**{**SMALL, **options})


def logits(model: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return model.eval()(torch.randint(17, (2, 9), generator=generator))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("as_text", [False, True])
def test_loaded_model_computes_bitwise_the_same(name: str, as_text: bool, tmp_path: Path) -> None:
    model = build(**MODELS[name])
    model.save(str(tmp_path) if as_text else tmp_path)
    loaded = LanguageModel.load(str(tmp_path) if as_text else tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save(tmp_path / "again")
    assert torch.equal(logits(LanguageModel.load(tmp_path / "again")), logits(model))


def test_models_of_a_builder_can_be_saved(tmp_path: Path) -> None:
    model = cosine_sim_lm(num_tokens=17, dim=12, depth=2, max_seq_len=31, heads=2, dim_head=6, groups=2)
    model.save(tmp_path)
    assert torch.equal(logits(LanguageModel.load(tmp_path)), logits(model))


def test_folder_holds_weights_arguments_and_version(tmp_path: Path) -> None:
    build(attention=["full", ("cosine_sim", {"groups": 3})]).save(tmp_path / "a" / "model")
    assert sorted(os.listdir(tmp_path / "a" / "model")) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    assert config["class"] == "LanguageModel"
    assert config["version"] == attention_zoo.__version__
    assert config["arguments"]["num_tokens"] == 17
    assert config["arguments"]["attention"] == ["full", ["cosine_sim", {"groups": 3}]]


@pytest.mark.parametrize(("options", "shape"), [({"tie_embeddings": True}, (17, 12)), ({"positions": "t5"}, (32, 2))])
def test_tied_tensors_are_saved_once_and_loaded_tied(options: dict, shape: tuple[int, int], tmp_path: Path) -> None:
    build(**options).save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tuple(tensor.shape) == shape for tensor in stored.values()) == 1
    assert sum(tuple(p.shape) == shape for p in LanguageModel.load(tmp_path).parameters()) == 1


def test_weights_tied_by_a_subclass_are_saved_once(tmp_path: Path) -> None:
    class Tied(SavedModel):
        def __init__(self, *, dim: int) -> None:
            super().__init__()
            self.remember(locals())
            self.first, self.second = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
            self.second.weight = self.first.weight

    model = Tied(dim=3)
    model.save(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["first.bias", "first.weight", "second.bias"]
    loaded = Tied.load(tmp_path)
    assert torch.equal(loaded.second.weight, model.second.weight)
    assert loaded.first.weight is loaded.second.weight


CALLABLES = {
    "attention": {"attention": FullAttention},
    r"attention\[1\]": {"attention": ["full", partial(FullAttention, kv_heads=1)]},
    r"attention\[1\]\[0\]": {"attention": ["full", [lambda dim: FullAttention(dim)]]},
    r"attention\[1\]\['pattern'\]": {"attention": ("full", {"pattern": torch.ones(9, 9).bool()})},
    "feedforward": {"feedforward": GEGLU},
    "norm": {"norm": LayerNorm},
}


@pytest.mark.parametrize("name", CALLABLES)
def test_arguments_that_json_cannot_hold_raise(name: str, tmp_path: Path) -> None:
    model = build(**CALLABLES[name])
    with pytest.raises(TypeError, match=rf"^{name} must be made of names, numbers and lists .*got"):
        model.save(tmp_path / "model")
    assert not os.listdir(tmp_path)


def fail_writing(path: str | os.PathLike[str]) -> None:
    Path(path).write_bytes(b"half of the wei")
    raise OSError("no space left on device")


@pytest.mark.parametrize("broken", ["weights", "config"])
def test_failed_save_does_not_change_the_old_model(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build()
    old.save(tmp_path)
    if broken == "weights":
        monkeypatch.setattr(saving, "save_file", lambda weights, path, **options: fail_writing(path))
    else:
        monkeypatch.setattr(Path, "write_text", lambda path, text, **options: fail_writing(path))
    with pytest.raises(OSError, match="no space left on device"):
        build(dim=20, depth=1).save(tmp_path)
    monkeypatch.undo()
    assert torch.equal(logits(LanguageModel.load(tmp_path)), logits(old))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_second_save_replaces_the_first(tmp_path: Path) -> None:
    build().save(tmp_path)
    new = build(dim=20, depth=1, tie_embeddings=True)
    new.save(tmp_path)
    assert torch.equal(logits(LanguageModel.load(tmp_path)), logits(new))


def test_later_changes_to_the_callers_lists_are_not_saved(tmp_path: Path) -> None:
    layers, options = ["full"], {"groups": 3}
    model = build(attention=[*layers, ("cosine_sim", options)])
    changing = build(attention=layers)
    options["groups"] = 2
    layers.append("cosine_sim")
    for one in (model, changing):
        one.save(tmp_path)
        assert torch.equal(logits(LanguageModel.load(tmp_path)), logits(one))


def test_save_does_not_modify_the_model(tmp_path: Path) -> None:
    model = build(tie_embeddings=True).train()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    model.save(tmp_path)
    assert model.training
    assert all(before[name][0] == id(p) and torch.equal(before[name][1], p) for name, p in model.named_parameters())


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_arguments(folder: Path, **changes: object) -> None:
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    edit_config(folder, arguments={k: v for k, v in {**arguments, **changes}.items() if v != "drop it"})


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    save_file(weights, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


NAME = "token_embedding.weight"
DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "No such file .*model.safetensors"),
    "half a config": (lambda d: cut(d / "config.json"), ValueError, "config.json must be JSON, got"),
    "an empty config": (lambda d: (d / "config.json").write_text(""), ValueError, "config.json must be JSON, got"),
    "bytes for a config": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe"),
        ValueError,
        "config.json must be JSON",
    ),
    "a list for a config": (lambda d: (d / "config.json").write_text("[]"), ValueError, "the field 'arguments'"),
    "no arguments": (lambda d: edit_config(d, arguments=None), ValueError, "the field 'arguments'"),
    "another class": (
        lambda d: edit_config(d, **{"class": "Memformer"}),
        ValueError,
        "'class' must be 'LanguageModel'",
    ),
    "an unknown argument": (lambda d: edit_arguments(d, colour=3), TypeError, "colour"),
    "a missing argument": (lambda d: edit_arguments(d, num_tokens="drop it"), TypeError, "num_tokens"),
    "an unknown block": (lambda d: edit_arguments(d, attention="os.system"), ValueError, "attention must be one of"),
    "an argument of a wrong type": (
        lambda d: edit_arguments(d, dim="12"),
        TypeError,
        "dim must be an int, got dim='12'",
    ),
    "another size": (lambda d: edit_arguments(d, dim=13), ValueError, r"must have shape .*13.* got .*12"),
    "more layers": (lambda d: edit_arguments(d, depth=3), ValueError, r"missing tensor 'stack.layers.2.*'"),
    "fewer layers": (lambda d: edit_arguments(d, depth=1), ValueError, r"unexpected tensor 'stack.layers.1"),
    "half the weights": (lambda d: cut(d / "model.safetensors"), ValueError, "must be a complete safetensors file"),
    "empty weights": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        ValueError,
        "must be a complete safetensors file",
    ),
    "a missing tensor": (lambda d: edit_weights(d, **{NAME: None}), ValueError, f"missing tensor '{NAME}'"),
    "a tensor too many": (
        lambda d: edit_weights(d, extra=torch.zeros(2)),
        ValueError,
        "unexpected tensor 'extra'",
    ),
    "a tensor of another shape": (
        lambda d: edit_weights(d, **{NAME: torch.zeros(17, 11)}),
        ValueError,
        rf"tensor '{NAME}' must have shape \(17, 12\), got \(17, 11\)",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folder_raises_with_the_field(case: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGES[case]
    build().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        LanguageModel.load(tmp_path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_load_does_not_execute_pickles(tmp_path: Path) -> None:
    build().save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        LanguageModel.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_non_contiguous_weights_can_be_saved(tmp_path: Path) -> None:
    model = build()
    weight = model.to_logits.weight
    weight.data = weight.data.t().contiguous().t()
    model.save(tmp_path)
    assert torch.equal(logits(LanguageModel.load(tmp_path)), logits(model))


def test_model_saved_in_bfloat16_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    model = LanguageModel(num_tokens=7, dim=16, depth=1, heads=2).bfloat16()
    model.save(tmp_path)
    loaded = LanguageModel.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
def test_full_disk_raises_os_error_and_keeps_the_old_files(tmp_path: Path) -> None:
    code = f"""
import resource, sys
from attention_zoo import LanguageModel
model = LanguageModel(num_tokens=256, dim=32, depth=1, heads=2, dim_head=8)
model.save({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow beyond: less than the weights
for save in (model.save, model.save_pretrained):
    try:
        save({str(tmp_path)!r})
    except OSError as error:
        assert "could not be written" in str(error), error
    else:
        sys.exit("it was written")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert LanguageModel.load(tmp_path).num_tokens == 256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
