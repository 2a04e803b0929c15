"""The diversity loss of streams: its definition, and its fast implementation against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import tiling
from attention_zoo.ops.talking_heads import HeadMLP, diversity, head_mixing, stream_diversity_loss, tiled
from attention_zoo.ops.tiling import QUERY_TILE
from tests.counting import largest_tensor
from tests.ops.fast_code import forbid
from tests.ops.talking_heads.mixes import HEADS, inputs, make_mix, tensors_of


def diversity_by_definition(q: Tensor, k: Tensor, streams: int, mask: Tensor) -> Tensor:
    """The causal loss, one pair of maps of one query at a time."""
    heads, losses = HEADS // streams, []
    pairs = [(s, t) for s in range(streams) for t in range(s + 1, streams)]
    for b in range(q.shape[0]):
        for i in mask[b].nonzero()[:, 0].tolist():
            keys = [j for j in range(i + 1) if mask[b, j]]
            maps = (q[b, :, i, None] * k[b][:, keys]).sum(-1).mul(8**-0.5).softmax(-1).view(streams, heads, -1)
            values = []
            for s, t in pairs:
                for a in maps[s]:
                    for c in maps[t]:
                        entropies = [-(p * p.log()).sum() for p in ((a + c) / 2, a, c)]
                        values.append(entropies[0] - (entropies[1] + entropies[2]) / 2)
            losses.append(-torch.stack(values).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("streams", [2, 3])
def test_diversity_loss_is_minus_the_mean_jensen_shannon_divergence(streams: int) -> None:
    q, k, _ = inputs(67, 67, torch.float64)
    mask = torch.rand(2, 67) < 0.7
    want = diversity_by_definition(q, k, streams, mask)
    gradients = torch.autograd.grad(want, [q, k])
    for impl in ("tiled", "reference"):
        got = stream_diversity_loss(q, k, None, streams=streams, mask=mask, causal=True, impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, check_dtype=False)
        for ours, theirs in zip(torch.autograd.grad(got, [q, k]), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [None, "linear", "mlp"])
@pytest.mark.parametrize("n", [3, QUERY_TILE, 131])
@pytest.mark.parametrize("masked", [False, True])
def test_tiled_diversity_loss_equals_the_reference(n: int, kind: str | None, causal: bool, masked: bool) -> None:
    q, k, _ = inputs(n, n, torch.float64)
    pre_softmax = make_mix(kind, torch.float64)
    mask = torch.rand(2, n) < 0.7 if masked else None
    options: dict[str, Any] = {"streams": 2, "mask": mask, "causal": causal}
    leaves = [q, k, *tensors_of(pre_softmax)]
    got, want = (stream_diversity_loss(q, k, pre_softmax, impl=impl, **options) for impl in ("tiled", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_diversity_reference_is_twice_differentiable_and_runs_no_fast_code(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, head_mixing, tiled, diversity, tiling)
    q, k = (torch.randn(2, 4, 5, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    mix = make_mix("mlp", torch.float64, heads=4)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]]) if masked else None

    def loss(q: Tensor, k: Tensor, *parts: Tensor) -> Tensor:
        mix = HeadMLP(*parts)
        return stream_diversity_loss(q, k, mix, streams=2, mask=mask, causal=masked, impl="reference")

    assert torch.autograd.gradcheck(loss, (q, k, *tensors_of(mix)), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (q, k, *tensors_of(mix)), fast_mode=True)


def test_second_derivative_of_the_tiled_diversity_loss_raises_and_names_the_reference() -> None:
    q, k, _ = inputs(7, 7)
    loss = stream_diversity_loss(q, k, make_mix("linear"), streams=2, impl="tiled")
    (first,) = torch.autograd.grad(loss.square() + q.square().sum(), q, create_graph=True)
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
    weight = make_mix("linear")
    for n in (5, 70, 131, 200):
        q, k, _ = inputs(n, n)
        torch.testing.assert_close(compiled(q, k, weight), stream_diversity_loss(q, k, weight, streams=2))
    assert traces == 1


@pytest.mark.parametrize("n", [5, 67, 131])
def test_tiled_diversity_loss_allocates_no_map_of_all_queries(n: int) -> None:
    q, k, _ = inputs(n, n, batch=1)
    largest = largest_tensor(lambda: stream_diversity_loss(q, k, make_mix("linear"), streams=2).backward())
    assert largest <= HEADS * max(min(n, QUERY_TILE) * n, n * 8)


def test_diversity_loss_of_one_stream_or_of_equal_streams_is_zero() -> None:
    q, k, _ = inputs(7, 7)
    assert stream_diversity_loss(q, k, None, streams=1) == 0
    same = torch.randn(2, 1, 7, 8).expand(-1, HEADS, -1, -1)
    assert abs(float(stream_diversity_loss(same, same, None, streams=2))) < 1e-6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"streams": 4}, ValueError, "streams must divide the heads of q, got streams=4 and 6 heads"),
        ({"streams": 0}, ValueError, "streams must divide the heads of q"),
        ({"pre_softmax": torch.ones(2, 2)}, ValueError, "pre_softmax must mix the 6 heads"),
        ({"pre_softmax": torch.ones(5, 6)}, ValueError, "streams must divide the maps .* got streams=2 and 5 maps"),
        ({"mask": torch.ones(2, 5).bool()}, ValueError, "mask must be"),
        ({"impl": "sdpa"}, ValueError, "impl must be one of"),
    ],
)
def test_invalid_diversity_arguments_raise(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, _ = inputs(3, 3)
    options: dict[str, Any] = {"pre_softmax": None, "streams": 2, **changes}
    with pytest.raises(error, match=message):
        stream_diversity_loss(q, k, options.pop("pre_softmax"), **options)
