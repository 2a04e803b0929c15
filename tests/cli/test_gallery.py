"""`attention-zoo gallery`: measured receptive fields match the definitions of the layers, and written files."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attention_zoo import (
    ConvAttention,
    CrossAttention,
    FullAttention,
    LanguageModel,
    TalkingHeadsAttention,
    conv_mask,
)
from attention_zoo.attention import BLOCKS, SimpleGateLoop
from attention_zoo.cli import main
from attention_zoo.cli._gallery.fields import LAYOUT, TOKENS, model_maps, receptive_field, trained_map
from attention_zoo.cli._gallery.page import describe
from attention_zoo.cli._gallery.pictures import draw_image_map, draw_map, draw_overview, field_as_text

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
    found = trained_map(BLOCKS[name], b"a line of code", dim=DIM, steps=1, text=b"x = [1, 2, 3]\n" * 9)
    assert found is not None
    of_image = "layout" in inspect.signature(BLOCKS[name]).parameters
    n = LAYOUT.length if of_image else 14
    assert found.weights.shape[1:] == (n, n)
    assert (found.image is not None) == of_image
    assert found.steps == (0 if name == "cross" else 1)
    if name != "cross":
        assert not found.weights.triu(1).any()


def test_map_of_an_image_layer_is_confined_to_its_mask() -> None:
    found = trained_map(partial(ConvAttention, kernel_size=3), b"a line of code", dim=DIM, steps=0, text=b"")
    assert found is not None
    assert not found.weights[:, ~conv_mask(LAYOUT, kernel_size=3)].any()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved during a test."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def labels(axes: Axes) -> tuple[str, str]:
    return axes.get_xlabel(), axes.get_ylabel()


def test_maps_have_axis_titles_and_a_colour_bar_that_names_negative_weights(figures: list[Figure]) -> None:
    weights = torch.rand(2, 14, 14)
    weights[1, 3, 2] = -0.5
    draw_map(weights, b"a line of code", "title", Path("map.png"))
    plain, signed, bar, signed_bar = figures[0].axes
    assert labels(plain) == labels(signed) == ("attends to (key)", "token (query)")
    assert labels(bar)[1] == "weight"
    assert labels(signed_bar)[1] == "weight (red: negative, blue: positive)"
    assert [tick.get_text() for tick in plain.get_xticklabels()] == list("a·line·of·code")
    assert min(tick.get_fontsize() for tick in plain.get_xticklabels()) >= 7
    assert signed.images[0].norm.vmin == -signed.images[0].norm.vmax


def test_map_of_an_image_layer_shows_the_image_below_the_weights(figures: list[Figure]) -> None:
    found = trained_map(ConvAttention, b"", dim=DIM, steps=0, text=b"")
    assert found is not None
    assert found.image is not None
    draw_image_map(found, LAYOUT, found.image, "title", Path("map.png"))
    pixels = [axes for axes in figures[0].axes if axes.get_xlabel() == "column"]
    assert len(pixels) == 3
    for axes in pixels:
        below, above = axes.images
        assert torch.equal(torch.tensor(below.get_array().filled()), found.image)
        assert (torch.tensor(above.get_alpha()) == 0).any()
    assert labels(figures[0].axes[-1])[1] == "weight"


def test_overview_has_a_colour_bar(figures: list[Figure]) -> None:
    draw_overview({"full": receptive_field(FullAttention(DIM, **SMALL), DIM)}, Path("overview.png"))
    assert labels(figures[0].axes[-1])[1] == "gradient, square root"
    assert figures[0].get_supxlabel() == "input token"


@pytest.mark.slow
def test_untrained_maps_are_labelled(tmp_path: Path) -> None:
    assert main(["gallery", "cross", "--dim", "16", "--steps", "1", "--out", str(tmp_path)]) == 0
    assert "untrained: random weights" in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_maps_of_a_saved_model_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LanguageModel(num_tokens=256, dim=16, depth=2, max_seq_len=8, **SMALL).save(tmp_path / "model")
    (tmp_path / "text").write_text("def function(x):")
    options = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")]
    assert main(["gallery", *options]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["layer_0_map.png", "layer_1_map.png"]
    used, maps = model_maps(tmp_path / "model", b"def function(x):")
    assert used == b"def func"
    assert [weights.shape for weights in maps] == [(2, 8, 8)] * 2
    assert main(["gallery", "full", *options]) == 2
    assert "blocks must be omitted" in capsys.readouterr().err


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


@pytest.mark.slow
def test_page_embeds_every_picture_and_links_only_to_papers(tmp_path: Path) -> None:
    assert main(["gallery", "full", "conv", "--dim", "16", "--steps", "1", "--out", str(tmp_path)]) == 0
    names = ["conv_field", "conv_map", "full_field", "full_map", "overview"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == names
    page = (tmp_path / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'src="(?!data:)', page)
    assert set(re.findall(r'href="(?!#)([^"/]*//[^/"]*)', page)) == {"https://arxiv.org"}
    assert '<meta name="viewport"' in page


@pytest.mark.slow
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
        (["--model", "folder"], "--model and --text must be given together"),
    ],
)
def test_invalid_options_are_reported(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", *options]) == 2
    assert message in capsys.readouterr().err
