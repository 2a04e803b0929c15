"""Packed documents: a layer computes for every document of a row what it computes for the document alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import (
    CosineSimAttention,
    CrossAttention,
    FullAttention,
    GateLoopAttention,
    RelativeBias,
    RelativeGateAttention,
    SimpleGateLoop,
    TalkingHeadsAttention,
    TextImageLayout,
    WindowAttention,
    reference,
)
from attention_zoo.attention import BLOCKS
from attention_zoo.ops.documents import Documents

DIM = 32
SMALL: dict[str, Any] = {"heads": 4, "dim_head": 8}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: FullAttention(DIM, kv_heads=2, rotary=True, **SMALL),
    "full, bidirectional": lambda: FullAttention(DIM, causal=False, rotary=True, output_gate="silu", **SMALL),
    "full, t5": lambda: FullAttention(DIM, bias=RelativeBias(4), **SMALL),
    "window": lambda: WindowAttention(DIM, window=4, sinks=2, kv_heads=1, rotary=True, **SMALL),
    "window, bidirectional": lambda: WindowAttention(DIM, window=6, sinks=1, causal=False, **SMALL),
    "cosine_sim": lambda: CosineSimAttention(DIM, rotary=True, **SMALL),
    "cosine_sim, bidirectional": lambda: CosineSimAttention(
        DIM, causal=False, bias=RelativeBias(4, causal=False), **SMALL
    ),
    "talking_heads": lambda: TalkingHeadsAttention(DIM, rotary=True, **SMALL),
    "talking_heads, mlp": lambda: TalkingHeadsAttention(DIM, pre_softmax="mlp", post_softmax="mlp", **SMALL),
    "gate_loop": lambda: GateLoopAttention(DIM),
    "gate_loop, heads": lambda: GateLoopAttention(DIM, heads=4, sub_norm=True),
    "gate_loop, no gates": lambda: GateLoopAttention(DIM, heads=4, gate=None),
    "gate_loop, reverse": lambda: GateLoopAttention(DIM, heads=4, sub_norm=True, reverse=True),
    "simple_gate_loop": lambda: SimpleGateLoop(DIM, post_norm=True),
    "simple_gate_loop, reverse": lambda: SimpleGateLoop(DIM, reverse=True),
    "relative_gate": lambda: RelativeGateAttention(DIM, rotary=True, **SMALL),
}
# Lengths and ids of the documents of each row: ids that come again, change within padding, and are negative.
ROWS = (
    ([5, 1, 17, 9, 40, 3, 25], [0, 1, 0, 7, -3, 0, 2]),
    ([30, 20, 30, 20], [1, 2, 1, 3]),
)
EQUAL = (([25, 25, 50], [4, 4 + 2**40, 4]), ([100], [-1]))  # ids wider than int32


def pack(rows: Any) -> Tensor:
    return torch.stack([torch.tensor(ids).repeat_interleave(torch.tensor(lengths)) for lengths, ids in rows])


def documents(rows: Any) -> list[tuple[int, slice]]:
    """The row and the tokens of every document."""
    found = []
    for row, (lengths, _) in enumerate(rows):
        start = 0
        for length in lengths:
            found.append((row, slice(start, start + length)))
            start += length
    return found


def alone(layer: nn.Module, x: Tensor, mask: Tensor | None, rows: Any) -> Tensor:
    """The outputs of every document by itself."""
    out = torch.zeros_like(x)
    for row, part in documents(rows):
        extra = {} if mask is None else {"mask": mask[row : row + 1, part]}
        out[row, part] = layer(x[row : row + 1, part], **extra)[0]
    return out


@pytest.mark.parametrize("rows", [ROWS, EQUAL], ids=["lengths that differ", "equal lengths"])
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_equal_separate_ones(name: str, padded: bool, rows: Any) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    ids = pack(rows)
    n = ids.shape[1]
    x = torch.randn(2, n, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, n) < 0.7 if padded else None
    weight = torch.randn(2, n, DIM, dtype=torch.float64) * (1 if mask is None else mask[..., None])
    leaves = [x, *layer.parameters()]
    want = alone(layer, x, mask, rows)
    want_gradients = torch.autograd.grad((want * weight).sum(), leaves)
    paths: dict[str, Tensor] = {"fast": layer(x, mask=mask, document_ids=ids)}
    with reference():
        paths["reference"] = layer(x, mask=mask, document_ids=Documents(ids))
    for path, out in paths.items():
        torch.testing.assert_close(out * (weight != 0), want * (weight != 0), atol=1e-11, rtol=0, msg=path)
        for got, gradient in zip(torch.autograd.grad((out * weight).sum(), leaves), want_gradients, strict=True):
            assert (got - gradient).norm() <= 1e-10 * gradient.norm().clamp(min=1e-3), path


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_no_gradient_crosses_a_document(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().to(dtype)
    x = torch.randn(2, 100, DIM, dtype=dtype, requires_grad=True)
    out = layer(x, document_ids=pack(ROWS))
    for row, part in documents(ROWS):
        token = (part.start + part.stop) // 2
        gradient = torch.autograd.grad(out[row, token].square().sum(), x, retain_graph=True)[0].abs()
        assert gradient[row, part].max() > 0
        gradient[row, part] = 0
        assert gradient.max() == 0


@pytest.mark.parametrize("name", LAYERS)
def test_maps_of_packed_documents_are_the_effective_weights(name: str) -> None:
    layer = LAYERS[name]().double().eval()
    x = torch.randn(2, 100, DIM, dtype=torch.float64)
    ids, mask = pack(ROWS), torch.rand(2, 100) < 0.7
    weights = layer.attention_map(x, mask=mask, document_ids=ids)
    values, out = layer.values_and_output(x, mask=mask, document_ids=ids)
    torch.testing.assert_close(weights @ values, out, atol=1e-9, rtol=0)
    assert weights.masked_select(~Documents(ids).pairs[:, None]).abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_are_compiled_in_one_graph(name: str) -> None:
    layer = LAYERS[name]()
    x, ids = torch.randn(2, 100, DIM, requires_grad=True), pack(ROWS)
    torch.compiler.reset()
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, document_ids=ids)
    want = layer(x, document_ids=ids)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    got, gradient = (torch.autograd.grad(one.square().sum(), x)[0] for one in (out, want))
    torch.testing.assert_close(got, gradient, atol=1e-4, rtol=1e-4)


def test_dropout_stays_within_documents() -> None:
    layer = FullAttention(DIM, dropout=0.5, **SMALL)
    x = torch.randn(2, 100, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, document_ids=pack(ROWS))[0, 20].sum(), x)
    assert gradient[0, :6].abs().max() == 0
    assert gradient[1].abs().max() == 0


def test_an_attention_mask_is_combined_with_documents() -> None:
    layer = FullAttention(DIM, **SMALL).double().eval()
    x, ids = torch.randn(2, 100, DIM, dtype=torch.float64), pack(ROWS)
    allowed = torch.rand(100, 100) < 0.5
    both = allowed & Documents(ids).pairs
    want = layer(x, attn_mask=both)
    torch.testing.assert_close(layer(x, attn_mask=allowed, document_ids=ids), want, atol=1e-12, rtol=0)
    added = torch.randn(1, 4, 100, 100, dtype=torch.float64)
    want = layer(x, attn_mask=added.masked_fill(~Documents(ids).pairs[:, None], -torch.inf))
    torch.testing.assert_close(layer(x, attn_mask=added, document_ids=ids), want, atol=1e-12, rtol=0)


def test_streams_of_talking_heads_share_the_documents_of_their_row() -> None:
    layer = TalkingHeadsAttention(DIM, streams=2, **SMALL).double().eval()
    x, ids = torch.randn(2, 2, 100, DIM, dtype=torch.float64), pack(ROWS)
    out = layer(x, document_ids=ids)
    for row, part in documents(ROWS):
        want = layer(x[row : row + 1, :, part])[0]
        torch.testing.assert_close(out[row, :, part], want, atol=1e-12, rtol=0)


def test_cross_attention_attends_to_the_context_of_the_same_id() -> None:
    layer = CrossAttention(DIM, **SMALL).double().eval()
    x, context = torch.randn(1, 9, DIM, dtype=torch.float64), torch.randn(1, 7, DIM, dtype=torch.float64)
    ids = torch.tensor([[5, 5, 5, 2, 2, 9, 9, 9, 9]])
    context_ids = torch.tensor([[2, 2, 5, 5, 5, 5, 3]])
    context_mask = torch.tensor([[True, True, True, True, False, True, True]])
    out = layer(x, context, context_mask=context_mask, document_ids=ids, context_document_ids=context_ids)
    first = layer(x[:, :3], context[:, 2:6], context_mask=context_mask[:, 2:6])
    second = layer(x[:, 3:5], context[:, :2])
    torch.testing.assert_close(out[:, :5], torch.cat((first, second), dim=1), atol=1e-12, rtol=0)
    assert not out[:, 5:].any()  # no context has their id
    for missing in ("document_ids", "context_document_ids"):
        given = {"document_ids": ids, "context_document_ids": context_ids}
        del given[missing]
        with pytest.raises(ValueError, match=f"must be given together, got {missing}=None"):
            layer(x, context, **given)


LAYOUT = TextImageLayout(text_len=5, height=5, width=4)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "float ids": (torch.zeros(2, 100), TypeError, "document_ids must be an integer tensor, got dtype torch.float32"),
    "boolean ids": (torch.zeros(2, 100).bool(), TypeError, "document_ids must be an integer tensor"),
    "a list": ([[0] * 100] * 2, TypeError, "document_ids must be an integer tensor, got list"),
    "another length": (torch.zeros(2, 99).long(), ValueError, r"document_ids must be \(b, n\) = \(2, 100\)"),
    "one axis": (torch.zeros(100).long(), ValueError, r"document_ids must be \(b, n\), got shape \(100,\)"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["full", "gate_loop", "relative_gate"])
def test_bad_document_ids_raise(name: str, case: str) -> None:
    ids, error, message = BAD[case]
    with pytest.raises(error, match=message):
        LAYERS[name]()(torch.randn(2, 100, DIM), document_ids=ids)


@pytest.mark.parametrize("name", ["conv", "axial_row", "axial_col", "block_sparse"])
def test_layers_with_an_image_layout_refuse_documents_by_name(name: str) -> None:
    layer = BLOCKS[name](DIM, layout=LAYOUT, **SMALL)
    with pytest.raises(ValueError, match=f"document_ids must be None for {type(layer).__name__}, whose pattern"):
        layer(torch.randn(1, 25, DIM), document_ids=torch.zeros(1, 25).long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int64])
def test_ids_may_have_any_integer_dtype(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 1, 2, 2, 1]], dtype=dtype)
    assert Documents(ids).starts.tolist() == [[True, False, True, False, True]]
    assert Documents(ids).positions.tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("longest", [1, 20, 300])
def test_batches_of_documents_hold_every_token_once_with_little_padding(longest: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    ids = torch.randint(longest, (3, 1000), generator=generator).sort(dim=1).values
    batches = Documents(ids).batches
    index = torch.arange(3000) if batches.tiles is not None else batches.index[batches.valid]
    assert sorted(index.tolist()) == list(range(3000))
    if batches.tiles is None:
        assert batches.index[batches.inverse].tolist() == list(range(3000))
        cells = sum(rows * length for rows, length in batches.shapes)
        short = 16 * int(Documents(ids).starts.sum())
        assert cells <= 1.25 * 3000 + short
