"""Saved models: atomic writing, exact loading, errors for files that do not fit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding as UpstreamRotary
from safetensors.torch import load_file, save_file
from torch import Tensor

import attention_zoo
from attention_zoo import (
    GEGLU,
    FullAttention,
    LanguageModel,
    LayerNorm,
    RelativeBias,
    Rotary,
    SimpleGateLoop,
    TextImageLayout,
    cosine_sim_lm,
)
from attention_zoo.saving import SavedModel, model_file
from attention_zoo.saving.model_file import read_model, write_model

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
    "a list of feedforwards": {"feedforward": [("swiglu", {"dim_inner": 7}), None]},
    "a norm with options": {"norm": ("rms", {"eps": 0.1})},
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
            self.first, self.second = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
            self.second.weight = self.first.weight

    model = Tied(dim=3)
    model.save(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["first.bias", "first.weight", "second.bias"]
    loaded = Tied.load(tmp_path)
    assert torch.equal(loaded.second.weight, model.second.weight)
    assert loaded.first.weight is loaded.second.weight


class Unknown(torch.nn.Linear):
    """A block that is not registered."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)


UNSAVED = {
    "a class": ({"attention": Unknown}, r"register_block\('unknown', Unknown\)"),
    "a function": ({"attention": ["full", lambda dim: Unknown(dim)]}, r"register_block\('unknown', Unknown\)"),
    "a module": ({"attention": [FullAttention(12), Unknown(12)]}, r"register_block\('unknown', Unknown\)"),
    "a tensor": (
        {"attention": ("full", {"pattern": torch.ones(9, 9).bool()})},
        r"^attention\[0\]\[1\]\['pattern'\] must be made of names, numbers, lists and parts .*got",
    ),
    "a function for a norm": ({"norm": lambda dim: LayerNorm(dim)}, "^norm must be made of names"),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_arguments_that_cannot_be_saved_raise(name: str, tmp_path: Path) -> None:
    options, message = UNSAVED[name]
    model = LanguageModel(num_tokens=17, dim=12, depth=2, **options)
    with pytest.raises(TypeError, match=message):
        model.save(tmp_path / "model")
    assert not os.listdir(tmp_path)


CALLABLES = {
    "a class": FullAttention,
    "a class with options": (FullAttention, {"kv_heads": 1}),
    "a partial": ["full", partial(FullAttention, kv_heads=1)],
    "a function": ["full", [lambda dim: FullAttention(dim, heads=3, dim_head=4, rotary=Rotary(theta=99.0))]],
    "modules": [FullAttention(12, heads=2), SimpleGateLoop(12)],
    "a bias that two modules share": (
        lambda bias: [FullAttention(12, heads=2, bias=bias), FullAttention(12, heads=2, bias=bias)]
    )(RelativeBias(2)),
    "another package's rotary embedding": ("full", {"rotary": UpstreamRotary(6, theta=99.0)}),
    "an image layout": ("conv", {"layout": TextImageLayout(5, 2, 2)}),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_blocks_that_are_not_names_are_saved_by_their_names(name: str, tmp_path: Path) -> None:
    sizes = {} if "module" in name else SMALL
    model = LanguageModel(**{"num_tokens": 17, "dim": 12, "depth": 2, **sizes, "attention": CALLABLES[name]})
    model.save(tmp_path)
    loaded = LanguageModel.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save(tmp_path / "again")
    assert torch.equal(logits(LanguageModel.load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize(("option", "part"), [("feedforward", GEGLU), ("norm", LayerNorm)])
def test_classes_of_the_package_can_be_saved(option: str, part: type, tmp_path: Path) -> None:
    model = build(**{option: part})
    model.save(tmp_path)
    assert torch.equal(logits(LanguageModel.load(tmp_path)), logits(model))


def wrap_a_linear(model: LanguageModel) -> None:
    model.to_logits = torch.nn.Sequential(model.to_logits)


def resize_a_parameter(model: LanguageModel) -> None:
    model.to_logits = torch.nn.Linear(12, 18, bias=False)


def replace_a_block(model: LanguageModel) -> None:
    model.stack.layers[1].sublayers[0].block = FullAttention(12, heads=2, dim_head=6, causal=False)


def share_a_weight(model: LanguageModel) -> None:
    model.to_logits.weight = model.token_embedding.weight


def wrap_forward(model: LanguageModel) -> None:
    block = model.stack.layers[0].sublayers[0].block
    forward = block.forward
    block.forward = lambda x, mask=None: 2 * forward(x, mask=mask)


EDITS = {
    "a wrapped submodule": (wrap_a_linear, "to_logits is Sequential, configured is Linear"),
    "a resized parameter": (resize_a_parameter, r"to_logits\.out_features is 18, configured is 17"),
    "a replaced block": (replace_a_block, r"block\.causal is False, configured is True"),
    "a tied weight": (share_a_weight, r"to_logits\.weight shares its values"),
    "another number": (lambda m: setattr(m.stack.layers[0].sublayers[0].block, "scale", 3.0), r"scale is 3\.0"),
    "another activation": (
        lambda m: setattr(m.stack.layers[0].sublayers[1].block, "activation", torch.relu),
        "activation was set to",
    ),
    "another forward": (wrap_forward, r"block\.forward was set to"),
    "a hook": (lambda m: m.stack.norm.register_forward_hook(lambda *_: None), r"stack\.norm has 1 hooks"),
    "a parametrization": (
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.to_logits),
        "to_logits is ParametrizedLinear",
    ),
    "a missing submodule": (lambda m: setattr(m, "to_logits", None), "to_logits is None, configured is Linear"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_is_not_saved_as_another_function(name: str, tmp_path: Path) -> None:
    edit, message = EDITS[name]
    model = build()
    edit(model)
    with pytest.raises(ValueError, match=f"must equal its configuration to be saved, but .*{message}"):
        model.save(tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_attributes_that_the_classes_do_not_read_are_no_edit(tmp_path: Path) -> None:
    model = build()
    model.note = "trained on poems"
    model.stack.checked = 3
    model.save(tmp_path)
    assert torch.equal(logits(LanguageModel.load(tmp_path)), logits(model))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    build(depth=1).save(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for bit in torch.randint(8 * len(content), (300,), generator=torch.Generator().manual_seed(0)).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            LanguageModel.load(tmp_path)


@pytest.mark.slow
def test_readers_beside_two_writers_see_whole_models(tmp_path: Path) -> None:
    code = f"""
from attention_zoo import LanguageModel
import sys
model = LanguageModel(num_tokens=17, dim=int(sys.argv[1]), depth=1, heads=2, dim_head=6)
for parameter in model.parameters():
    parameter.data.fill_(model.stack.dim)
for _ in range(40):
    model.save({str(tmp_path)!r})
"""
    LanguageModel(num_tokens=17, dim=12, depth=1, heads=2, dim_head=6).save(tmp_path)
    writers = [subprocess.Popen([sys.executable, "-c", code, dim]) for dim in ("12", "20")]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        model = LanguageModel.load(tmp_path)
        values = {float(parameter.mean()) for parameter in model.parameters()}
        reads += values == {float(model.stack.dim)}
    assert all(writer.wait() == 0 for writer in writers)
    assert reads > 0


def test_load_keeps_the_random_state(tmp_path: Path) -> None:
    model = build()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model.save(tmp_path)
    LanguageModel.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


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
        monkeypatch.setattr(model_file, "save_file", lambda weights, path, **options: fail_writing(path))
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


def rewrite(folder: Path, edit: Callable[[Any, dict[str, Tensor]], object]) -> None:
    """Write a model file with another configuration or other tensors and a right checksum."""
    _, config, tensors = read_model(folder)
    edit(config, tensors)
    write_model(folder, tensors, config)


def edit_config(folder: Path, **changes: object) -> None:
    rewrite(folder, lambda config, tensors: config.update(changes))


def edit_arguments(folder: Path, **changes: object) -> None:
    def edit(config: Any, tensors: dict[str, Tensor]) -> None:
        config["arguments"] = {k: v for k, v in {**config["arguments"], **changes}.items() if v != "drop it"}

    rewrite(folder, edit)


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    def edit(config: Any, tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
        for name in [name for name, tensor in changes.items() if tensor is None]:
            del tensors[name]

    rewrite(folder, edit)


def drop_metadata(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


NAME = "token_embedding.weight"
DAMAGES = {
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        FileNotFoundError,
        r"model.safetensors does not exist",
    ),
    "no configuration": (drop_metadata, ValueError, "must hold a configuration in its metadata"),
    "no arguments": (lambda d: edit_config(d, arguments=None), ValueError, "field 'arguments'"),
    "another field": (lambda d: edit_config(d, extra=None), ValueError, "must have the fields"),
    "another class": (
        lambda d: edit_config(d, **{"class": "Memformer"}),
        ValueError,
        "'class' must be 'LanguageModel'",
    ),
    "an unknown argument": (lambda d: edit_arguments(d, colour=3), ValueError, "unknown argument 'colour'"),
    "a missing argument": (lambda d: edit_arguments(d, num_tokens="drop it"), ValueError, "num_tokens"),
    "an unknown block": (lambda d: edit_arguments(d, attention="os.system"), ValueError, "attention must be one of"),
    "an unknown part": (
        lambda d: edit_arguments(d, attention=["full", {"rotary": {"class": "system", "arguments": {}}}]),
        ValueError,
        "class must be one of",
    ),
    "an argument of a wrong type": (
        lambda d: edit_arguments(d, dim="12"),
        ValueError,
        "dim must be an int, got dim='12'",
    ),
    "another size": (lambda d: edit_arguments(d, dim=13), ValueError, r"must have shape .*13.* got .*12"),
    "more layers": (lambda d: edit_arguments(d, depth=3), ValueError, r"missing tensor 'stack.layers.2.*'"),
    "fewer layers": (lambda d: edit_arguments(d, depth=1), ValueError, r"unexpected tensor 'stack.layers.1"),
    "a huge depth": (lambda d: edit_arguments(d, depth=10**9), ValueError, "depth must fit the file"),
    "a huge dim": (lambda d: edit_arguments(d, dim=10**9), ValueError, "dim must fit the file"),
    "a huge feedforward": (lambda d: edit_arguments(d, ff_mult=1e12), ValueError, "must have shape"),
    "int8 weights": (
        lambda d: edit_weights(d, **{NAME: torch.zeros(17, 12, dtype=torch.int8)}),
        ValueError,
        rf"tensor '{NAME}' must have dtype torch.float32, got",
    ),
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
    with pytest.raises(error, match=message) as raised:
        LanguageModel.load(tmp_path)
    assert isinstance(raised.value, ValueError)


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


@pytest.mark.slow
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
