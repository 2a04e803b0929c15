"""Talking heads with different numbers of heads before, between and after the mixes, on the CPU and as on a device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import TalkingHeadsAttention
from attention_zoo.ops import talking_heads_attention
from attention_zoo.ops.talking_heads import HeadMix, stream_diversity_loss, tiled
from attention_zoo.ops.tiling import QUERY_TILE
from tests.counting import check_no_synchronisation, count_operators, largest_tensor, operators_of
from tests.formulas import allowed_pairs, relative_error
from tests.ops.talking_heads.mixes import make_mix, tensors_of

HEADS = [(2, 6, 3), (5, 2, 4), (1, 3, 3)]  # of queries and keys, softmax, values


def inputs(heads: tuple[int, int, int], i: int, j: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the two mixes."""
    before, between, after = heads
    shapes = [(3, before, i, 8), (3, before, j, 8), (3, after, j, 5), (between, before), (after, between)]
    leaves = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [*leaves[:3], *(leaf * leaf.shape[1] ** -0.5 for leaf in leaves[3:])]


def by_definition(q: Tensor, k: Tensor, v: Tensor, pre: Tensor, post: Tensor, allowed: Tensor) -> Tensor:
    """The paper's formula, one softmax head of one query at a time; `allowed` is (b, h, i, j) bool."""
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            out = v.new_zeros(v.shape[1], v.shape[3])
            for h in range(len(pre)):
                keys = allowed[b, h, i].nonzero()[:, 0]
                if len(keys):
                    scores = sum(pre[h, g] * (k[b, g, keys] @ q[b, g, i]) for g in range(q.shape[1]))
                    weights = torch.exp(scores / math.sqrt(q.shape[3]))
                    weights = weights / weights.sum()
                    out = out + torch.stack([post[o, h] * weights @ v[b, o, keys] for o in range(v.shape[1])])
            rows.append(out)
    return torch.stack(rows).view(q.shape[0], q.shape[2], *v.shape[1::2]).transpose(1, 2)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles and dtypes of a device, with maps small enough that the tests have several tiles."""
    choose = tiled.tile_size
    monkeypatch.setattr(tiled, "tile_size", lambda q, k, heads: choose(q.to("meta"), k.to("meta"), heads))
    monkeypatch.setattr(tiled, "ROW_NUMBERS", 2**15)


def with_gradients(impl: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = talking_heads_attention(*leaves, impl=impl, **options)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("masked", ["", "keys", "pairs"])
def test_numbers_of_heads_may_differ_before_between_and_after_the_mixes(
    masked: str, heads: tuple[int, int, int], impl: str
) -> None:
    leaves = [leaf.requires_grad_() for leaf in inputs(heads, 4, 6, torch.float64)]
    mask = {"": None, "keys": torch.rand(3, 6) < 0.5, "pairs": torch.rand(3, heads[1], 4, 6) < 0.5}[masked]
    allowed = allowed_pairs((3, heads[1], 4, 6), mask=mask, causal=True)
    want = by_definition(*leaves, allowed)
    got = talking_heads_attention(*leaves, causal=True, mask=mask, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (got, want)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


SIZES = [(1, 1), (131, 131), (QUERY_TILE + 3, 131), (70, 67)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def check_equal(heads: tuple[int, int, int], i: int, j: int, setting: str, dtype: torch.dtype) -> None:
    mask: Tensor | None = None
    if "padding" in setting:
        mask = torch.rand(3, j) < 0.6
        mask[1] = False
    if "added" in setting:
        mask = torch.randn(3, heads[1], i, j).masked_fill(torch.rand(1, 1, i, j) < 0.3, -math.inf)
    leaves = [leaf.to(dtype) for leaf in inputs(heads, i, j)]
    options: dict[str, Any] = {"causal": "causal" in setting, "mask": mask}
    got = with_gradients("tiled", leaves, **options)
    want = with_gradients("reference", [leaf.float() for leaf in leaves], **options)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < TOLERANCE[dtype] or (ours - theirs).abs().max() < 1e-6
    if mask is not None and mask.dtype == torch.bool:  # no key is visible in the second row
        assert not any(tensor[1].any() for tensor in got[:4])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("i", "j"), SIZES)
@pytest.mark.parametrize("setting", ["causal", "causal, padding", "bidirectional, added"])
def test_tiles_on_the_cpu_equal_the_reference(setting: str, i: int, j: int, dtype: torch.dtype) -> None:
    check_equal((2, 6, 3), i, j, setting, dtype)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("i", "j"), SIZES)
@pytest.mark.parametrize("setting", ["causal", "causal, padding", "bidirectional, added"])
def test_tiles_of_a_device_equal_the_reference(setting: str, i: int, j: int, dtype: torch.dtype) -> None:
    check_equal((5, 2, 4), i, j, setting, dtype)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(("pre", "post"), [("mlp", "mlp"), (None, "linear"), (None, None)])
def test_every_kind_of_mix_in_tiles_of_a_device_equals_the_reference(pre: str | None, post: str | None) -> None:
    q, k, v = (torch.randn(3, 4, 131, 8) for _ in range(3))
    mixes: list[HeadMix] = [make_mix(pre, heads=4), make_mix(post, heads=4)]
    results = []
    for impl in ("tiled", "reference"):
        leaves = [leaf.detach().requires_grad_() for leaf in (q, k, v)]
        out = talking_heads_attention(*leaves, *mixes, causal=True, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *tensors_of(*mixes)])])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 2e-5


@pytest.mark.usefixtures("as_on_a_device")
def test_diversity_loss_in_tiles_of_a_device_equals_the_reference() -> None:
    leaves = [torch.randn(3, 4, 131, 8).requires_grad_() for _ in range(2)]
    leaves.append(torch.randn(6, 4).requires_grad_())
    mask = torch.rand(3, 131) < 0.7
    results = []
    for impl in ("tiled", "reference"):
        loss = stream_diversity_loss(*leaves, streams=2, mask=mask, causal=True, impl=impl)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-4


@pytest.mark.usefixtures("as_on_a_device")
def test_dropout_in_tiles_of_a_device_drops_the_same_weights_in_backward() -> None:
    q, k, v, pre, post = inputs((2, 6, 3), 131, 131, torch.float64)
    v.requires_grad_()

    def run(v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return talking_heads_attention(q, k, v, pre, post, dropout=0.3)

    out = run(v)
    weight, step = torch.randn_like(out), torch.randn_like(v)
    (gradient,) = torch.autograd.grad((out * weight).sum(), v)
    torch.testing.assert_close((gradient * step).sum(), ((run(v + step) - out) * weight).sum())  # linear in v


def layer_and_input(
    batch: int, length: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[TalkingHeadsAttention, Tensor]:
    with torch.device("meta"):
        layer = TalkingHeadsAttention(64, heads=8, dim_head=8, **options).to(dtype)
        return layer, torch.empty(batch, length, 64, dtype=dtype, requires_grad=True)


CALLS: dict[str, Any] = {
    "plain": lambda layer, x: layer(x).sum().backward(),
    "padding": lambda layer, x: layer(x, mask=torch.empty(x.shape[:2], dtype=torch.bool, device="meta")),
    "attn_mask": lambda layer, x: layer(x, attn_mask=torch.empty(1, x.shape[1], x.shape[1], device="meta")),
    "documents": lambda layer, x: layer(x, document_ids=torch.empty(x.shape[:2], dtype=torch.int64, device="meta")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_on_a_device_grow_neither_with_the_batch_nor_with_the_length(call: str, dtype: torch.dtype) -> None:
    counts = set()
    for batch, length in ((1, 64), (1, 1024), (7, 64), (3, 700)):
        layer, x = layer_and_input(batch, length, dtype, qk_heads=4, v_heads=2)
        counts.add(count_operators(lambda layer=layer, x=x: CALLS[call](layer, x)))
        check_no_synchronisation(lambda layer=layer, x=x: CALLS[call](layer, x))
    assert len(counts) == 1
    assert counts.pop() < 110


def test_operators_on_a_device_stay_few_for_maps_beyond_the_size_of_a_tile() -> None:
    counts = []
    for batch in (1, 4):
        layer, x = layer_and_input(batch, 4096)
        counts.append(count_operators(lambda layer=layer, x=x: layer(x).sum().backward()))
        assert largest_tensor(lambda layer=layer, x=x: layer(x).sum().backward()) <= tiled.ALL_NUMBERS
    assert counts[0] == counts[1] < 500


def test_a_step_on_a_device_runs_as_many_operators_after_every_length_and_reads_no_value() -> None:
    counts = set()
    for batch, length in ((2, 10), (5, 10), (2, 500)):
        layer, x = layer_and_input(batch, length, qk_heads=4)
        layer.eval()
        with torch.no_grad():
            _, state = layer.step(x)
            counts.add(count_operators(lambda layer=layer, x=x, state=state: layer.step(x[:, :1], state)))
            check_no_synchronisation(lambda layer=layer, x=x, state=state: layer.step(x[:, :1], state))
    assert len(counts) == 1


def test_factors_of_matrix_products_on_a_device_are_of_the_dtype_of_the_inputs() -> None:
    layer, x = layer_and_input(2, 64, torch.bfloat16)
    seen = []
    bmm = torch.bmm

    def record(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        seen.append((a.dtype, b.dtype, options.get("out_dtype")))
        return bmm(a, b, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", record)
        names = operators_of(lambda: layer(x).sum().backward())
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert len(seen) == names.count("bmm") == 7  # scores and values, and in backward scores and four gradients


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre_softmax": torch.ones(6, 3)},
            r"pre_softmax must mix the 2 heads with shapes \[\(6, 2\)\], got \[\(6, 3\)",
        ),
        (
            {"pre_softmax": torch.ones(0, 2)},
            r"pre_softmax must mix the 2 heads with shapes \[\(1, 2\)\], got \[\(0, 2\)",
        ),
        (
            {"post_softmax": torch.ones(4, 6)},
            r"post_softmax must mix the 6 heads with shapes \[\(3, 6\)\], got \[\(4, 6",
        ),
        ({"post_softmax": None}, "v must have as many heads as there are maps, got 3 and 6"),
        ({"pre_softmax": None}, r"post_softmax must mix the 2 heads with shapes \[\(3, 2\)\], got \[\(3, 6\)\]"),
        ({"mask": torch.ones(3, 2, 4, 5).bool()}, r"mask must be .* \(3, 6, 4, 5\), got shape \(3, 2, 4, 5\)"),
        ({"v": torch.ones(3, 3, 4, 5)}, r"v must be \(b, h_v, j, e_v\) with b = 3, j = 5, got shape \(3, 3, 4, 5\)"),
    ],
)
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_heads_that_do_not_fit_the_mixes_are_named(changes: dict[str, Any], message: str, impl: str) -> None:
    q, k, v, pre, post = inputs((2, 6, 3), 4, 5)
    arguments = {"q": q, "k": k, "v": v, "pre_softmax": pre, "post_softmax": post, "impl": impl, **changes}
    with pytest.raises(ValueError, match=message):
        talking_heads_attention(**arguments)


def test_values_of_another_dtype_raise() -> None:
    q, k, v, pre, post = inputs((2, 6, 3), 4, 5)
    with pytest.raises(TypeError, match="v must be a dense tensor of the dtype of q and k"):
        talking_heads_attention(q, k, v.double(), pre, post)
