"""Save and load: weights in `model.safetensors`, the constructor's arguments in `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attention_zoo._files import write_all_aside, write_aside
from attention_zoo.saving.hub import import_hub, push
from attention_zoo.saving.model_card import write_card

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"


class SavedModel(nn.Module):
    """A model that `save` writes to a folder and `load` rebuilds; the `_pretrained` methods use the hub as well.

    The constructor of a subclass calls `self.remember(locals())` directly after `super().__init__()`.
    """

    arguments: dict[str, Any]

    def remember(self, scope: Mapping[str, Any]) -> None:
        """Store the constructor's arguments, `locals()` of the constructor, for `save`."""
        self.arguments = {k: own_copy(v) for k, v in scope.items() if k != "self" and not k.startswith("__")}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the weights and the arguments. Existing files are replaced only after both were written completely.

        Raises:
            TypeError: an argument cannot be written as JSON, such as a callable, or the parameters are sharded over
                processes. Nothing is written.
            OSError: the files could not be written. Existing files are unchanged.
        """
        for name, value in self.arguments.items():
            check_plain(name, value)
        config = {"class": type(self).__name__, "version": package_version(), "arguments": self.arguments}
        if any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):  # DTensor is slow to import
            raise TypeError(
                "the model's parameters must not be sharded over processes to be saved: load the result of "
                "training.gather_weights(model) into a model with the same arguments, and save that model"
            )
        write_model(Path(directory), unique_tensors(self), config)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """Build the model written by `save`. No code from the files is executed.

        Args:
            directory: the folder.
            device: device of the model.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another class, or does not fit; the message names the field.
        """
        folder = Path(directory)
        model = cls(**read_arguments(folder / CONFIG, cls))
        load_weights(model, folder / WEIGHTS)
        return model.to(device)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        data: str | None = None,
        score: str | None = None,
        command: str | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> str | None:
        """Write the files of `save` and a model card, README.md.

        Files are replaced only by complete new ones. A README.md that exists is kept. Needs the extra `hub`.

        Args:
            directory: the folder to write to, which `load` and `from_pretrained` read.
            data, score, command: sentences for the card: the training data, the model's score, the command that
                trained it.
            push_to_hub: whether to upload the files to the hub.
            repo_id: the repository, "owner/name". None: the folder's name.
            options: passed to huggingface_hub's `push_to_hub`; only with push_to_hub=True.

        Returns:
            The address on the hub, or None without push_to_hub.

        Raises:
            ImportError: huggingface_hub is not installed.
            TypeError: see `save`; or options without push_to_hub=True.
        """
        if options and not push_to_hub:
            raise TypeError(f"options must come with push_to_hub=True, got {', '.join(sorted(options))}")
        import_hub()
        self.save(directory)
        card = Path(directory, CARD)
        if not card.exists():
            text = write_card(self, data=data, score=score, command=command)
            write_aside(card, lambda path: Path(path).write_text(text, encoding="utf-8"))
        if not push_to_hub:
            return None
        return push(self, card.read_text(encoding="utf-8"), repo_id or card.parent.name, options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Build a model from a folder written by `save_pretrained` or `save`, or from the hub with the extra `hub`.

        Args:
            name: a folder, or a repository "owner/name".
            device: device of the model.
            revision, token, cache_dir, force_download, local_files_only: of a repository; see huggingface_hub.

        Raises:
            ImportError: `name` is not a folder and huggingface_hub is not installed.
            FileNotFoundError, ValueError: see `load`.
        """
        source = str(name)
        if os.path.isdir(source):
            return cls.load(source, device=device)
        if os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
            raise FileNotFoundError(f"{source} does not exist, and a repository is called 'owner/name'")
        folder = import_hub().snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS],
        )
        return cls.load(folder, device=device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        data: str | None = None,
        score: str | None = None,
        command: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the files of `save_pretrained` to the hub. Needs the extra `hub`.

        Args:
            repo_id: "owner/name".
            data, score, command: see `save_pretrained`.
            options: private, branch, token, commit_message, ...: see huggingface_hub.

        Returns:
            The address on the hub.
        """
        return push(self, write_card(self, data=data, score=score, command=command), repo_id, options)


def write_model(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the two files of a model. Existing files are replaced only after both were written completely.

    Raises:
        OSError: the files could not be written. Existing files are unchanged.
    """
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_all_aside(
        {
            folder / WEIGHTS: partial(write_weights, weights),
            folder / CONFIG: lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"),
        }
    )


def write_weights(weights: dict[str, Tensor], path: str) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the file could not be written.
    """
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what safetensors raises for a full disk
        raise OSError(f"{path} could not be written: {error}") from error


def package_version() -> str:
    """The installed version of this package, or "unknown" if it runs from a folder without installation."""
    try:
        return version("attention-zoo")
    except PackageNotFoundError:
        return "unknown"


def own_copy(value: Any) -> Any:
    """A copy of nested lists and mappings, which later changes by the caller do not reach."""
    if isinstance(value, Mapping):
        return {key: own_copy(item) for key, item in value.items()}
    return [own_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_plain(name: str, value: object) -> None:
    """Check that JSON can hold an argument.

    Raises:
        TypeError: it cannot; the message names the argument.
    """
    if isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            check_plain(f"{name}[{key!r}]", item)
    elif not isinstance(value, (str, int, float, type(None))):
        raise TypeError(
            f"{name} must be made of names, numbers and lists for the model to be saved, got {value!r}; "
            f"save its state_dict() instead"
        )


def read_arguments(path: Path, cls: type) -> dict[str, Any]:
    """Read the constructor's arguments from a config file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, or of another class.
    """
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise ValueError(f"{path} must hold an object with the field 'arguments'")
    if config.get("class") != cls.__name__:
        raise ValueError(f"{path}: field 'class' must be {cls.__name__!r}, got {config.get('class')!r}")
    return config["arguments"]


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file, got {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`. The model is changed only if all tensors fit.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, or a tensor is missing, unexpected or of another shape.
    """
    found = read_tensors(path)
    wanted = unique_tensors(model)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{path}: missing tensor {name!r}")
        if name not in wanted:
            raise ValueError(f"{path}: unexpected tensor {name!r}")
        if wanted[name].shape != found[name].shape:
            want, got = tuple(wanted[name].shape), tuple(found[name].shape)
            raise ValueError(f"{path}: tensor {name!r} must have shape {want}, got {got}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.data = tensor.data.to(found[name].dtype)  # a model saved in bfloat16 is loaded in bfloat16
            tensor.copy_(found[name])


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with tied tensors once, under the first of their names."""
    tensors = model.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first_names[id(tensor)] == name}
