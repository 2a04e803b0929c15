"""Query tiles, their masks and their dropout."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.ops import visible
from attention_zoo.ops.tiling import (
    QueryTile,
    dropout_mask,
    dropout_seed,
    masked_softmax,
    query_tiles,
    slice_mask,
    tile_mask,
)

CPU = torch.device("cpu")
MASKS = {
    "none": lambda: None,
    "padding": lambda: torch.rand(2, 7) < 0.5,
    "pairs": lambda: torch.rand(2, 3, 5, 7) < 0.5,
    "keys": lambda: torch.rand(1, 3, 1, 7) < 0.5,
    "queries": lambda: torch.rand(2, 1, 5, 1) < 0.5,
}


def test_query_tiles_cover_the_queries_and_the_last_one_holds_the_rest() -> None:
    assert list(query_tiles(5, 7, False, 2)) == [(0, 2, 7), (2, 4, 7), (4, 5, 7)]


@pytest.mark.parametrize(
    ("queries", "keys", "tiles"),
    [(5, 5, [(0, 3, 3), (3, 5, 5)]), (5, 7, [(0, 3, 5), (3, 5, 7)]), (5, 2, [(0, 3, 0), (3, 5, 2)])],
)
def test_causal_query_tiles_end_at_the_last_key_of_their_last_query(queries: int, keys: int, tiles: list) -> None:
    assert list(query_tiles(queries, keys, True, 3)) == tiles


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_the_masks_of_all_tiles_are_the_mask_of_all_queries(kind: str, causal: bool) -> None:
    mask = MASKS[kind]()
    whole = visible(5, 7, mask=mask, causal=causal, device=CPU)
    for tile in query_tiles(5, 7, causal, 2):
        got = tile_mask(tile, mask=mask, causal=causal, device=CPU)
        if whole is None:
            assert got is None
            continue
        want = whole.expand(2, 3, 5, 7)[:, :, tile.queries]
        got = torch.ones(()).bool() if got is None else got
        assert torch.equal(got.expand(2, 3, tile.stop - tile.start, tile.keys), want[..., : tile.keys])
        assert not (causal and want[..., tile.keys :].any())


def test_a_slice_of_a_mask_keeps_the_axes_that_broadcast() -> None:
    assert slice_mask(MASKS["keys"](), 1, 3, 4).shape == (1, 3, 1, 4)
    assert slice_mask(MASKS["queries"](), 1, 3, 4).shape == (2, 1, 2, 1)


def test_masked_softmax_gives_zeros_and_zero_gradients_without_an_allowed_key() -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    weights = masked_softmax(scores, allowed)
    weights.square().sum().backward()
    torch.testing.assert_close(weights[0, [0, 2]], scores[0, [0, 2]].softmax(-1))
    assert not weights[~allowed].any()
    assert not scores.grad[~allowed].any()


def test_equal_seeds_and_tiles_give_equal_dropout_masks_and_others_do_not() -> None:
    weights, seed = torch.rand(3, 4, 5), dropout_seed(0.5)
    first = dropout_mask(weights, 0.5, seed, row=1, start=4)
    assert torch.equal(first, dropout_mask(weights, 0.5, seed, row=1, start=4))
    others = [dropout_mask(weights, 0.5, *o) for o in ((dropout_seed(0.5),), (seed,))]
    others += [dropout_mask(weights, 0.5, seed, row=1), dropout_mask(weights, 0.5, seed, start=4)]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropout", [0.25, 1.0])
def test_a_dropout_mask_drops_its_share_and_scales_the_rest(dropout: float, dtype: torch.dtype) -> None:
    mask = dropout_mask(torch.rand(100, 100, dtype=dtype), dropout, dropout_seed(dropout))
    assert mask.dtype == dtype
    kept = mask[mask != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - dropout) if dropout < 1 else 0.0))
    assert abs((mask == 0).double().mean() - dropout) < 5 * (dropout * (1 - dropout) / 1e4) ** 0.5 + 1e-12


def test_a_dropout_seed_draws_random_numbers_only_for_dropout() -> None:
    state = torch.get_rng_state()
    assert dropout_seed(0.0) == 0
    assert torch.equal(state, torch.get_rng_state())
    assert dropout_seed(0.5) != dropout_seed(0.5)


def test_a_query_tile_indexes_its_queries() -> None:
    assert torch.arange(9)[QueryTile(2, 5, 7).queries].tolist() == [2, 3, 4]
