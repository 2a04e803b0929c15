"""Conversion of upstream weight files to folders of safetensors and a configuration."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.interop.packages import find_loader, from_upstream
from attention_zoo.interop.weights import Weights
from attention_zoo.saving.encoding import encode
from attention_zoo.saving.model_file import package_version, read_model, write_model


def convert(
    package: str,
    cls: str,
    weights: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Read an upstream weight file, check that it loads, and write `model.safetensors` and `config.json` for `load`.

    Args:
        package, cls: see `from_upstream`.
        weights: a file written by torch.save: a state_dict, or a training checkpoint of DALLE-pytorch, which also
            holds the arguments. Nothing in it is executed.
        directory: where to write; created if missing.
        arguments: arguments of the class's constructor; they override those in a training checkpoint.

    Returns:
        What became of each entry of the state_dict, by its upstream name.

    Raises:
        ValueError: see `from_upstream` and `read_weights`.
        FileNotFoundError: the file does not exist.
    """
    find_loader(package, cls)
    tensors, saved = read_weights(weights)
    values = {**saved, **(arguments or {})}
    encode(values)  # an argument that JSON cannot hold is an error before anything is loaded
    checked = Weights(tensors)
    from_upstream(package, cls, checked, **values)
    unused = ("left out", "repeats")
    used = {name: tensor for name, tensor in tensors.items() if not checked.account[name].startswith(unused)}
    config = {"package": package, "class": cls, "arguments": encode(values), "version": package_version()}
    write_model(Path(directory), used, config)
    return checked.account


def load(directory: str | os.PathLike[str]) -> nn.Module:
    """Build the module that `convert` wrote.

    Raises:
        ValueError: the file is missing (also a FileNotFoundError), damaged, or does not fit.
    """
    path, config, tensors = read_model(Path(directory))
    for field, kind in (("package", str), ("class", str), ("arguments", dict)):
        if not isinstance(config, dict) or not isinstance(config.get(field), kind):
            raise ValueError(f"{path} must have a configuration with {field!r}, as written by convert")
    return from_upstream(config["package"], config["class"], tensors, **config["arguments"])


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in a file of torch.save, and the arguments saved with it in a checkpoint of DALLE-pytorch.

    Raises:
        ValueError: the file is damaged, holds no state_dict, or would execute code.
        FileNotFoundError: the file does not exist.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} must hold only tensors and plain values; it was not read as it runs code") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} must be a file of torch.save, got {error}") from error
    arguments: dict[str, Any] = {}
    if isinstance(found, Mapping) and "weights" in found and "hparams" in found:
        arguments, found = dict(found["hparams"]), found["weights"]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} must hold a state_dict of names and tensors, got {type(found).__name__}")
    return dict(found), arguments
