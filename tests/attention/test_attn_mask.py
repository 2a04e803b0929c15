"""Attention masks (`attn_mask`) of layers: boolean and additive, combined with every other mask and bias."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import (
    BLOCKS,
    AttentionBlock,
    AxialAttention,
    BlockSparseAttention,
    ConvAttention,
    CosineSimAttention,
    CrossAttention,
    FullAttention,
    RelativeBias,
    Rotary,
    TalkingHeadsAttention,
    TextImageLayout,
    WindowAttention,
    reference,
)
from tests.cases import CASES, DIM, SMALL, Case, striped
from tests.formulas import allowed_pairs, attend_one_by_one, relative_error

LAYOUT = TextImageLayout(text_len=6, height=7, width=5)
B, H = 3, 4
FORMS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "(i, j)": lambda i, j: (i, j),
    "(b, i, j)": lambda i, j: (B, i, j),
    "(1, i, j)": lambda i, j: (1, i, j),
    "(b, h, i, j)": lambda i, j: (B, H, i, j),
    "(1, h, i, j)": lambda i, j: (1, H, i, j),
    "(b, 1, i, j)": lambda i, j: (B, 1, i, j),
}
MASKED: dict[str, Callable[[], AttentionBlock]] = {
    "full": lambda: FullAttention(DIM, **SMALL),
    "full: rotary, grouped heads": lambda: FullAttention(DIM, kv_heads=2, rotary=Rotary(), **SMALL),
    "full: relative bias": lambda: FullAttention(DIM, bias=RelativeBias(4), **SMALL),
    "full: pattern": lambda: FullAttention(DIM, pattern=striped(), **SMALL),
    "full: pattern, relative bias": lambda: FullAttention(DIM, pattern=striped(), bias=RelativeBias(4), **SMALL),
    "window": lambda: WindowAttention(DIM, window=3, **SMALL),
    "cosine_sim": lambda: CosineSimAttention(DIM, kv_heads=1, **SMALL),
    "talking_heads": lambda: TalkingHeadsAttention(DIM, post_softmax="mlp", **SMALL),
    "conv": lambda: ConvAttention(DIM, layout=LAYOUT, **SMALL),
    "axial": lambda: AxialAttention(DIM, layout=LAYOUT, **SMALL),
    "block_sparse": lambda: BlockSparseAttention(DIM, layout=LAYOUT, block_size=4, random_blocks=1, **SMALL),
}
REFUSING = ("gate_loop", "relative_gate", "simple_gate_loop")


def additive(mask: Tensor) -> Tensor:
    """Random numbers where a boolean mask is True, -inf elsewhere."""
    return torch.randn(mask.shape).masked_fill(~mask, -math.inf)


def as_pairs(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask of any form as (b, h, i, j), axis by axis."""
    if mask.ndim == 2:
        mask = torch.stack([mask] * shape[0])
    if mask.ndim == 3:
        mask = torch.stack([mask] * shape[1], dim=1)
    return mask.expand(shape)


def by_formula(block: Any, x: Tensor, mask: Tensor | None, attn_mask: Tensor) -> Tensor:
    """The output of the operation in `block`, one query at a time."""
    q, k, v = (part.double() for part in block.project(x, start=0))
    shape = (*q.shape[:3], k.shape[2])
    pairs = as_pairs(attn_mask, shape)
    allowed = allowed_pairs(shape, mask=mask, causal=block.causal)
    bias = torch.zeros(shape, dtype=torch.float64)
    if attn_mask.dtype == torch.bool:
        allowed &= pairs
    else:
        allowed &= pairs > -math.inf
        bias = pairs.double()
    if isinstance(block, WindowAttention):
        allowed &= torch.ones(shape[2:], dtype=torch.bool).triu(1 - block.window)
    if block.pattern is not None:
        allowed &= block.pattern().mask(0, shape[-1], x.device)
    if block.bias is not None:
        bias = bias + block.bias(shape[2], shape[3], x.device).pairs(shape[2], shape[3])
    return attend_one_by_one(q, k, v, allowed, bias, block.dim_head**-0.5 if block.scale is None else block.scale)


