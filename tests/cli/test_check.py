"""`attention-zoo check` on built-in layers and models and on those of a user's file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attention_zoo.cli import check, main
from attention_zoo.testing import Subject
from attention_zoo.testing.report import Outcome

OWN = '''
import torch
from torch import nn


class Past(nn.Module):
    """The mean of all previous tokens, or with a leak of all tokens."""

    def __init__(self, dim, leak=False):
        super().__init__()
        self.leak = leak
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, *, mask=None):
        ones = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        total, count = (x * ones).cumsum(1), ones.cumsum(1)
        if self.leak:
            total, count = total[:, -1:].expand_as(x), count[:, -1:].expand_as(ones)
        return self.to_out(total / count.clamp(min=1))


class Bigram(nn.Module):
    """Logits from the last two tokens; the batch mean is added if asked for."""

    def __init__(self, num_tokens, mixes=False):
        super().__init__()
        self.mixes = mixes
        self.embedding = nn.Embedding(num_tokens, 8)
        self.to_logits = nn.Linear(8, num_tokens)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        return self.to_logits(x + x.mean(0) if self.mixes else x)


NUMBER = 3


def not_a_module(dim):
    return dim
'''
FAST = ["--checks", "shapes", "causality", "rows", "steps"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_blocks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own")
def test_correct_user_defined_layer_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own_blocks:Past", "--lengths", "1", "7", *FAST]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "outcome", "what"]
    assert [line.split()[:2] for line in lines[1:4]] == [[name, "passed"] for name in ("shapes", "causality", "rows")]
    assert lines[4].split(maxsplit=1)[1].split("  ") == ["not applicable", "the block has no step"]


@pytest.mark.usefixtures("own")
def test_leak_is_reported_with_its_size_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own_blocks:Past", "--arguments", '{"leak": true}', "--lengths", "1", "7", *FAST]) == 1
    out = capsys.readouterr().out
    assert re.search(r"causality +failed +output 0 has a gradient .*\d", out)
    assert "own_blocks:Past fails 1 of 4 checks." in out


@pytest.mark.parametrize("block", ["full", "cross", "gate_loop"])
def test_built_in_layer_is_checked_by_name(block: str) -> None:
    assert main(["check", block, "--lengths", "1", "7", *FAST]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("block", ["conv", "axial_row", "axial_col", "block_sparse"])
def test_image_layer_has_a_default_layout_and_lengths_that_fit(block: str) -> None:
    assert main(["check", block, "--checks", "shapes", "causality", "--effort", "quick"]) == 0


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ([], {1, 2, 131, 300}),
        (["--effort", "quick"], {1, 2, 131}),
        (["--lengths", "5", "400"], {5, 400}),
        (["--arguments", '{"layout": {"text_len": 4, "height": 3, "width": 3}}'], {1, 2, 13}),
    ],
)
def test_lengths_of_image_layers_fit_the_layout(
    options: list[str], lengths: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects: list[Subject] = []
    monkeypatch.setattr(
        check, "run_check", lambda name, subject: subjects.append(subject) or Outcome(name, "passed", "")
    )
    assert main(["check", "conv", "--checks", "shapes", *options]) == 0
    found = {*subjects[0].lengths, *subjects[0].long_lengths}
    assert lengths <= found
    assert max(found) == max(lengths) <= subjects[0].make_block().layout.length


def test_image_layer_takes_its_layout_as_an_object() -> None:
    layout = '{"layout": {"text_len": 3, "height": 2, "width": 3}, "heads": 2, "dim_head": 8}'
    assert main(["check", "conv", "--arguments", layout, "--lengths", "1", "2", "9", *FAST]) == 0


@pytest.mark.usefixtures("own")
def test_user_defined_model_is_checked_from_token_ids(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-tokens", "16", "--lengths", "1", "7"]
    checks = ["--checks", "shapes", "causality", "rows", "padding", "loss", "arguments"]
    assert main(["check", "own_blocks:Bigram", *options, *checks]) == 0
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1] for row in rows] == ["passed", "passed", "passed", "not applicable", "not applicable", "note"]
    assert main(["check", "own_blocks:Bigram", "--arguments", '{"mixes": true}', *options, *checks]) == 1
    assert "own_blocks:Bigram fails 2 of 6 checks." in capsys.readouterr().out
    assert main(["check", "own_blocks:Bigram", "--strict", *options, "--checks", "arguments"]) == 1


def test_model_of_the_library_is_checked_by_name() -> None:
    options = ["--num-tokens", "16", "--lengths", "1", "7", "--checks", "shapes", "loss", "generation"]
    assert main(["check", "LanguageModel", "--arguments", '{"attention": "cosine_sim"}', *options]) == 0


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ful"], "did you mean 'full'"),
        (["own_blocks:Pest"], r"its modules are ['Past', 'Bigram']"),
        (["own_blocks:NUMBER"], "must be a class or function"),
        (["own_blocks:not_a_module"], "must give an nn.Module, got int"),
        (["no_such_file:Block"], "No module named 'no_such_file'"),
        (["own_blocks:Past", "--arguments", '{"laek": 1}'], "unexpected keyword argument 'laek'"),
        (["own_blocks:Past", "--arguments", "leak"], "--arguments must be a JSON object"),
        (["full", "--checks", "causaliti"], "did you mean 'causality'"),
        (["full", "--dim", "0"], "dim must be at least 1"),
        (["LanguageModel"], "LanguageModel is a model: give --num-tokens"),
        (["LanguageModl", "--num-tokens", "16"], "did you mean 'LanguageModel'"),
        (["LanguageModel", "--num-tokens", "16", "--checks", "map"], "check must be one of"),
    ],
)
def test_invalid_options_are_reported(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *options]) == 2
    assert message in capsys.readouterr().err
