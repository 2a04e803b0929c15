"""Tensors in files of torch.distributed.checkpoint, read without running what a file says."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

# torch.distributed.checkpoint takes half a second to import: every function here imports what it uses.


def write_shards(place: Path, state: dict[str, Any]) -> None:
    """Write nested dicts of tensors, each process its part of each: a collective.

    Raises:
        OSError: a process could not write; all raise.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with _alone_is_fine():
            save(state, storage_writer=FileSystemWriter(place))
    except CheckpointException as error:  # not an Exception, and with a traceback of every process for a message
        raise OSError(f"{place}: a process could not write its shards: {_causes(error)}") from error


def read_shards(place: Path, state: dict[str, Any]) -> None:
    """Fill nested dicts of tensors with what the files hold, whichever process wrote it: a collective.

    Raises:
        ValueError: a file is damaged, or not what `write_shards` wrote.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            torch.load(value, weights_only=True)  # refuses what torch's own planner would run
            value.seek(0)
            super().load_bytes(read_item, value)

    try:
        with _alone_is_fine():
            load(state, storage_reader=_reader(place), planner=Planner())
    except CheckpointException as error:
        raise ValueError(f"{place} must hold whole shards, but they cannot be read: {_causes(error)}") from error
    except Exception as error:  # metadata that was tampered with can mislead the reader in any way
        raise ValueError(f"{place} must hold whole shards, but they cannot be read: {error}") from error


def list_shards(place: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and the shape of every tensor in the files, by its names joined with dots.

    Raises:
        ValueError: the files are damaged.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _reader(place).read_metadata()
    try:
        return {
            name: (meta.properties.dtype, tuple(meta.size))
            for name, meta in metadata.state_dict_metadata.items()
            if isinstance(meta, TensorStorageMetadata)
        }
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{place / '.metadata'} must describe tensors, but {error}") from error


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _causes(error: Any) -> str:
    return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))


def _reader(place: Path) -> FileSystemReader:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            path = place / ".metadata"
            try:
                with path.open("rb") as file:
                    metadata: Metadata = MetadataUnpickler(file).load()
                metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
            except Exception as error:  # a damaged pickle can break in any way
                raise ValueError(f"{path} must be a checkpoint's metadata and nothing else, but {error}") from error
            return metadata

    return Reader(place)


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata and nothing else, so that reading a file cannot run what it says."""

    ALLOWED: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
        "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # by which some versions of Python pickle a member of an enum
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no metadata needs")


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which is no enum")
    return kind[name]
