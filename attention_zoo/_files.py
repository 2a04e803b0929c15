"""Atomic file writing: other processes see the old file or the new one, never a partial one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_aside(path: Path, write: Callable[[str], object]) -> None:
    """Write `path` atomically: call `write` with a temporary file in the same folder, then rename it to `path`."""
    write_all_aside({path: write})


def write_all_aside(writes: Mapping[Path, Callable[[str], object]]) -> None:
    """`write_aside` for several files: none is renamed before all are written."""
    asides: dict[Path, str] = {}
    try:
        for path, write in writes.items():
            handle, asides[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            write(asides[path])
            with open(asides[path], "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(asides[path], 0o666 & ~_umask())
        for path, aside in asides.items():
            os.replace(aside, path)
    except BaseException:
        for aside in asides.values():
            Path(aside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
