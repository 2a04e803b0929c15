"""`attention-zoo gallery`: measured receptive fields match the definitions of the layers, and written files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attention_zoo import ConvAttention, CrossAttention, FullAttention, TalkingHeadsAttention, conv_mask
from attention_zoo.attention import BLOCKS, SimpleGateLoop
from attention_zoo.cli import main
from attention_zoo.cli._gallery.fields import LAYOUT, TOKENS, receptive_field, sentence_map
from attention_zoo.cli._gallery.page import describe
from attention_zoo.cli._gallery.pictures import field_as_text

DIM = 16
SMALL = {"heads": 2, "dim_head": 8}


def test_receptive_field_of_a_causal_layer_is_the_past() -> None:
    strength = receptive_field(FullAttention(DIM, **SMALL), DIM).strength
    assert torch.equal(strength > 0, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
    assert strength.max() == 1


def test_receptive_field_of_a_reversed_recurrence_is_the_future() -> None:
    strength = receptive_field(SimpleGateLoop(DIM, reverse=True), DIM).strength
    assert torch.equal(strength > 0, torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu())


def test_receptive_field_of_an_image_layer_is_its_mask() -> None:
    block = ConvAttention(DIM, layout=LAYOUT, kernel_size=3, **SMALL)
    field = receptive_field(block, DIM)
    assert torch.equal(field.strength > 0, conv_mask(LAYOUT, kernel_size=3)[list(field.queries)])


def test_receptive_field_of_cross_attention_is_its_context() -> None:
    field = receptive_field(CrossAttention(DIM, context_dim=24, **SMALL), DIM)
    assert field.of_context
    assert field.strength.shape == (TOKENS, TOKENS // 2)
    assert (field.strength > 0).all()


def test_receptive_field_covers_all_streams() -> None:
    strength = receptive_field(TalkingHeadsAttention(DIM, streams=2, **SMALL), DIM).strength
    assert torch.equal(strength > 0, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())


@pytest.mark.parametrize("name", BLOCKS)
def test_every_layer_has_an_attention_map_of_a_sentence(name: str) -> None:
    found = sentence_map(BLOCKS[name], b"a line of code", dim=DIM, steps=1, text=b"x = [1, 2, 3]\n" * 9)
    assert found is not None
    weights, steps = found
    assert weights.shape[1:] == (14, 14)
    assert steps == (0 if name == "cross" else 1)
    if name != "cross":
        assert not weights.triu(1).any()


def test_text_of_a_causal_field_is_a_triangle() -> None:
    lines = field_as_text(receptive_field(FullAttention(DIM, **SMALL), DIM)).splitlines()
    assert [len(line.rstrip()) for line in lines] == list(range(1, TOKENS + 1))


@pytest.mark.parametrize("name", BLOCKS)
def test_docstrings_of_every_layer_state_equation_cost_and_paper(name: str) -> None:
    about = describe(BLOCKS[name])
    assert re.search(r"[=(]", about.equation)
    assert "Time" in about.cost
    assert "State" in about.cost
    assert about.papers
    assert about.snippet.endswith(("block(x)", "block(x, context)"))


@pytest.mark.parametrize("name", ["full", "conv", "cross", "gate_loop"])
def test_snippet_runs(name: str) -> None:
    scope = {"x": torch.randn(1, 3, 512), "context": torch.randn(1, 2, 512)}
    exec(describe(BLOCKS[name]).snippet, scope)
    assert scope["out"].shape == (1, 3, 512)


def test_page_embeds_every_picture_and_links_only_to_papers(tmp_path: Path) -> None:
    assert main(["gallery", "full", "conv", "--dim", "16", "--steps", "1", "--out", str(tmp_path)]) == 0
    names = ["conv_field", "conv_map", "full_field", "full_map", "overview"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == names
    page = (tmp_path / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'src="(?!data:)', page)
    assert set(re.findall(r'href="(?!#)([^"/]*//[^/"]*)', page)) == {"https://arxiv.org"}
    assert '<meta name="viewport"' in page


def test_gallery_of_image_layers_has_no_overview(tmp_path: Path) -> None:
    assert main(["gallery", "conv", "--dim", "16", "--steps", "0", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"conv_field.png", "conv_map.png", "index.html"}


def test_ascii_writes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", "axial_row", "--ascii", "--out", str(tmp_path / "none")]) == 0
    assert "pixel (4, 5): text |" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_user_defined_layer_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\nclass Mine(nn.Linear):\n    def __init__(self, dim): super().__init__(dim, dim)\n"
    (tmp_path / "my_blocks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["gallery", "my_blocks:Mine", "--dim", "16", "--out", "pictures"]) == 0
    assert (tmp_path / "pictures" / "my_blocks_Mine_field.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ful"], "did you mean 'full'"),
        (["full", "ful"], "did you mean 'full'"),
        (["--steps", "-1"], "steps must be at least 0"),
        (["--sentence", "short"], "sentence must have at least 8 bytes"),
    ],
)
def test_invalid_options_are_reported(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", *options]) == 2
    assert message in capsys.readouterr().err
