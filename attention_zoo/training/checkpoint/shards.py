"""Tensors in files of torch.distributed.checkpoint, read without executing code in them.

Importing torch.distributed.checkpoint takes half a second, so this file is imported when it is used.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

# BytesStorageMetadata is left out: it marks pickled values, which torch.distributed.checkpoint loads unrestricted.
METADATA = "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata"
ALLOWED = {
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "torch": " ".join(["Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))]),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": f"{METADATA} _MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
}


def write_tensors(place: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, each rank its shards. Collective.

    Raises:
        OSError: a rank could not write; raised on all ranks.
    """
    with _errors_as(OSError, f"{place} could not be written"):
        save(tensors, storage_writer=FileSystemWriter(place))


def read_tensors(place: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors in place, whichever ranks wrote them. Collective.

    Raises:
        ValueError: a file could not be read.
    """
    with _errors_as(ValueError, f"{place} must be readable"):
        load(tensors, storage_reader=SafeReader(place))


@contextmanager
def _errors_as(kind: type[Exception], message: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:  # a BaseException, whose message contains the traceback of every rank
        causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise kind(f"{message}: {causes}") from error


class SafeReader(FileSystemReader):
    """A reader of checkpoints that contain only tensors."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(f"{self.path}/.metadata", "rb") as file:
            return MetadataUnpickler(file).load()


class MetadataUnpickler(pickle.Unpickler):
    """Unpickler of `Metadata` that rejects all other classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # some versions of Python pickle a member of an enum with it
            return lambda _, member: _MEM_FORMAT_ENCODING[member]
        if name in ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in metadata")