@pytest.mark.parametrize("form", [pytest.param(form, marks=[pytest.mark.slow] * ("1" in form)) for form in FORMS])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("name", [name for name in MASKED if name != "talking_heads"])
def test_attn_mask_combines_with_causality_padding_bias_and_pattern(name: str, kind: str, form: str) -> None:
    torch.manual_seed(2)
    block, x = MASKED[name](), torch.randn(B, 9, DIM)
    attn_mask = torch.rand(FORMS[form](9, 9)) < 0.6
    attn_mask[..., 4, :] = False  # query 4 attends to nothing
    attn_mask = attn_mask if kind == "boolean" else additive(attn_mask)
    mask = torch.rand(B, 9) < 0.7
    for padding in (None, mask):
        values, out = block.values_and_output(x, mask=padding, attn_mask=attn_mask)
        assert relative_error(out, by_formula(block, x, padding, attn_mask)) < 2e-6
        assert not out[:, :, 4].any()
        weights = block.attention_map(x, mask=padding, attn_mask=attn_mask)
        torch.testing.assert_close(weights @ values, out, atol=1e-5, rtol=1e-5)
        want = block.merge(out, x)
        torch.testing.assert_close(block(x, mask=padding, attn_mask=attn_mask), want)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_attn_mask_of_talking_heads_applies_between_head_mixing_and_softmax(
    form: str, causal: bool, streams: int
) -> None:
    torch.manual_seed(2)
    heads = H // streams
    block = TalkingHeadsAttention(DIM, heads=heads, dim_head=8, streams=streams, causal=causal).double()
    with torch.no_grad():
        for mixer in (block.pre_softmax, block.post_softmax):
            mixer.weight.add_(torch.randn_like(mixer.weight) * 0.3)
    x = torch.randn((B, 7, DIM) if streams == 1 else (B, streams, 7, DIM), dtype=torch.float64)
    mask, boolean = torch.rand(B, 7) < 0.8, torch.rand(FORMS[form](7, 7)) < 0.6
    q, k, v = block.project(x, start=0)
    for attn_mask in (boolean, additive(boolean)):
        allowed = allowed_pairs((B, H, 7, 7), mask=mask, causal=causal) & as_pairs(boolean, (B, H, 7, 7))
        mixed = torch.einsum("oh,bhij->boij", block.pre_softmax(), q @ k.transpose(-1, -2) * 8**-0.5)
        if attn_mask is not boolean:
            mixed = mixed + as_pairs(attn_mask, mixed.shape).double()
        powers = mixed.exp() * allowed
        weights = powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)
        want = torch.einsum("oh,bhij->boij", block.post_softmax(), weights) @ v
        got = block.values_and_output(x, mask=mask, attn_mask=attn_mask).output
        assert relative_error(got, want) < 1e-10
        torch.testing.assert_close(block.attention_map(x, mask=mask, attn_mask=attn_mask) @ v, want)


