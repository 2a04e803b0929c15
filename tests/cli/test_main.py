"""The entry point of the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import attention_zoo
from attention_zoo.attention import BLOCKS
from attention_zoo.cli import COMMANDS, main


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--help"])
        assert stop.value.code == 0
    assert capsys.readouterr().out.count("usage: attention-zoo") == 1 + len(COMMANDS)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"attention_zoo {attention_zoo.__version__}\n"


@pytest.mark.slow
def test_module_runs_and_a_closed_pipe_ends_it_quietly() -> None:
    command = [sys.executable, "-m", "attention_zoo", "list"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n\n")[1].count("\n") == len(BLOCKS)
    reading, writing = os.pipe()
    os.close(reading)
    cut = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (cut.returncode, cut.stderr) == (1, "")
