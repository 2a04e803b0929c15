"""Text as bytes, a byte as a token: reading it, parting it for training and validation, batches, yardsticks."""

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

from attention_zoo._checks import check_positive

VALIDATION = 0.1  # the part of a text that is kept for validation
# What is not code to learn from in the standard library: others' packages, tests, and tables written as Python.
NOT_SOURCES = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data")


@dataclass(frozen=True)
class Text:
    """A text in two parts, of which the second is for validation alone.

    Attributes:
        source: where it came from, for people.
        training, validation: the bytes of each part, its files joined by newlines.
        training_files, validation_files: how many files each part has; a single file counts in both.
    """

    source: str
    training: bytes
    validation: bytes
    training_files: int
    validation_files: int


def read_text(path: str | os.PathLike[str] | None = None) -> Text:
    """Read a text, and part it so that validation is unseen.

    The files of a folder are parted by a hash of their relative paths, so that no file is in both parts and a file
    stays in its part whatever other files come and go. A single file is cut at 90 % of its bytes.

    Args:
        path: a file, or a folder that is read with all its subfolders: the files that are UTF-8 without NUL bytes and
            whose names, and folders' names, do not start with a dot. None: the sources of Python's own standard
            library, without its tests and tables.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it holds no text.
    """
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        files = _read_folder(folder, suffix=".py", skipped=NOT_SOURCES)
        source = f"Python's standard library in {folder}"
    else:
        place = Path(path)
        if not place.exists():
            raise FileNotFoundError(f"path must be a file or a folder of text, but {place} does not exist")
        files = _read_folder(place) if place.is_dir() else [(place.name, place.read_bytes())]
        source = str(place)
    if not any(data for _, data in files):
        raise ValueError(f"path must hold text: UTF-8 that is not empty, but there is none in {source}")
    if len(files) == 1:
        data = files[0][1]
        cut = int(len(data) * (1 - VALIDATION))
        return Text(source, data[:cut], data[cut:], 1, 1)
    training, validation = split_files(files)
    return Text(source, b"\n".join(training), b"\n".join(validation), len(training), len(validation))


def split_files(files: Sequence[tuple[str, bytes]]) -> tuple[list[bytes], list[bytes]]:
    """Part (relative path, content) pairs by a hash of the path, about one in ten for validation, each part in order.

    Args:
        files: at least two; each part gets at least one.
    """
    ranks = {name: int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64 for name, _ in files}
    chosen = sum(rank < VALIDATION for rank in ranks.values())
    chosen = min(max(chosen, 1), len(files) - 1)
    unseen = set(sorted(ranks, key=lambda name: ranks[name])[:chosen])
    training = [data for name, data in files if name not in unseen]
    return training, [data for name, data in files if name in unseen]


def as_tokens(data: bytes) -> Tensor:
    """The bytes as a uint8 tensor (n,); `random_batch` and `windows` cut it into tokens."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def random_batch(text: Tensor, batch: int, length: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Pieces of a text from random places.

    Args:
        text: (n,) as `as_tokens` makes it.
        batch: pieces b.
        length: bytes in each; a loss predicts one fewer.
        generator: source of randomness, on the CPU.

    Returns:
        (b, length) int64.

    Raises:
        ValueError: the text is shorter than one piece.
    """
    check_positive(batch=batch)
    check_fits(text, length)
    starts = torch.randint(text.shape[0] - length + 1, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def windows(text: Tensor, length: int, *, at_most: int | None = None) -> Tensor:
    """Consecutive pieces of a text for evaluation.

    Each piece starts with the last byte of the one before, so that a loss over all of them predicts every byte but the
    first once; a rest shorter than a piece is left out.

    Args:
        text: (n,) as `as_tokens` makes it.
        length: bytes in each piece, at least 2.
        at_most: take this many of the pieces, evenly spread over the text. None: all.

    Returns:
        (pieces, length) int64.

    Raises:
        ValueError: the text is shorter than one piece, or length below 2.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 for a byte to be predicted, got {length=}")
    check_positive(at_most=at_most)
    check_fits(text, length)
    pieces = text.unfold(0, length, length - 1)
    count = pieces.shape[0]
    if at_most is not None and at_most < count:
        pieces = pieces[torch.arange(at_most) * count // at_most]
    return pieces.long()


def unigram_entropy(data: bytes) -> float:
    """Bits per byte of a model that knows how often each byte occurs in `data`, and nothing else."""
    if not data:
        raise ValueError("data must hold at least one byte, got none")
    shares = [count / len(data) for count in Counter(data).values()]
    return -sum(share * math.log2(share) for share in shares)


def gzip_bits_per_byte(data: bytes) -> float:
    """Bits per byte that `gzip -9` needs for `data`."""
    if not data:
        raise ValueError("data must hold at least one byte, got none")
    return 8 * len(gzip.compress(data, compresslevel=9)) / len(data)


def check_fits(text: Tensor, length: int) -> None:
    """Refuse a text that is no 1-D byte tensor, or shorter than one piece.

    Raises:
        TypeError: it is not uint8.
        ValueError: it has another shape, or too few bytes.
    """
    check_positive(length=length)
    if text.dtype != torch.uint8:
        raise TypeError(f"text must be a uint8 tensor, as as_tokens makes it, got dtype {text.dtype}")
    if text.ndim != 1:
        raise ValueError(f"text must be (n,), got shape {tuple(text.shape)}")
    if text.shape[0] < length:
        raise ValueError(f"text must hold at least one piece of {length=} bytes, got {text.shape[0]} bytes")


def _read_folder(root: Path, *, suffix: str = "", skipped: Collection[str] = ()) -> list[tuple[str, bytes]]:
    """(relative path, content) of every text file under `root`, sorted by path."""
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
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