@pytest.mark.parametrize("form", ["(i, j)", "(b, i, j)", "(1, h, i, j)", "(b, h, i, j)"])
@pytest.mark.parametrize("name", ["full", "full: relative bias", "full: pattern", "cosine_sim", "talking_heads"])
def test_additive_attn_mask_receives_its_gradient(name: str, form: str) -> None:
    torch.manual_seed(2)
    block = MASKED[name]().double()
    x, mask = torch.randn(B, 9, DIM, dtype=torch.float64), torch.rand(B, 9) < 0.7
    hidden = torch.rand(FORMS[form](9, 9)) < 0.3
    values = torch.randn(FORMS[form](9, 9), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, H, 9, 8, dtype=torch.float64)

    def gradient(output: Callable[[Tensor], Tensor]) -> Tensor:
        (found,) = torch.autograd.grad((output(values.masked_fill(hidden, -math.inf)) * weight).sum(), values)
        return found

    got = gradient(lambda attn_mask: block.values_and_output(x, mask=mask, attn_mask=attn_mask).output)
    if name == "talking_heads":
        with reference():
            want = gradient(lambda attn_mask: block.values_and_output(x, mask=mask, attn_mask=attn_mask).output)
    else:
        want = gradient(lambda attn_mask: by_formula(block, x, mask, attn_mask))
    assert got.any()
    assert relative_error(got, want) < 1e-9


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_query_that_a_mask_leaves_no_key_gets_zero_and_no_gradient(name: str, kind: str) -> None:
    block, x = MASKED[name](), torch.randn(B, 9, DIM)
    attn_mask = torch.zeros(9, 9, dtype=torch.bool) if kind == "boolean" else torch.full((9, 9), -math.inf)
    attn_mask[:4] = 1
    x.requires_grad_()
    out = block.values_and_output(x, attn_mask=attn_mask).output
    assert not out[:, :, 4:].any()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[:, 4:].any()
    state, outs = None, []
    with torch.no_grad():
        for token in range(9):
            out, state = block.step(x[:, token : token + 1], state, attn_mask=attn_mask[token : token + 1, : token + 1])
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), block(x, attn_mask=attn_mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("name", [*MASKED, "talking_heads: 2 streams"])
def test_step_with_the_rows_of_a_tree_mask_equals_forward(name: str, kind: str) -> None:
    """Tokens 6 ... 11 are branches of a tree, as in speculative decoding: each attends to its ancestors only."""
    torch.manual_seed(2)
    parents = [-1, 0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 9]
    tree = torch.eye(12, dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            tree[token] |= tree[parent]
    attn_mask = tree if kind == "boolean" else additive(tree)
    if "streams" in name:
        block: AttentionBlock = TalkingHeadsAttention(DIM, streams=2, **SMALL)
        x, heads = torch.randn(B, 2, 12, DIM), 8
    else:
        block, x, heads = MASKED[name](), torch.randn(B, 12, DIM), 4
    mask = torch.rand(B, 12) < 0.8
    mask[:, 0] = True
    forms = (attn_mask, attn_mask.expand(B, 12, 12), attn_mask.expand(B, heads, 12, 12))
    with torch.no_grad():
        want = block(x, mask=mask, attn_mask=attn_mask)
        for rows, splits in zip(forms, [(6, 6), (1, 4, 1, 2, 4), (12,)], strict=True):
            start, state, outs = 0, None, []
            for size in splits:
                stop = start + size
                new = {"mask": mask[:, start:stop], "attn_mask": rows[..., start:stop, :stop]}
                out, state = block.step(x[..., start:stop, :], state, **new)
                outs.append(out)
                start = stop
            torch.testing.assert_close(torch.cat(outs, dim=-2), want, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_attn_mask_of_cross_attention_ranges_over_the_context(form: str) -> None:
    torch.manual_seed(2)
    block = CrossAttention(DIM, context_dim=24, **SMALL)
    x, context = torch.randn(B, 5, DIM), torch.randn(B, 11, 24)
    context_mask, boolean = torch.rand(B, 11) < 0.7, torch.rand(FORMS[form](5, 11)) < 0.6
    boolean[..., 2, :] = False
    k, v = block.project_context(context, None, x)
    allowed = allowed_pairs((B, H, 5, 11), mask=context_mask, causal=False) & as_pairs(boolean, (B, H, 5, 11))
    for attn_mask in (boolean, additive(boolean)):
        bias = None if attn_mask is boolean else as_pairs(attn_mask, (B, H, 5, 11))
        want = attend_one_by_one(block.project_queries(x), k, v, allowed, bias, 8**-0.5)
        given = {"context": context, "context_mask": context_mask}
        got = block.values_and_output(x, attn_mask=attn_mask, **given).output
        assert relative_error(got, want) < 1e-6
        assert not got[:, :, 2].any()
        weights = block.attention_map(x, attn_mask=attn_mask, **given)
        torch.testing.assert_close(weights @ v, want, atol=1e-5, rtol=1e-5)
        first, state = block.step(x[:, :2], attn_mask=attn_mask[..., :2, :], **given)
        rest, _ = block.step(x[:, 2:], state, attn_mask=attn_mask[..., 2:, :])
        torch.testing.assert_close(torch.cat((first, rest), 1), block(x, attn_mask=attn_mask, **given))


def test_prefix_mask_makes_a_bidirectional_layer_a_prefix_language_model() -> None:
    torch.manual_seed(2)
    block, causal = FullAttention(DIM, causal=False, **SMALL), FullAttention(DIM, **SMALL)
    causal.load_state_dict(block.state_dict())
    x, index = torch.randn(2, 12, DIM), torch.arange(12)
    prefix = (index[None, :] < 5) | (index[None, :] <= index[:, None])
    out = block(x, attn_mask=prefix)
    torch.testing.assert_close(out[:, :5], block(x[:, :5]))  # the prefix attends to itself in both directions
    changed = x.clone()
    changed[:, 8:] += 1
    assert torch.equal(block(changed, attn_mask=prefix)[:, :8], out[:, :8])  # and the rest is causal
    torch.testing.assert_close(block(x, attn_mask=index[None, :] <= index[:, None]), causal(x))


@pytest.mark.parametrize("method", ["forward", "step", "attention_map", "values_and_output"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_method_of_every_block_takes_attn_mask_by_keyword(name: str, method: str) -> None:
    parameter = inspect.signature(getattr(BLOCKS[name], method)).parameters["attn_mask"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter.default is None


@pytest.mark.parametrize("method", ["forward", "step", "attention_map", "values_and_output"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in REFUSING], ids=lambda case: case.name)
def test_layer_without_a_mask_of_pairs_refuses_attn_mask_by_name(case: Case, method: str) -> None:
    block: Any = case.make()
    with pytest.raises(ValueError, match=f"attn_mask must be None for {type(block).__name__}, whose "):
        getattr(block, method)(torch.randn(1, 3, DIM), attn_mask=torch.ones(3, 3, dtype=torch.bool))


def test_every_registered_block_takes_or_refuses_attn_mask() -> None:
    taking = {type(make()) for make in MASKED.values()} | {CrossAttention}
    for name, cls in BLOCKS.items():
        assert (cls.no_attn_mask is not None) == (name in REFUSING)
        assert name in REFUSING or issubclass(cls, tuple(taking))


@pytest.mark.parametrize(
    ("attn_mask", "error", "message"),
    [
        ([[True]], TypeError, "attn_mask must be a boolean or floating point tensor, got list"),
        (torch.ones(5, 5, dtype=torch.int64), TypeError, "attn_mask must be a boolean or .*, got dtype torch.int64"),
        (torch.ones(5), ValueError, r"attn_mask must be \(i, j\) = \(5, 5\), .* with b = 2, h = 4, got shape \(5,\)"),
        (torch.ones(5, 4), ValueError, r"attn_mask must be .*, got shape \(5, 4\)"),
        (torch.ones(1, 5), ValueError, r"attn_mask must be .*, got shape \(1, 5\)"),
        (torch.ones(3, 5, 5), ValueError, r"attn_mask must be .*, got shape \(3, 5, 5\)"),
        (torch.ones(2, 3, 5, 5), ValueError, r"attn_mask must be .*, got shape \(2, 3, 5, 5\)"),
        (torch.ones(5, 5, device="meta"), ValueError, "attn_mask must be on the device of x, cpu, got meta"),
    ],
)
def test_layers_reject_an_attn_mask_of_another_type_shape_or_device(
    attn_mask: Any, error: type[Exception], message: str
) -> None:
    for block in (FullAttention(DIM, **SMALL), TalkingHeadsAttention(DIM, **SMALL)):
        for method in (block.forward, block.step, block.attention_map, block.values_and_output):
            with pytest.raises(error, match=message):
                method(torch.randn(2, 5, DIM), attn_mask=attn_mask)


def test_step_rejects_rows_that_miss_the_earlier_tokens() -> None:
    block, x = FullAttention(DIM, **SMALL), torch.randn(2, 5, DIM)
    _, state = block.step(x)
    with pytest.raises(ValueError, match=r"attn_mask must be \(i, j\) = \(5, 10\)"):
        block.step(x, state, attn_mask=torch.ones(5, 5, dtype=torch.bool))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "full: relative bias", "full: pattern", "cosine_sim", "talking_heads"])
def test_layer_with_attn_mask_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    block = MASKED[name]()
    compiled = torch.compile(block, fullgraph=True)
    for length in (9, 12, 17):
        x, attn_mask = torch.randn(B, length, DIM), additive(torch.rand(length, length) < 0.7)
        torch.testing.assert_close(compiled(x, attn_mask=attn_mask), block(x, attn_mask=attn_mask))
