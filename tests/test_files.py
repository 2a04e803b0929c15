"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from attention_zoo._files import write_all_aside, write_aside


def half_written(path: str) -> None:
    Path(path).write_text("hal")
    raise OSError("no space left")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(OSError, match="no space left"):
        write_aside(target, half_written)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    with pytest.raises(OSError, match="no space left"):
        write_all_aside({first: lambda path: Path(path).write_text("new"), second: half_written})
    assert first.read_text() == "old"
    assert os.listdir(tmp_path) == ["first"]


def test_a_written_file_has_the_rights_that_any_new_file_has(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_aside(tmp_path / "aside", lambda path: Path(path).write_text("new"))
    assert (tmp_path / "aside").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "aside").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
