"""Talking heads against the paper's formula, and the fast path against the reference at every edge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo.ops.talking_heads import talking_heads_attention
from attention_zoo.ops.talking_heads.diversity import stream_diversity_loss
from attention_zoo.ops.talking_heads.head_mixing import HeadMix, HeadMLP, mix_heads
from attention_zoo.ops.talking_heads.tiled import QUERY_BLOCK
from tests.formulas import relative_error

HEADS = 6


def inputs(i: int, j: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    shapes = [(batch, HEADS, i, 8), (batch, HEADS, j, 8), (batch, HEADS, j, 5)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def mix(kind: str | None, dtype: torch.dtype = torch.float32) -> HeadMix:
    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) * HEADS**-0.5).to(dtype).requires_grad_()

    if kind is None:
        return None
    if kind == "linear":
        return weight(HEADS, HEADS)
    return HeadMLP(weight(HEADS), weight(2 * HEADS, HEADS), weight(HEADS, 2 * HEADS))


def leaves(*mixes: HeadMix) -> list[Tensor]:
    return [part for m in mixes for part in ([] if m is None else [m] if isinstance(m, Tensor) else m)]


@pytest.mark.parametrize("causal", [True, False])
def test_the_maps_are_mixed_pair_by_pair_before_and_after_the_softmax(causal: bool) -> None:
    q, k, v = inputs(7, 7, torch.float64)
    pre_softmax, post_softmax = mix("linear", torch.float64), mix("mlp", torch.float64)
    assert isinstance(pre_softmax, Tensor)
    assert isinstance(post_softmax, HeadMLP)
    want = torch.zeros(2, HEADS, 7, 5, dtype=torch.float64)
    for b in range(2):
        for i in range(7):
            seen = range(i + 1) if causal else range(7)
            scores = torch.stack([pre_softmax @ (q[b, :, i] * k[b, :, j]).sum(-1) * 8**-0.5 for j in seen], dim=1)
            for j, weights in zip(seen, scores.softmax(dim=1).unbind(1), strict=True):
                unit = weights / (weights.square().mean() + 1e-5).sqrt() * post_softmax.norm
                hidden = post_softmax.w1 @ unit
                mixed = weights + post_softmax.w2 @ (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
                want[b, :, i] += mixed[:, None] * v[b, :, j]
    got = talking_heads_attention(q, k, v, pre_softmax, post_softmax, causal=causal, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kinds", [("linear", "linear"), ("mlp", "mlp"), ("linear", None), (None, "mlp"), (None, None)])
@pytest.mark.parametrize(
    ("i", "j"), [(1, 1), (QUERY_BLOCK - 1, QUERY_BLOCK - 1), (131, 131), (3, 67), (67, 131), (70, 67)]
)
@pytest.mark.parametrize("setting", ["causal", "causal, masked", "bidirectional", "bidirectional, masked"])
def test_the_fast_path_equals_the_reference_in_outputs_and_gradients(kinds: Any, i: int, j: int, setting: str) -> None:
    q, k, v = inputs(i, j)
    pre_softmax, post_softmax = (mix(kind) for kind in kinds)
    mask = torch.rand(2, j) < 0.6 if "masked" in setting else None
    if mask is not None:
        mask[1] = False
    settings: dict[str, Any] = {"causal": "causal" in setting, "mask": mask}
    weight = torch.randn(2, HEADS, i, 5)
    results = []
    for impl in ("tiled", "reference"):
        out = talking_heads_attention(q, k, v, pre_softmax, post_softmax, impl=impl, **settings)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [q, k, v, *leaves(pre_softmax, post_softmax)])])
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        assert relative_error(got, want) < 2e-5 or (got - want).abs().max() < 1e-6
    if mask is not None:
        assert not results[0][0][1].any()
        assert not results[0][1][1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    q, k, v = (t.detach().to(dtype) for t in inputs(131, 131))
    pre_softmax, post_softmax = mix("linear"), mix("mlp")
    got = talking_heads_attention(q, k, v, pre_softmax, post_softmax)
    want = talking_heads_attention(q.double(), k.double(), v.double(), pre_softmax, post_softmax, impl="reference")
    assert got.dtype == dtype
    assert relative_error(got, want) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp", None])
def test_autocast_changes_neither_the_output_nor_the_gradients_of_the_fast_path(kind: str | None) -> None:
    q, k, v = inputs(131, 131)
    pre_softmax, post_softmax = mix(kind), mix(kind)
    weight = torch.randn(2, HEADS, 131, 5)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = talking_heads_attention(q, k, v, pre_softmax, post_softmax)
            results.append(
                [out, *torch.autograd.grad((out * weight).sum(), [q, k, v, *leaves(pre_softmax, post_softmax)])]
            )
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-6


def test_dropout_is_the_same_in_forward_and_backward_and_new_every_time() -> None:
    q, k, v = inputs(131, 131, torch.float64, batch=1)
    mixes = mix("linear", torch.float64), mix("linear", torch.float64)

    def run(v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return talking_heads_attention(q, k, v, *mixes, dropout=0.3)

    out = run(v)
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), v)
    step = torch.randn_like(v)
    slope = ((run(v + step) - out) * weight).sum()  # linear in v: exact, if the same weights are dropped
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-8, atol=1e-8)
    assert not torch.equal(out, talking_heads_attention(q, k, v, *mixes, dropout=0.3))


def test_dropout_keeps_the_mean_of_the_output() -> None:
    q, k, v = (t.detach() for t in inputs(5, 5, batch=1))
    outs = [talking_heads_attention(q, k, v, None, None, dropout=0.4) for _ in range(3000)]
    want = talking_heads_attention(q, k, v, None, None)
    torch.testing.assert_close(torch.stack(outs).mean(0), want, rtol=0, atol=0.12)


def test_a_second_derivative_on_the_fast_path_raises_and_is_right_in_the_reference() -> None:
    q, k, v = inputs(5, 5, torch.float64, batch=1)
    mixes = mix("linear", torch.float64), mix("mlp", torch.float64)
    (first,) = torch.autograd.grad(talking_heads_attention(q, k, v, *mixes).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), q)
    torch.autograd.gradgradcheck(
        lambda q: talking_heads_attention(q, k, v, *mixes, impl="reference"), (q,), fast_mode=True
    )


def test_a_mix_of_another_number_of_heads_is_refused_by_name() -> None:
    q, k, v = inputs(3, 3)
    with pytest.raises(ValueError, match=r"post must mix the 6 heads with shapes \[\(6, 6\)\], got \[\(5, 5\)\]"):
        talking_heads_attention(q, k, v, None, torch.eye(5))


@pytest.mark.parametrize("n", [5, 67, 131])
def test_the_fast_path_holds_no_map_of_all_pairs(n: int) -> None:
    q, k, v = inputs(n, n, batch=1)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    with Largest():
        talking_heads_attention(q, k, v, mix("linear"), mix("linear")).sum().backward()
    assert largest <= HEADS * max(min(n, QUERY_BLOCK) * n, n * 8)


def slow_diversity(q: Tensor, k: Tensor, streams: int, mask: Tensor) -> Tensor:
    heads, total, count = HEADS // streams, 0.0, 0
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            if not mask[b, i]:
                continue
            seen = [j for j in range(i + 1) if mask[b, j]]
            maps = (q[b, :, i, None] * k[b][:, seen]).sum(-1).mul(8**-0.5).softmax(-1).view(streams, heads, -1)
            pairs = [(s, t) for s in range(streams) for t in range(s + 1, streams)]
            values = []
            for s, t in pairs:
                for a in maps[s]:
                    for c in maps[t]:
                        m = (a + c) / 2
                        entropies = [-(p * p.log()).sum() for p in (m, a, c)]
                        values.append(entropies[0] - (entropies[1] + entropies[2]) / 2)
            total, count = total + torch.stack(values).mean(), count + 1
    return -total / count


@pytest.mark.parametrize("streams", [2, 3])
def test_the_diversity_loss_is_minus_the_mean_jensen_shannon_divergence(streams: int) -> None:
    q, k, _ = inputs(67, 67, torch.float64)
    mask = torch.rand(2, 67) < 0.7
    got = stream_diversity_loss(q, k, None, streams=streams, mask=mask)
    want = slow_diversity(q, k, streams, mask)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, check_dtype=False)
    for ours, theirs in zip(torch.autograd.grad(got, [q, k]), torch.autograd.grad(want, [q, k]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [None, "linear", "mlp"])
@pytest.mark.parametrize("n", [3, QUERY_BLOCK, 131])
@pytest.mark.parametrize("masked", [False, True])
def test_diversity_by_blocks_equals_the_reference(n: int, kind: str | None, causal: bool, masked: bool) -> None:
    q, k, _ = inputs(n, n, torch.float64)
    pre_softmax = mix(kind, torch.float64)
    mask = torch.rand(2, n) < 0.7 if masked else None
    options: dict[str, Any] = {"streams": 2, "mask": mask, "causal": causal}
    inputs_of = [q, k, *leaves(pre_softmax)]
    got, want = (stream_diversity_loss(q, k, pre_softmax, impl=impl, **options) for impl in ("tiled", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(got, inputs_of), torch.autograd.grad(want, inputs_of), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_a_second_derivative_by_blocks_raises_and_names_the_way_out() -> None:
    q, k, v = inputs(7, 7)
    weight = mix("linear")
    for out in (talking_heads_attention(q, k, v, weight, None), stream_diversity_loss(q, k, weight, streams=2)):
        (first,) = torch.autograd.grad(out.square().sum() + q.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"attention_zoo.reference\(\)"):
            first.square().sum().backward()


def test_one_trace_of_the_diversity_loss_serves_every_length() -> None:
    traces = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal traces
        traces += 1
        return graph

    compiled = torch.compile(
        lambda q, k, w: stream_diversity_loss(q, k, w, streams=2), backend=count, fullgraph=True, dynamic=True
    )
    weight = mix("linear")
    for n in (5, 70, 131, 200):
        q, k, _ = inputs(n, n)
        torch.testing.assert_close(compiled(q, k, weight), stream_diversity_loss(q, k, weight, streams=2))
    assert traces == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pre_softmax": "linear"}, TypeError, "pre must be a .C, C. tensor, a HeadMLP or None, got str"),
        (
            {"post_softmax": (torch.ones(HEADS),) * 3},
            TypeError,
            "post must be a .C, C. tensor, a HeadMLP or None, got tuple",
        ),
        ({"pre_softmax": torch.ones(2, 2)}, ValueError, "pre must mix the 6 heads"),
        ({"dropout": 1.0}, ValueError, "dropout must lie in .0, 1., got dropout=1.0"),
        ({"impl": "blokcs"}, ValueError, "impl must be one of"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = inputs(3, 3)
    options: dict[str, Any] = {"pre_softmax": None, "post_softmax": None, **changes}
    with pytest.raises(error, match=message):
        talking_heads_attention(q, k, v, options.pop("pre_softmax"), options.pop("post_softmax"), **options)


def test_one_stream_has_no_diversity_and_equal_streams_have_none_either() -> None:
    q, k, _ = inputs(7, 7)
    assert stream_diversity_loss(q, k, None, streams=1) == 0
    same = torch.randn(2, 1, 7, 8).expand(-1, HEADS, -1, -1)
    assert abs(float(stream_diversity_loss(same, same, None, streams=2))) < 1e-6


def test_the_identity_mix_changes_nothing() -> None:
    maps = torch.randn(2, HEADS, 3, 4)
    assert torch.equal(mix_heads(maps, None), maps)
    torch.testing.assert_close(mix_heads(maps, torch.eye(HEADS)), maps, rtol=1e-6, atol=1e-6)
