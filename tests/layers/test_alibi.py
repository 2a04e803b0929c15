"""ALiBi: slopes, bias by distance, and layers with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo import ALiBi, FullAttention, LanguageModel, softmax_attention
from attention_zoo.ops import softmax


def slopes_of_the_paper(heads: int) -> list[float]:
    """`get_slopes` of the authors' code."""

    def powers(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return powers(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return powers(closest) + slopes_of_the_paper(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 12, 16, 20, 32])
def test_alibi_slopes_equal_those_of_the_authors(heads: int) -> None:
    assert ALiBi(heads).slopes == pytest.approx(slopes_of_the_paper(heads), rel=1e-12)


def test_alibi_is_a_bias_by_distance_without_parameters() -> None:
    bias = ALiBi(6)
    assert not list(bias.parameters())
    got = bias(3, 5, torch.device("cpu"))
    assert got.values.shape == (6, 7)  # no number per pair
    query, key = torch.arange(2, 5)[:, None], torch.arange(5)
    want = -torch.tensor(slopes_of_the_paper(6))[:, None, None] * (query - key).abs()
    torch.testing.assert_close(got.pairs(3, 5), want)


@pytest.mark.parametrize("causal", [True, False])
def test_layers_with_alibi_equal_the_formula(causal: bool) -> None:
    block = FullAttention(16, heads=3, dim_head=4, causal=causal, bias=ALiBi(3)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (part.view(2, 9, 3, 4).transpose(1, 2) for part in block.to_qkv(x).chunk(3, -1))
    index = torch.arange(9)
    slopes = torch.tensor(slopes_of_the_paper(3), dtype=torch.float64)[:, None, None]
    scores = q @ k.transpose(-1, -2) / 2 - slopes * (index[:, None] - index).abs()
    if causal:
        scores = scores.masked_fill(index > index[:, None], -torch.inf)
    want = block.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("heads", "error"), [(0, ValueError), (2.0, TypeError), (None, TypeError)])
def test_alibi_refuses_wrong_numbers_of_heads(heads: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="heads must"):
        ALiBi(heads)
    with pytest.raises(ValueError, match="bias must have one slope per head, got 4 slopes and heads=8"):
        FullAttention(16, bias=ALiBi(4))


def test_a_wide_distance_bias_is_never_held_for_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(softmax, "MOST_PAIRS", 20 * 20)
    for name in ("sdpa_attention", "distance_biased_attention"):
        monkeypatch.setattr(softmax, name, lambda *args, name=name: chosen.append(name) or args[0])
    for n in (20, 21):
        q = torch.randn(1, 2, n, 4)
        softmax_attention(q, q, q, bias=ALiBi(2)(n, n, q.device))
    assert chosen == ["sdpa_attention", "distance_biased_attention"]


def test_a_model_with_alibi_is_saved(tmp_path: Path) -> None:
    attention = ("full", {"bias": ALiBi(4), "heads": 4, "dim_head": 8})
    model = LanguageModel(num_tokens=11, dim=16, depth=1, attention=attention, positions=None).eval()
    tokens = torch.randint(11, (1, 9))
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path).eval()(tokens), model(tokens))
