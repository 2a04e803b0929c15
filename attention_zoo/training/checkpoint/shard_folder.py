"""The folder of a sharded checkpoint: two places for shards, written in turn, and a file that names the whole one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attention_zoo._files import remove_leftovers, write_aside
from attention_zoo.training.checkpoint.parts import write_contents

FORMAT = "attention_zoo.training.sharded"
VERSION = 1
POINTER = "last.json"
PLACES = ("shards_a", "shards_b")
REST = "rest.pt"
OPTIMIZER = {"names", "values", "settings"}
FILE = re.compile(r"\.metadata|rest\.pt|__\d{1,6}_\d{1,6}\.distcp")


def _is_part(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class"), str) and "state" in value


# what a file must look like, so that one that was tampered with is refused before it is used
FORM: dict[str, Callable[[Any], bool]] = {
    "optimizer": lambda value: (
        _is_part(value) and isinstance(value["state"], dict) and value["state"].keys() == OPTIMIZER
    ),
    "schedule": lambda value: value is None or (_is_part(value) and isinstance(value["state"], dict)),
    "generator": lambda value: value is None or _is_part(value),
    "random": lambda value: isinstance(value, list) and bool(value) and all(map(_is_random, value)),
    "extra": lambda value: isinstance(value, dict),
}


def _is_random(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"cpu", "cuda"}


def make_place(folder: Path) -> Path:
    """The place that `last.json` does not name, emptied."""
    try:
        last = read_pointer(folder)["place"]
    except (FileNotFoundError, ValueError):
        last = None
    place = folder / next(name for name in PLACES if name != last)
    for file in place.iterdir() if place.exists() else ():
        if file.suffix != ".distcp" and not file.name.startswith((".metadata", f".{REST}", REST)):
            raise ValueError(f"{place} must hold shards alone, since it is written anew, but {file.name} is there")
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    return place


def finish_place(place: Path, contents: dict[str, Any], step: int) -> None:
    """Write what is not in the shards, then say that all is whole."""
    write_contents(place / REST, contents)
    pointer = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "place": place.name,
        "files": {file.name: _digest(file) for file in sorted(place.iterdir()) if FILE.fullmatch(file.name)},
    }
    path = place.parent / POINTER
    remove_leftovers(path)
    write_aside(path, lambda aside: Path(aside).write_text(json.dumps(pointer, indent=2) + "\n"))


def read_rest(place: Path) -> dict[str, Any]:
    """What is not in the shards. Nothing in the file is executed.

    Raises:
        ValueError: it is something else; the message names the field.
    """
    path = place / REST
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that was tampered with can break the readers in any way
        raise ValueError(f"{path} must be what save_sharded wrote, but it cannot be read") from error
    if not isinstance(contents, dict) or not contents.keys() >= FORM.keys():
        raise ValueError(f"{path} must hold the fields {', '.join(FORM)}")
    for field, fits in FORM.items():
        if not fits(contents[field]):
            raise ValueError(f"{path}: field {field!r} must be as it was written, got {contents[field]!r}")
    return contents


def find_damage(path: Path, digest: str) -> str | None:
    """A sentence about a file that is not as it was written, or None."""
    if not path.is_file():
        return f"{path} must be there, since {POINTER} names it, but it is missing"
    if _digest(path) != digest:
        return f"{path} must be as it was written, but its checksum is another: it is damaged"
    return None


def read_pointer(folder: Path) -> dict[str, Any]:
    """What `last.json` says: the place that is whole, its step, and the checksums of its files.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else; the message names the field.
    """
    path = folder / POINTER
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        pointer = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(pointer, dict) or pointer.get("format") != FORMAT:
        raise ValueError(f"{path} must belong to a sharded checkpoint, but it holds something else")
    rules: dict[str, Callable[[Any], bool]] = {
        "version": lambda value: type(value) is int and value == VERSION,
        "step": lambda value: type(value) is int and value >= 0,
        "place": lambda value: value in PLACES,
        "files": _are_files,
    }
    for field, rule in rules.items():
        if not rule(pointer.get(field)):
            raise ValueError(f"{path}: field {field!r} must be as it was written, got {pointer.get(field)!r}")
    return pointer


def _are_files(value: object) -> bool:
    return isinstance(value, dict) and {".metadata", REST} <= value.keys() and all(map(FILE.fullmatch, value))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
