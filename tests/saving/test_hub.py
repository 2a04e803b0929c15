"""Models written by huggingface_hub's mixin and by `save` are read by both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo import GreyTokenizer, LanguageModel, Memformer, MultiStreamTransformer, TextToImageTransformer
from attention_zoo import _files as files
from attention_zoo.saving import SavedModel, hub
from attention_zoo.saving.encoding import encode

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub needs huggingface_hub")

SMALL: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
MODELS: dict[str, SavedModel] = {
    "language": LanguageModel(num_tokens=20, attention=("cosine_sim", {"groups": 2}), **SMALL),
    "streams": MultiStreamTransformer(num_tokens=20, max_seq_len=16, streams=2, **SMALL),
    "image": TextToImageTransformer(
        num_text_tokens=20, text_len=4, num_image_tokens=GreyTokenizer(height=4, width=4, levels=5).num_tokens,
        height=4, width=4, **SMALL
    ),
}  # fmt: skip


def same(one: SavedModel, other: SavedModel) -> bool:
    want, got = one.state_dict(), other.state_dict()
    equal = all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    return (
        type(one) is type(other)
        and encode(one.arguments) == encode(other.arguments)
        and want.keys() == got.keys()
        and equal
    )


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(num_tokens=20, **SMALL)


@pytest.mark.parametrize("name", MODELS)
def test_save_and_save_pretrained_write_the_same_files(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    assert model.save_pretrained(tmp_path / "theirs") is None
    model.save(tmp_path / "ours")
    assert same(type(model).load(tmp_path / "theirs"), model)
    assert same(type(model).from_pretrained(tmp_path / "ours"), model)
    assert same(type(model).from_pretrained(str(tmp_path / "theirs")), model)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_card_holds_the_configuration_and_the_facts(tmp_path: Path, model: LanguageModel) -> None:
    model.save_pretrained(tmp_path, data="two poems", score="1.5 bits per byte", command="python train.py")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "attention-zoo"
    for line in ("two poems", "1.5 bits per byte", "python train.py", "from attention_zoo import LanguageModel"):
        assert line in card.text
    config = card.text.split("```json\n")[1].split("```")[0]
    assert json.loads(config) == encode(model.arguments)
    assert f"{sum(weight.numel() for weight in model.parameters()):,} parameters" in card.text


def test_card_states_missing_facts(tmp_path: Path, model: LanguageModel) -> None:
    model.save_pretrained(tmp_path)
    assert "## Score\n\nNot stated." in (tmp_path / "README.md").read_text()


def test_existing_readme_is_kept_and_other_files_are_replaced(tmp_path: Path, model: LanguageModel) -> None:
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    other = LanguageModel(num_tokens=20, **{**SMALL, "depth": 2})
    other.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert same(LanguageModel.load(tmp_path), other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_full_disk_does_not_change_the_last_model(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    other = LanguageModel(num_tokens=20, **{**SMALL, "depth": 2})
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(tmp_path)
    assert same(LanguageModel.from_pretrained(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


class Api:
    """Records uploads."""

    sent: dict[str, Any]

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        Api.sent = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"commit of {repo_id}"


def test_pushed_files_equal_saved_files(tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert model.push_to_hub("me/model", score="best") == "commit of me/model"
    first = Api.sent
    assert model.save_pretrained(tmp_path / "model", score="best", push_to_hub=True) == "commit of model"
    assert Api.sent == first == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


def test_existing_readme_is_pushed(tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model", private=True)
    assert Api.sent["README.md"].endswith(b"mine")


def test_unused_options_raise(tmp_path: Path, model: LanguageModel) -> None:
    with pytest.raises(TypeError, match=r"options must come with push_to_hub=True, got scor"):
        model.save_pretrained(tmp_path, scor="best")
    model.save(tmp_path)
    with pytest.raises(TypeError, match="revison"):
        LanguageModel.from_pretrained(tmp_path, revison="v1")


class Own(LanguageModel):
    """A user's subclass."""


def test_card_of_a_subclass_names_its_module(tmp_path: Path) -> None:
    Own(num_tokens=20, **SMALL).save_pretrained(tmp_path)
    assert f"from {Own.__module__} import Own" in (tmp_path / "README.md").read_text()


def test_damaged_file_raises_for_folders_and_the_hub(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        LanguageModel.from_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        LanguageModel.from_pretrained("me/model")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "runs/of/mine"])
def test_missing_folder_is_not_requested_from_the_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        LanguageModel.from_pretrained(name)


def test_model_is_downloaded_by_its_name(tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save(tmp_path)
    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert same(LanguageModel.from_pretrained("me/model", revision="v1"), model)
    assert asked == [("me/model", "v1")]


def test_folder_without_a_model_or_of_another_class_raises(tmp_path: Path, model: LanguageModel) -> None:
    with pytest.raises(FileNotFoundError):
        LanguageModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="field 'class' must be 'Memformer', got 'LanguageModel'"):
        Memformer.from_pretrained(tmp_path)


def test_missing_huggingface_hub_raises_and_names_the_extra(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    for action, name in (
        (model.save_pretrained, tmp_path),
        (LanguageModel.from_pretrained, "me/model"),
        (model.push_to_hub, "me/model"),
    ):
        with pytest.raises(ImportError, match=r"pip install attention-zoo\[hub\]"):
            action(name)
    assert not list(tmp_path.iterdir())
    model.save(tmp_path)
    assert same(LanguageModel.from_pretrained(tmp_path), model), "a folder needs no hub"


def test_importing_the_package_does_not_import_huggingface_hub() -> None:
    code = "import sys, attention_zoo; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
