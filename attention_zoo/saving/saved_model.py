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

from attention_zoo._files import write_all_aside
from attention_zoo.saving.hub import HubMethods

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class SavedModel(HubMethods, nn.Module):
    """A model that `save` writes to a folder and `load` builds again.

    A subclass calls `self.remember(locals())` first thing after `super().__init__()`, so that its arguments are kept.
    """

    arguments: dict[str, Any]

    def remember(self, scope: Mapping[str, Any]) -> None:
        """Keep the constructor's arguments, which `locals()` there holds, for `save`."""
        self.arguments = {k: own_copy(v) for k, v in scope.items() if k != "self" and not k.startswith("__")}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the weights and the arguments; files are replaced only by whole new ones, and only both.

        Raises:
            TypeError: an argument cannot be written as JSON, a callable say, or the parameters are spread over
                processes; nothing is written then.
            OSError: the files could not be written, the disk being full, say; those of before are as they were.
        """
        for name, value in self.arguments.items():
            check_plain(name, value)
        config = {"class": type(self).__name__, "version": package_version(), "arguments": self.arguments}
        folder = Path(directory)
        if any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):  # DTensor takes long to import
            raise TypeError(
                "the model's parameters must be whole to be saved, but they are spread over processes: load what "
                "training.gather_weights(model) returns into a model of the same arguments, and save that"
            )
        weights = {name: tensor.contiguous() for name, tensor in unique_tensors(self).items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_all_aside(
            {
                folder / WEIGHTS: partial(write_weights, weights),
                folder / CONFIG: lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"),
            }
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """Build the model that `save` wrote. Nothing in the files is executed.

        Args:
            directory: where `save` wrote.
            device: where the weights go.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another class, or does not fit; the message names the field.
        """
        folder = Path(directory)
        model = cls(**read_arguments(folder / CONFIG, cls))
        load_weights(model, folder / WEIGHTS)
        return model.to(device)


def write_weights(weights: dict[str, Tensor], path: str) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written.
    """
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # as its own writer says so
        raise OSError(f"{path} could not be written: {error}") from error


def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("attention-zoo")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"


def own_copy(value: Any) -> Any:
    """Nested lists and mappings copied, so that what their owner does with them later cannot reach the copy."""
    if isinstance(value, Mapping):
        return {key: own_copy(item) for key, item in value.items()}
    return [own_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_plain(name: str, value: object) -> None:
    """Refuse an argument that JSON cannot hold.

    Raises:
        TypeError: naming it.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_plain(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(f"{name}[{index}]", item)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(
            f"{name} must be made of names, numbers and lists for the model to be saved, got {value!r}; "
            f"save its state_dict() instead"
        )


def read_arguments(path: Path, cls: type) -> dict[str, Any]:
    """The constructor's arguments in a config file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or belongs to another class.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise ValueError(f"{path} must hold an object with the field 'arguments'")
    if config.get("class") != cls.__name__:
        raise ValueError(f"{path}: field 'class' must be {cls.__name__!r}, got {config.get('class')!r}")
    arguments: dict[str, Any] = config["arguments"]
    return arguments


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`, all of it or nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or a tensor is missing, left over or of another shape.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from error
    wanted = unique_tensors(model)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{path} lacks the tensor {name!r}")
        if name not in wanted:
            raise ValueError(f"{path} holds the tensor {name!r}, which the model has not")
        if wanted[name].shape != found[name].shape:
            want, got = tuple(wanted[name].shape), tuple(found[name].shape)
            raise ValueError(f"{path}: tensor {name!r} must have shape {want}, got {got}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.data = tensor.data.to(found[name].dtype)  # a model saved in bfloat16 comes back in it
            tensor.copy_(found[name])


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with every tensor once, under its first name: tied weights are one tensor."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique
