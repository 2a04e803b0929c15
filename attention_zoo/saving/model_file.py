"""The file of a model: safetensors with the configuration and a checksum in its metadata."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from attention_zoo._files import write_all_aside

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METADATA = "attention_zoo"  # the only key of the metadata: the configuration and the CRC32, as JSON


class ModelFileNotFoundError(FileNotFoundError, ValueError):
    """The folder of a model has no file of weights."""


def write_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write model.safetensors in one atomic replacement, and config.json, a copy of the configuration for readers.

    Raises:
        OSError: a file could not be written. Existing files are unchanged.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {METADATA: json.dumps({"config": config, "crc32": checksum(config, tensors)})}

    def write(path: str) -> None:
        try:
            save_file(tensors, path, metadata=metadata)
        except SafetensorError as error:  # what safetensors raises for a full disk
            raise OSError(f"{path} could not be written: {error}") from error

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    write_all_aside({folder / WEIGHTS: write, folder / CONFIG: lambda path: Path(path).write_text(text)})


def checksum(config: Any, tensors: Mapping[str, Tensor]) -> str:
    """CRC32 of a configuration and of the names, dtypes, shapes and bytes of all tensors."""
    crc = zlib.crc32(json.dumps(config).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), crc)  # type: ignore[arg-type]
    return f"{crc:08x}"


class ModelFile(NamedTuple):
    """The contents of a model file.

    Attributes:
        path: for error messages.
        config: the configuration, any JSON.
        tensors: by name.
    """

    path: Path
    config: Any
    tensors: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Number of bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_model(folder: Path) -> ModelFile:
    """Read the model file of a folder, and check it against its CRC32.

    Raises:
        ModelFileNotFoundError: the folder has none. It is a FileNotFoundError and a ValueError.
        ValueError: the file is damaged, or no model of this library.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelFileNotFoundError(f"{path} does not exist")
    data = path.read_bytes()  # safe_open opens the file twice, and it may be replaced in between
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file, got {error}") from error
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if METADATA not in metadata:
        raise ValueError(f"{path} must hold a configuration in its metadata, as `save` writes it")
    try:
        header = json.loads(metadata[METADATA])
        config, crc = header["config"], header["crc32"]
    except (json.JSONDecodeError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged: its configuration must be JSON as `save` writes it") from error
    if metadata != {METADATA: json.dumps({"config": config, "crc32": checksum(config, tensors)})}:
        raise ValueError(f"{path} is damaged: its contents must have the CRC32 {crc}, got {checksum(config, tensors)}")
    return ModelFile(path, config, tensors)


def package_version() -> str:
    """The installed version of this package, or "unknown" if it runs from a folder without installation."""
    try:
        return version("attention-zoo")
    except PackageNotFoundError:
        return "unknown"
