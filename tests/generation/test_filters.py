"""Filters on logits against a search through all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from attention_zoo.generation import min_p, top_k, top_p


def kept(filtered: Tensor, logits: Tensor) -> list[set[int]]:
    """The ids that a filter left in every row; what it left must be unchanged."""
    assert filtered.shape == logits.shape
    stays = filtered != -math.inf
    assert torch.equal(filtered[stays], logits[stays])
    return [set(row.nonzero()[:, 0].tolist()) for row in stays]


def by_search(logits: Tensor, keep: Callable[[dict[int, float]], Iterable[int]]) -> list[set[int]]:
    """What `keep` takes from the probabilities of every row."""
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
def test_top_k_keeps_the_k_largest(logits: Tensor, k: int) -> None:
    assert kept(top_k(logits, k), logits) == by_search(logits, largest(k))


@pytest.mark.parametrize("k", [30, 10_000])
def test_top_k_beyond_the_vocabulary_keeps_all(logits: Tensor, k: int) -> None:
    assert torch.equal(top_k(logits, k), logits)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_fewest_that_reach_p(logits: Tensor, p: float) -> None:
    assert kept(top_p(logits, p), logits) == by_search(logits, nucleus(p))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.97])
def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(logits: Tensor, p: float) -> None:
    assert kept(min_p(logits, p), logits) == by_search(logits, at_least(p))


def test_the_widest_settings_keep_all(logits: Tensor) -> None:
    assert torch.equal(top_p(logits, 1.0), logits)
    assert torch.equal(min_p(logits, 0.0), logits)


@pytest.mark.parametrize("filtered", [lambda x: top_k(x, 1), lambda x: top_p(x, 1e-9), lambda x: min_p(x, 1.0)])
def test_the_narrowest_settings_keep_the_most_likely(filtered, logits: Tensor) -> None:
    assert kept(filtered(logits), logits) == by_search(logits, largest(1))


@pytest.mark.parametrize("filtered", [lambda x: top_k(x, 3), lambda x: top_p(x, 0.9), lambda x: min_p(x, 0.2)])
def test_a_token_that_is_already_out_stays_out(filtered) -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5, -math.inf, 0.9]])
    out = filtered(logits)
    assert out[0, [1, 3]].tolist() == [-math.inf, -math.inf]
    assert not out.isnan().any()


def test_filters_leave_their_input_alone(logits: Tensor) -> None:
    before = logits.clone()
    top_k(logits, 2)
    top_p(logits, 0.5)
    min_p(logits, 0.5)
    assert torch.equal(logits, before)


def test_ties_with_the_last_that_top_k_keeps_stay() -> None:
    assert kept(top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2), torch.tensor([[1.0, 2.0, 1.0, 0.0]])) == [{0, 1, 2}]
