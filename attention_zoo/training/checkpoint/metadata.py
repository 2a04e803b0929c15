"""Reading the metadata of torch.distributed.checkpoint, a pickle, without executing code in it."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

# BytesStorageMetadata is left out: it marks pickled values, which torch.distributed.checkpoint loads unrestricted.
METADATA = "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata"
ALLOWED = {
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "torch": " ".join(["Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))]),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": f"{METADATA} _MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
}


class SafeReader(FileSystemReader):
    """A reader of checkpoints that contain only tensors."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(f"{self.path}/.metadata", "rb") as file:
            metadata: Metadata = MetadataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """Unpickler of `Metadata` that rejects all other classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # some versions of Python pickle a member of an enum with it
            return lambda _, member: _MEM_FORMAT_ENCODING[member]
        if name in ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in metadata")
