"""Old weight files in, folders of safetensors and their configuration out."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attention_zoo._files import write_all_aside
from attention_zoo.interop.packages import find_loader, from_upstream
from attention_zoo.interop.weights import Weights
from attention_zoo.saving.saved_model import CONFIG, WEIGHTS, check_plain, package_version, write_weights


def convert(
    package: str,
    cls: str,
    weights: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Read an old weight file, check that it loads, and write `model.safetensors` and `config.json`, for `load`.

    Args:
        package, cls: see `from_upstream`.
        weights: a file that torch.save wrote: a state_dict, or a trainer's file of DALLE-pytorch, which holds its
            arguments too. Nothing in it is executed.
        directory: where to write; made where it does not exist.
        arguments: what the class's constructor was given; over what a trainer's file says.

    Returns:
        For each old name what became of it.

    Raises:
        ValueError: see `from_upstream`; or the file is damaged, holds no state_dict, or wants to run code.
        FileNotFoundError: there is no such file.
    """
    find_loader(package, cls)
    tensors, told = read_weights(weights)
    told = {**told, **(arguments or {})}
    for name, value in told.items():
        check_plain(name, value)
    account = Weights(tensors)
    from_upstream(package, cls, account, **told)  # type: ignore[arg-type]
    used = {name: tensor.contiguous() for name, tensor in tensors.items() if _is_used(account.account[name])}
    config = {"package": package, "class": cls, "arguments": told, "version": package_version()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_all_aside(
        {
            folder / WEIGHTS: partial(write_weights, used),
            folder / CONFIG: lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"),
        }
    )
    return account.account


def load(directory: str | os.PathLike[str]) -> nn.Module:
    """The module that `convert` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or does not fit.
    """
    folder = Path(directory)
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    for field, kind in (("package", str), ("class", str), ("arguments", dict)):
        if not isinstance(config, dict) or not isinstance(config.get(field), kind):
            raise ValueError(f"{path} must hold an object with the field {field!r}, as convert wrote it")
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{folder / WEIGHTS} must be a safetensors file, got {error}") from error
    return from_upstream(config["package"], config["class"], tensors, **config["arguments"])


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in a file of torch.save, and the arguments that a trainer of DALLE-pytorch kept beside it.

    Raises:
        ValueError: the file is damaged, holds no state_dict, or wants to run code.
        FileNotFoundError: there is no such file.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} must hold tensors and plain values alone, but reading it would run code of its own: it is refused"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} must be a file of torch.save, got {error}") from error
    told: dict[str, Any] = {}
    if isinstance(found, Mapping) and "weights" in found and "hparams" in found:
        told, found = dict(found["hparams"]), found["weights"]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} must hold a state_dict, names and their tensors, got {type(found).__name__}")
    return dict(found), told


def _is_used(fate: str) -> bool:
    return not fate.startswith(("left out", "repeats"))
