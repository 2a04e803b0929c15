"""Window attention equals attention over the allowed keys, one query at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import softmax_attention, window_attention, window_mask
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.window.chunked import chunk_size, keys_per_chunk
from tests.formulas import relative_error

# (queries, keys, window, sinks, causal): one token, windows longer than the sequence, sinks as many as tokens or more
# than the window, lengths before, at and after the ends of chunks of 64 queries, windows of several chunks
SIZES = [
    (1, 1, 1, 0, True),
    (1, 9, 3, 2, True),
    (64, 64, 1, 0, True),
    (129, 129, 1, 3, True),
    (131, 131, 500, 4, True),
    (131, 131, 5, 131, True),
    (127, 127, 64, 0, True),
    (128, 128, 64, 0, True),
    (193, 193, 65, 2, True),
    (200, 200, 9, 30, True),
    (300, 300, 150, 4, True),
    (130, 201, 20, 3, True),
    (7, 201, 20, 3, True),
    (130, 130, 20, 0, False),
    (201, 201, 70, 3, False),
]


def allowed_by_counting(i: int, j: int, window: int, sinks: int, causal: bool, mask: Tensor) -> Tensor:
    """(b, i, j), token by token."""
    allowed = torch.zeros(len(mask), i, j, dtype=torch.bool)
    for row in range(len(mask)):
        first = mask[row].nonzero()[:sinks, 0].tolist()
        for query in range(i):
            place = query + j - i
            for key in range(j):
                near = abs(place - key) < window or key in first
                allowed[row, query, key] = near and bool(mask[row, key]) and (key <= place or not causal)
    return allowed


def inputs(i: int, j: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(i + j)
    shapes = [(2, 4, i, 8), (2, 2, j, 8), (2, 2, j, 6)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def padding(kind: str, j: int) -> Tensor | None:
    """Row 1 starts with padding, which would hold the sinks; or has holes; or holds no valid token."""
    if kind == "none":
        return None
    mask = torch.ones(2, j, dtype=torch.bool)
    if kind == "left":
        mask[1, : j // 2] = False
    elif kind == "holes":
        mask = torch.rand(2, j) < 0.6
    else:
        mask[1] = False
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over all pairs, with exact zeros for queries without a key."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed[:, None], -1e30)
    weights = scores.softmax(-1) * allowed[:, None]
    return weights @ v


@pytest.mark.parametrize("kind", ["none", "left", "holes", "an empty row"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_gradients_equal_the_dense_mask(size: tuple[int, int, int, int, bool], kind: str) -> None:
    i, j, window, sinks, causal = size
    mask, leaves = padding(kind, j), inputs(i, j)
    options: dict[str, Any] = {"window": window, "sinks": sinks, "causal": causal}
    allowed = window_mask(i, j, **options, mask=mask).expand(2, 1, i, j)[:, 0]
    want = dense(*leaves, allowed)
    weight = torch.randn_like(want)
    expected = torch.autograd.grad((want * weight).sum(), leaves)
    for impl in ("auto", "dense", "chunked"):
        out = window_attention(*leaves, **options, mask=mask, impl=impl)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        assert not out.masked_select(~allowed.any(-1)[:, None, :, None]).any()
        for got, gradient in zip(torch.autograd.grad((out * weight).sum(), leaves), expected, strict=True):
            assert relative_error(got, gradient) < 1e-5


@pytest.mark.parametrize("size", [(23, 23, 5, 3, True), (9, 23, 4, 2, True), (23, 23, 5, 3, False)], ids=str)
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_the_mask_is_that_of_counting_tokens(size: tuple[int, int, int, int, bool], kind: str) -> None:
    i, j, window, sinks, causal = size
    mask = padding(kind, j)
    assert mask is not None
    options: dict[str, Any] = {"window": window, "sinks": sinks, "causal": causal}
    got = window_mask(i, j, **options, mask=mask)
    assert torch.equal(got[:, 0], allowed_by_counting(i, j, **options, mask=mask))
    whole = torch.ones(1, j, dtype=torch.bool)
    assert torch.equal(window_mask(i, j, **options)[None], allowed_by_counting(i, j, **options, mask=whole))


def test_the_window_counts_the_token_itself_and_documents_have_their_own() -> None:
    assert window_mask(4, 4, window=2, sinks=1, causal=True).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 1, 1],
    ]
    documents = Documents(torch.tensor([[7, 7, 7, 1, 1, 1]]))
    assert window_mask(6, 6, window=1, sinks=1, causal=True, documents=documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("sinks", [0, 3])
def test_bfloat16_equals_float32(sinks: int) -> None:
    leaves = inputs(300, 300)
    for mask in (None, padding("holes", 300)):
        want = window_attention(*leaves, window=30, sinks=sinks, causal=True, mask=mask, impl="reference")
        half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
        out = window_attention(*half, window=30, sinks=sinks, causal=True, mask=mask)
        assert out.dtype == torch.bfloat16
        assert relative_error(out, want) < 0.02
        gradients = torch.autograd.grad(out.float().square().sum(), half)
        for got, gradient in zip(gradients, torch.autograd.grad(want.square().sum(), leaves), strict=True):
            assert relative_error(got, gradient) < 0.03


def test_an_attention_mask_and_documents_combine_with_the_window() -> None:
    leaves = inputs(150, 150)
    ids = torch.tensor([[0] * 140 + [1] * 10, [0] * 5 + [1] * 145])
    allowed = torch.rand(2, 150, 150) < 0.7
    mask = padding("holes", 150)
    options: dict[str, Any] = {"window": 20, "sinks": 2, "causal": True, "mask": mask}
    pairs = window_mask(150, 150, **options, documents=Documents(ids))[:, 0]
    torch.testing.assert_close(
        window_attention(*leaves, **options, document_ids=ids), dense(*leaves, pairs), atol=1e-5, rtol=1e-5
    )
    got = window_attention(*leaves, **options, attn_mask=allowed, document_ids=ids)
    torch.testing.assert_close(got, dense(*leaves, pairs & allowed), atol=1e-5, rtol=1e-5)
    added = torch.randn(4, 150, 150)[None]
    want = softmax_attention(*leaves, mask=added.masked_fill(~window_mask(150, 150, **options), -torch.inf))
    torch.testing.assert_close(window_attention(*leaves, **options, attn_mask=added), want)


def test_a_token_outside_every_window_is_never_read() -> None:
    """The chunked path computes no pair of distant chunks, so that NaN there reaches nothing."""
    q, k, v = (leaf.detach() for leaf in inputs(512, 512))
    k[:, :, 10] = v[:, :, 10] = torch.nan
    out = window_attention(q, k, v, window=20, causal=True)
    assert out[:, :, 256:].isfinite().all()


def test_the_number_of_calls_does_not_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls[-1] += 1
        return kernel(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for n in (600, 1200, 2399):
        calls.append(0)
        window_attention(*inputs(n, n), window=70, sinks=2, causal=True)
    assert calls == [3, 3, 3]


def test_the_pairs_of_a_chunk_grow_with_the_window_only() -> None:
    for window in (1, 64, 65, 128, 512, 4096):
        assert keys_per_chunk(window, 4, True) <= 4 + max(2 * window, 192)
        assert chunk_size(window) <= max(window, 64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1, got window=0"),
        ({"window": -1}, ValueError, "window must be at least 1"),
        ({"window": None}, TypeError, "window must be an int, got window=None"),
        ({"window": 2.0}, TypeError, "window must be an int"),
        ({"window": 2, "sinks": -1}, ValueError, "sinks must be at least 0"),
        ({"window": 2, "mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"mask must be \(b, n\) = \(2, 5\)"),
        ({"window": 2, "attn_mask": torch.ones(3, 5)}, ValueError, r"attn_mask must be \(i, j\) = \(4, 5\)"),
        ({"window": 2, "attn_mask": torch.ones(4, 5), "impl": "chunked"}, ValueError, "attn_mask must be None with"),
        ({"window": 2, "impl": "tiled"}, ValueError, "impl must be one of"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        window_attention(*inputs(4, 5), **options)


def test_more_queries_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5 queries and 4 keys"):
        window_attention(*inputs(5, 4), window=2)
