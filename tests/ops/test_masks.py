"""Boolean masks and their combination."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.ops import causal_mask, key_mask, visible
from tests.formulas import allowed_pairs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 5), (5, 11), (11, 5), (3, 1)])
def test_a_causal_mask_allows_the_last_query_the_last_key(queries: int, keys: int) -> None:
    want = [[key <= query + keys - queries for key in range(keys)] for query in range(queries)]
    assert causal_mask(queries, keys).tolist() == want


def test_a_key_mask_masks_keys_for_all_queries() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert key_mask(mask).expand(2, 1, 4, 3)[:, 0, 2].tolist() == mask.tolist()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (5, 7), (7, 5)])
@pytest.mark.parametrize("kind", ["none", "padding", "pattern"])
def test_visible_combines_padding_and_causality(kind: str, queries: int, keys: int, causal: bool) -> None:
    masks = {"none": None, "padding": torch.rand(3, keys) < 0.5, "pattern": torch.rand(3, 2, queries, keys) < 0.5}
    shape = (3, 2, queries, keys)
    got = visible(queries, keys, mask=masks[kind], causal=causal, device=CPU)
    allowed = torch.ones(shape, dtype=torch.bool) if got is None else got.expand(shape)
    assert torch.equal(allowed, allowed_pairs(shape, mask=masks[kind], causal=causal))


def test_visible_builds_no_mask_if_every_key_is_allowed() -> None:
    assert visible(5, 7, mask=None, causal=False, device=CPU) is None
    assert visible(1, 7, mask=None, causal=True, device=CPU) is None
