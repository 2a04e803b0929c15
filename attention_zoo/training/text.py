"""Byte-level text: reading, splitting into training and validation, batches, and baselines in bits per byte."""

from __future__ import annotations

import gzip
import math
import os
import sysconfig
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from attention_zoo._checks import check_at_least, check_int, check_positive

VALIDATION = 0.1  # fraction of a text that is held out for validation
# Excluded from the standard library: third-party packages, tests, and tables written as Python.
EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data")


@dataclass(frozen=True)
class Text:
    """A text split into training and validation.

    Attributes:
        source: human-readable description of the origin.
        training, validation: bytes of each split, files joined by newlines.
        training_files, validation_files: number of files in each split; a single file counts in both.
    """

    source: str
    training: bytes
    validation: bytes
    training_files: int
    validation_files: int


def read_text(path: str | os.PathLike[str] | None = None) -> Text:
    """Read a text and split it into training and validation.

    The files of a folder are split by a hash of their relative paths: the split of a file does not depend on the other
    files. A single file is cut at 90 % of its bytes.

    Args:
        path: a file, or a folder that is read recursively: all UTF-8 files without NUL bytes, except hidden files and
            folders. None: the sources of Python's standard library, without its tests and tables.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `path` contains no text.
    """
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        files = _read_folder(folder, suffix=".py", excluded=EXCLUDED)
        source = f"Python's standard library in {folder}"
    else:
        place = Path(path)
        if not place.exists():
            raise FileNotFoundError(f"path must be a file or a folder of text, but {place} does not exist")
        files = _read_folder(place) if place.is_dir() else [(place.name, place.read_bytes())]
        source = str(place)
    if not any(data for _, data in files):
        raise ValueError(f"path must hold text (non-empty UTF-8 files), but there is none in {source}")
    if len(files) == 1:
        data = files[0][1]
        cut = int(len(data) * (1 - VALIDATION))
        return Text(source, data[:cut], data[cut:], 1, 1)
    training, validation = split_files(files)
    return Text(source, b"\n".join(training), b"\n".join(validation), len(training), len(validation))


def split_files(files: Sequence[tuple[str, bytes]]) -> tuple[list[bytes], list[bytes]]:
    """Split (relative path, content) pairs by a hash of the path, about one in ten for validation; order is kept.

    Args:
        files: at least two; each split gets at least one.
    """
    ranks = {name: int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64 for name, _ in files}
    chosen = sum(rank < VALIDATION for rank in ranks.values())
    chosen = min(max(chosen, 1), len(files) - 1)
    held_out = set(sorted(ranks, key=lambda name: ranks[name])[:chosen])
    training = [data for name, data in files if name not in held_out]
    return training, [data for name, data in files if name in held_out]


def as_tokens(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor (n,), the input of `random_batch` and `windows`."""
    _check_bytes(data)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def random_batch(text: Tensor, batch: int, length: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Sequences from random positions of a text.

    Args:
        text: (n,) uint8, as returned by `as_tokens`.
        batch: number of sequences b.
        length: bytes per sequence; a language model's loss predicts length - 1 of them.
        generator: random number generator, on the CPU.

    Returns:
        (b, length) int64.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    check_int(1, batch=batch)
    _check_text(text, length)
    starts = torch.randint(text.shape[0] - length + 1, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def windows(text: Tensor, length: int, *, at_most: int | None = None) -> Tensor:
    """Consecutive windows of a text, for evaluation.

    Each window starts with the last byte of the previous one, so that a loss over all windows predicts every byte but
    the first exactly once. A remainder shorter than a window is dropped.

    Args:
        text: (n,) uint8, as returned by `as_tokens`.
        length: bytes per window, at least 2.
        at_most: maximum number of windows, evenly spaced over the text. None: all.

    Returns:
        (windows, length) int64.

    Raises:
        ValueError: the text is shorter than one window, or `length` is below 2.
    """
    check_at_least(2, length=length)
    check_positive(at_most=at_most)
    _check_text(text, length)
    pieces = text.unfold(0, length, length - 1)
    count = pieces.shape[0]
    if at_most is not None and at_most < count:
        pieces = pieces[torch.arange(at_most) * count // at_most]
    return pieces.long()


def unigram_entropy(data: bytes) -> float:
    """Entropy of the byte frequencies in `data`, in bits per byte."""
    _check_bytes(data)
    if not data:
        raise ValueError("data must hold at least one byte, got none")
    shares = [count / len(data) for count in Counter(data).values()]
    return -sum(share * math.log2(share) for share in shares)


def gzip_bits_per_byte(data: bytes) -> float:
    """Size of `data` compressed by `gzip -9`, in bits per byte."""
    _check_bytes(data)
    if not data:
        raise ValueError("data must hold at least one byte, got none")
    return 8 * len(gzip.compress(data, compresslevel=9)) / len(data)


def _check_bytes(data: bytes) -> None:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")


def _check_text(text: Tensor, length: int) -> None:
    """Check that a text is a 1-D uint8 tensor of at least `length` bytes."""
    check_int(1, length=length)
    if not isinstance(text, Tensor) or text.dtype != torch.uint8:
        kind = f"dtype {text.dtype}" if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"text must be a uint8 tensor, as returned by as_tokens, got {kind}")
    if text.ndim != 1:
        raise ValueError(f"text must be (n,), got shape {tuple(text.shape)}")
    if text.shape[0] < length:
        raise ValueError(f"text must hold at least {length=} bytes, got {text.shape[0]} bytes")


def _read_folder(root: Path, *, suffix: str = "", excluded: Collection[str] = ()) -> list[tuple[str, bytes]]:
    """(relative path, content) of every text file below `root`, sorted by path."""
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not name.endswith(suffix) or not path.is_file():
                continue
            data = path.read_bytes()
            if data and _is_text(data):
                found[path.relative_to(root).as_posix()] = data
    return sorted(found.items())


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
