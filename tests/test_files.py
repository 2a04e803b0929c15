"""Atomic file writing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from attention_zoo._files import write_all_aside, write_aside


def fail_halfway(path: str) -> None:
    Path(path).write_text("hal")
    raise OSError("no space left")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(OSError, match="no space left"):
        write_aside(target, fail_halfway)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_no_file_of_a_group_is_replaced_if_one_write_fails(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    with pytest.raises(OSError, match="no space left"):
        write_all_aside({first: lambda path: Path(path).write_text("new"), second: fail_halfway})
    assert first.read_text() == "old"
    assert os.listdir(tmp_path) == ["first"]


def test_a_written_file_has_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_aside(tmp_path / "aside", lambda path: Path(path).write_text("new"))
    assert (tmp_path / "aside").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "aside").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
