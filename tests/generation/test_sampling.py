"""Sampler and filters; filters are compared with a search through all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from attention_zoo.generation import Sampler, min_p, top_k, top_p


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def kept(filtered: Tensor, logits: Tensor) -> list[set[int]]:
    """The ids that a filter kept in every row, whose logits must be unchanged."""
    assert filtered.shape == logits.shape
    stays = filtered != -math.inf
    assert torch.equal(filtered[stays], logits[stays])
    return [set(row.nonzero()[:, 0].tolist()) for row in stays]


def by_search(logits: Tensor, keep: Callable[[dict[int, float]], Iterable[int]]) -> list[set[int]]:
    """The ids that `keep` selects from the probabilities of every row."""
    return [set(keep(dict(enumerate(row.double().softmax(-1).tolist())))) for row in logits]


def largest(count: int) -> Callable[[dict[int, float]], Iterable[int]]:
    return lambda row: sorted(row, key=row.__getitem__, reverse=True)[:count]


def nucleus(p: float) -> Callable[[dict[int, float]], Iterable[int]]:
    def keep(row: dict[int, float]) -> Iterable[int]:
        total = 0.0
        for token in sorted(row, key=row.__getitem__, reverse=True):
            yield token
            total += row[token]
            if total >= p:
                return

    return keep


def at_least(p: float) -> Callable[[dict[int, float]], Iterable[int]]:
    return lambda row: [token for token in row if row[token] >= p * max(row.values())]


@pytest.fixture(params=[1.0, 5.0, 0.01], ids=["usual", "peaked", "flat"])
def logits(request: pytest.FixtureRequest) -> Tensor:
    return request.param * torch.randn(13, 29)


@pytest.mark.parametrize("k", [1, 2, 10, 28, 29])
def test_top_k_keeps_the_k_largest_logits(logits: Tensor, k: int) -> None:
    assert kept(top_k(logits, k), logits) == by_search(logits, largest(k))


@pytest.mark.parametrize("k", [30, 10_000])
def test_top_k_of_the_vocabulary_size_or_more_keeps_all_tokens(logits: Tensor, k: int) -> None:
    assert torch.equal(top_k(logits, k), logits)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_fewest_tokens_whose_probabilities_reach_p(logits: Tensor, p: float) -> None:
    assert kept(top_p(logits, p), logits) == by_search(logits, nucleus(p))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.97])
def test_min_p_keeps_tokens_at_least_p_times_as_likely_as_the_most_likely(logits: Tensor, p: float) -> None:
    assert kept(min_p(logits, p), logits) == by_search(logits, at_least(p))


def test_filters_with_the_loosest_setting_keep_all_tokens(logits: Tensor) -> None:
    assert torch.equal(top_p(logits, 1.0), logits)
    assert torch.equal(min_p(logits, 0.0), logits)


@pytest.mark.parametrize("filtered", [lambda x: top_k(x, 1), lambda x: top_p(x, 1e-9), lambda x: min_p(x, 1.0)])
def test_filters_with_the_tightest_setting_keep_the_most_likely_token(filtered, logits: Tensor) -> None:
    assert kept(filtered(logits), logits) == by_search(logits, largest(1))


@pytest.mark.parametrize("filtered", [lambda x: top_k(x, 3), lambda x: top_p(x, 0.9), lambda x: min_p(x, 0.2)])
def test_filters_keep_excluded_tokens_excluded(filtered) -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5, -math.inf, 0.9]])
    out = filtered(logits)
    assert out[0, [1, 3]].tolist() == [-math.inf, -math.inf]
    assert not out.isnan().any()


def test_filters_do_not_modify_their_input(logits: Tensor) -> None:
    before = logits.clone()
    top_k(logits, 2)
    top_p(logits, 0.5)
    min_p(logits, 0.5)
    assert torch.equal(logits, before)


def test_top_k_keeps_tokens_equal_to_the_kth() -> None:
    assert kept(top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2), torch.tensor([[1.0, 2.0, 1.0, 0.0]])) == [{0, 1, 2}]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampler_draws_tokens_with_softmax_probabilities(temperature: float) -> None:
    logits, draws = torch.tensor([1.0, 0.0, -1.0, 2.0]), 20_000
    drawn = Sampler(temperature=temperature, generator=seed(0))(logits.expand(draws, 4))
    want = (logits.double() / temperature).softmax(-1)
    share = torch.bincount(drawn, minlength=4) / draws
    assert ((share - want).abs() < 5 * (want * (1 - want) / draws).sqrt()).all()  # five standard deviations


def test_sampler_applies_filters_after_the_temperature() -> None:
    logits = torch.tensor([[4.0, 2.0, 0.0, -2.0]]).expand(500, 4)
    # at temperature 4 the probabilities are 0.47, 0.28, 0.17, 0.10; at temperature 1 one token has 0.86
    assert set(Sampler(temperature=4.0, top_p=0.7, generator=seed(0))(logits).tolist()) == {0, 1}
    assert set(Sampler(temperature=4.0, min_p=0.3, generator=seed(0))(logits).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sampler_accepts_logits_of_any_dtype(dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, 0.0, -6e4]], dtype=dtype)
    assert Sampler(temperature=0.1)(logits).tolist() == [0]


BAD = {
    "top_k: a float": (lambda x: top_k(x, 1.5), TypeError, "k must be an int, got k=1.5"),
    "top_k: a string": (lambda x: top_k(x, "1"), TypeError, "k must be an int, got k='1'"),
    "top_k: none": (lambda x: top_k(x, None), TypeError, "k must be an int, got k=None"),
    "top_k: 0": (lambda x: top_k(x, 0), ValueError, "k must be at least 1, got k=0"),
    "top_p: 0": (lambda x: top_p(x, 0), ValueError, r"p must lie in \(0, 1\], got p=0"),
    "top_p: 1.5": (lambda x: top_p(x, 1.5), ValueError, r"p must lie in \(0, 1\], got p=1.5"),
    "top_p: none": (lambda x: top_p(x, None), TypeError, "p must be a number, got p=None"),
    "min_p: 1.5": (lambda x: min_p(x, 1.5), ValueError, r"p must lie in \[0, 1\], got p=1.5"),
    "min_p: -1": (lambda x: min_p(x, -1), ValueError, r"p must lie in \[0, 1\], got p=-1"),
    "min_p: nan": (lambda x: min_p(x, math.nan), ValueError, r"p must lie in \[0, 1\], got p=nan"),
    "min_p: a string": (lambda x: min_p(x, "0.5"), TypeError, "p must be a number, got p='0.5'"),
    "integer logits": (lambda x: top_k(x.long(), 1), TypeError, "logits must be a floating point tensor, got dtype"),
    "a list": (lambda x: min_p([1.0], 0.5), TypeError, "logits must be a floating point tensor, got list"),
    "no logits": (lambda x: top_p(x[:, :0], 0.5), ValueError, r"logits must be .*got shape \(2, 0\)"),
    "one row": (lambda x: Sampler()(x[0]), ValueError, r"logits must be \(b, num_tokens\), got shape \(5,\)"),
    "temperature: a string": (lambda x: Sampler(temperature="1"), TypeError, "temperature must be a number, got .*'1'"),
    "temperature: none": (lambda x: Sampler(temperature=None), TypeError, "temperature must be a number, got .*None"),
    "temperature: inf": (lambda x: Sampler(temperature=math.inf), ValueError, "temperature must lie in .*=inf"),
    "a generator": (lambda x: Sampler(generator=0), TypeError, "generator must be a torch.Generator, got int"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_invalid_arguments_of_samplers_and_filters_raise(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 5))


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"temperature": 2.0}, {"top_k": 2}])
def test_nan_in_the_logits_raises(options: dict) -> None:
    logits = torch.randn(3, 5)
    logits[1, 3] = math.nan
    with pytest.raises(ValueError, match="logits must not be NaN"):
        Sampler(**options)(logits)
