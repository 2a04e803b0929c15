"""Byte-level text: reading, splitting into training and validation, batches, and baselines in bits per byte."""

from __future__ import annotations

import codecs
import gzip
import itertools
import math
import os
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from attention_zoo._checks import check_at_least, check_int, check_positive

Content = TypeVar("Content")

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


class FilePart(NamedTuple):
    """Bytes start ... stop - 1 of a file."""

    path: Path
    start: int
    stop: int

    def read(self) -> bytes:
        """The bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


@dataclass(frozen=True)
class TextFiles:
    """The files of a text split into training and validation, without their contents.

    Attributes:
        source: human-readable description of the origin.
        training, validation: parts of files; of a single file, one part in each.
    """

    source: str
    training: tuple[FilePart, ...]
    validation: tuple[FilePart, ...]

    @property
    def training_bytes(self) -> int:
        """Size of the training files."""
        return sum(part.stop - part.start for part in self.training)

    @property
    def validation_bytes(self) -> int:
        """Size of the validation files."""
        return sum(part.stop - part.start for part in self.validation)


def find_text_files(path: str | os.PathLike[str] | None = None, *, progress: bool = False) -> TextFiles:
    """Find the files of a text and split them into training and validation.

    The files of a folder are split by a hash of their relative paths: the split of a file does not depend on the other
    files. A single file is cut at 90 % of its bytes.

    Args:
        path: a file, or a folder that is searched recursively: all UTF-8 files without NUL bytes, except hidden files
            and folders. None: the sources of Python's standard library, without its tests and tables.
        progress: whether to show a progress bar over the files, each of which is read once (needs tqdm, from the extra
            `examples`).

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `path` contains no text.
        ImportError: progress=True without tqdm.
    """
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        files = _find_in_folder(folder, suffix=".py", excluded=EXCLUDED, progress=progress)
        source = f"Python's standard library in {folder}"
    else:
        place = Path(path)
        if not place.exists():
            raise FileNotFoundError(f"path must be a file or a folder of text, but {place} does not exist")
        files = _find_in_folder(place, progress=progress) if place.is_dir() else [(place.name, _whole(place))]
        source = str(place)
    if not any(part.stop for _, part in files):
        raise ValueError(f"path must hold text (non-empty UTF-8 files), but there is none in {source}")
    if len(files) == 1:
        whole = files[0][1]
        cut = int(whole.stop * (1 - VALIDATION))
        return TextFiles(source, (whole._replace(stop=cut),), (whole._replace(start=cut),))
    training, validation = split_files(files)
    return TextFiles(source, tuple(training), tuple(validation))


def read_text(path: str | os.PathLike[str] | None = None) -> Text:
    """Read a text and split it into training and validation. Argument and errors: see `find_text_files`."""
    files = find_text_files(path)
    training, validation = (b"\n".join(part.read() for part in parts) for parts in (files.training, files.validation))
    return Text(files.source, training, validation, len(files.training), len(files.validation))


def read_documents(
    parts: Sequence[FilePart],
    *,
    epochs: int | None = 1,
    generator: torch.Generator | None = None,
    max_bytes: int = 2**24,
) -> Iterator[bytes]:
    """Read files one after the other, as the documents of `packed_batches`. Memory is that of one document.

    Args:
        parts: of a `TextFiles`.
        epochs: number of passes over the files. None: without end.
        generator: random number generator, on the CPU, that draws the order of the files in each epoch. None: as given.
        max_bytes: a longer part is read in pieces of this size. Each starts with the last byte of the previous one, so
            that a next-token loss predicts every byte but the file's first.

    Raises:
        TypeError, ValueError: `parts` holds no byte, `epochs` is below 1, or `max_bytes` is below 2; in the call.
    """
    check_positive(epochs=epochs)
    check_at_least(2, max_bytes=max_bytes)
    if not any(part.start < part.stop for part in parts):  # an endless iterator would yield nothing
        raise ValueError(f"parts must hold at least one byte, got {len(parts)} empty parts")

    def read() -> Iterator[bytes]:
        for _ in itertools.count() if epochs is None else range(epochs):
            order = range(len(parts)) if generator is None else torch.randperm(len(parts), generator=generator).tolist()
            for index in order:
                path, first, end = parts[index]
                for start in range(first, max(end - 1, first + 1), max_bytes - 1):
                    yield FilePart(path, start, min(start + max_bytes, end)).read()

    return read()


def split_files(files: Sequence[tuple[str, Content]]) -> tuple[list[Content], list[Content]]:
    """Split (relative path, content) pairs by a hash of the path, about one in ten for validation; order is kept.

    Args:
        files: at least two; each split gets at least one.
    """
    ranks = {name: int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64 for name, _ in files}
    chosen = sum(rank < VALIDATION for rank in ranks.values())
    chosen = min(max(chosen, 1), len(files) - 1)
    held_out = set(sorted(ranks, key=lambda name: ranks[name])[:chosen])
    training = [content for name, content in files if name not in held_out]
    return training, [content for name, content in files if name in held_out]


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


def _whole(path: Path) -> FilePart:
    return FilePart(path, 0, path.stat().st_size)


def _find_in_folder(
    root: Path, *, suffix: str = "", excluded: Collection[str] = (), progress: bool
) -> list[tuple[str, FilePart]]:
    """(relative path, file) of every non-empty text file below `root`, sorted by path."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(".")]
        paths += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    found = {
        path.relative_to(root).as_posix(): _whole(path)
        for path in _with_bar(paths, progress)
        if path.is_file() and path.stat().st_size and _is_text(path)
    }
    return sorted(found.items())


def _with_bar(paths: list[Path], progress: bool) -> Iterable[Path]:
    if not progress:
        return paths
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install attention-zoo[examples]") from error
    return tqdm(paths, desc="files", unit="file")


def _is_text(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while data := file.read(2**20):
                if b"\0" in data:
                    return False
                decoder.decode(data)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
