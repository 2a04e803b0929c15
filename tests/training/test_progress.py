"""Options and progress of training scripts."""

from __future__ import annotations

import argparse
import io

import pytest
import torch

from attention_zoo.training import Progress, parse_options


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that is set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(file: io.StringIO, seconds: list[float], **options: object) -> list[str]:
    clock = Clock()
    with Progress(len(seconds), file=file, clock=clock, **options) as progress:  # type: ignore[arg-type]
        for taken in seconds:
            clock.now += taken
            progress.update("loss 1.0")
    return file.getvalue().splitlines()


def test_progress_without_a_terminal_is_ten_lines() -> None:
    lines = run(io.StringIO(), [0.5] * 200, name="one stream")
    assert len(lines) == 10
    assert lines[0] == "one stream: step 20/200, loss 1.0, 2 steps/s, 90 s left"
    assert not any("\r" in line for line in lines)


def test_slow_steps_without_a_terminal_are_a_line_each_minute() -> None:
    assert len(run(io.StringIO(), [40.0] * 100)) == 50  # every tenth step is one of them


def test_progress_on_a_terminal_is_one_line() -> None:
    file = Terminal()
    run(file, [0.05] * 20)
    assert file.getvalue().count("\n") == 1
    assert file.getvalue().count("\r") > 5
    assert "step 20/20" in file.getvalue()


def test_hint_names_the_option_once_when_steps_are_far_slower_than_the_fastest() -> None:
    lines = run(io.StringIO(), [0.1] * 10 + [1.2] * 10)
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(hints) == 1
    assert "12 times as long as the fastest" in hints[0]
    assert hints[0].endswith("--threads 1")


@pytest.mark.parametrize("seconds", [[0.1] * 20, [0.1, 5.0, 0.1, 0.1] * 5, [0.001] * 10 + [0.05] * 10])
def test_no_hint_for_equal_steps_single_slow_steps_and_short_steps(seconds: list[float]) -> None:
    assert not any(line.startswith("hint") for line in run(io.StringIO(), seconds))


def test_time_before_a_written_line_is_no_step(capsys: pytest.CaptureFixture[str]) -> None:
    clock, file = Clock(), io.StringIO()
    with Progress(10, file=file, clock=clock) as progress:
        for _ in range(10):
            clock.now += 0.1
            progress.update()
            clock.now += 3.0
            progress.write("evaluated")
    assert progress.rate == pytest.approx(10)
    assert "hint" not in file.getvalue()
    assert capsys.readouterr().out.count("evaluated\n") == 10


def test_quiet_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with Progress(1, quiet=True, file=file) as progress:
        progress.update()
        progress.write("text")
    assert file.getvalue() + capsys.readouterr().out == ""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--steps", type=int, default=3)
    made.add_argument("--seed", type=int, default=0)
    return made


def test_options_set_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert parse_options(parser(), ["--threads", str(before + 1)]).steps == 3
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["--steps", "--threads"])
def test_integer_option_below_1_is_reported(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(parser(), [name, "0"])
    assert f"error: {name} must be at least 1, got 0" in capsys.readouterr().err


def test_seed_may_be_0() -> None:
    assert parse_options(parser(), ["--seed", "0"]).seed == 0
