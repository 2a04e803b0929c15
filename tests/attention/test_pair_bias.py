"""A bias of every pair, given to the methods of full attention."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import ALiBi, FullAttention, RelativeBias, Rotary, reference
from attention_zoo.ops.documents import Documents
from tests.cases import DIM, SMALL
from tests.formulas import allowed_pairs, attend_one_by_one, relative_error

B, H, N = 3, 4, 9
LAYERS: dict[str, Any] = {
    "plain": {},
    "bidirectional": {"causal": False},
    "grouped heads, rotary, norms": {"kv_heads": 2, "rotary": Rotary(), "qk_norm": "rms"},
    "relative bias": {"bias": partial(RelativeBias, 4)},
    "ALiBi": {"bias": partial(ALiBi, 4)},
    "pattern": {"pattern": torch.rand(N, N) < 0.7},
}


def make(name: str) -> FullAttention:
    options = LAYERS[name]
    return FullAttention(DIM, **SMALL, **{**options, **({"bias": options["bias"]()} if "bias" in options else {})})


SHAPES = [(H, N, N), (1, H, N, N), (B, H, N, N)]


def formula(block: Any, x: Tensor, bias: Tensor, allowed: Tensor) -> Tensor:
    q, k, v = (part.double() for part in block.project(x, start=0))
    bias = bias.double().expand(B, H, N, N)
    if block.bias is not None:
        bias = bias + block.bias(N, N, x.device).pairs(N, N)
    if block.pattern is not None:
        allowed = allowed & block.pattern().mask(0, N, x.device)
    return attend_one_by_one(q, k, v, allowed, bias, block.dim_head**-0.5)


@pytest.mark.parametrize(("name", "shape"), [(name, SHAPES[place % 3]) for place, name in enumerate(LAYERS)])
def test_outputs_maps_and_gradients_equal_the_formula_under_every_mask(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    block = make(name).double()
    x = torch.randn(B, N, DIM, dtype=torch.float64)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask, boolean = torch.rand(B, N) < 0.7, torch.rand(B, N, N) < 0.7
    additive = torch.randn(N, N, dtype=torch.float64).masked_fill(torch.rand(N, N) < 0.3, -math.inf)
    documents = torch.tensor([[0] * 4 + [1] * 5]).expand(B, -1)
    causal = allowed_pairs((B, H, N, N), mask=None, causal=block.causal)
    cases: list[tuple[dict[str, Any], Tensor, Tensor | float]] = [
        ({}, causal, 0.0),
        ({"mask": mask}, causal & mask[:, None, None], 0.0),
        ({"mask": mask, "attn_mask": boolean}, causal & mask[:, None, None] & boolean[:, None], 0.0),
        ({"attn_mask": additive}, causal & (additive > -math.inf), additive.clamp(min=-1e9)),
    ]
    if name not in ("pattern", "grouped heads, rotary, norms"):  # rotary restarts at each document
        cases.append(({"document_ids": documents}, causal & Documents(documents).pairs[:, None], 0.0))
    weight = torch.randn(B, H, N, 8, dtype=torch.float64)
    for masks, allowed, added in cases:
        values, out = block.values_and_output(x, bias=bias, **masks)
        want = formula(block, x, bias + added, allowed)
        assert relative_error(out, want) < 1e-6
        torch.testing.assert_close(block(x, bias=bias, **masks), block.merge(out, x))
        torch.testing.assert_close(block.attention_map(x, bias=bias, **masks) @ values, out)
        got, expected = (torch.autograd.grad((y * weight).sum(), bias, retain_graph=True)[0] for y in (out, want))
        assert got.any()
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "shape"), [(name, SHAPES[place % 3]) for place, name in enumerate(LAYERS) if name != "bidirectional"]
)
def test_steps_with_the_rows_of_the_bias_equal_forward(name: str, shape: tuple[int, ...]) -> None:
    block = make(name).eval()
    x, bias, mask = torch.randn(B, N, DIM), torch.randn(shape), torch.rand(B, N) < 0.8
    mask[:, 0] = True
    want, start, state, outs = block(x, mask=mask, bias=bias), 0, None, []
    for size in (3, 1, 5):
        stop = start + size
        rows = bias[..., start:stop, :stop]
        out, state = block.step(x[:, start:stop], state, mask=mask[:, start:stop], bias=rows)
        outs.append(out)
        start = stop
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-5, rtol=1e-5)


def test_a_bias_without_gradient_in_bfloat16_and_the_reference_agree() -> None:
    block = FullAttention(DIM, **SMALL)
    x, bias = torch.randn(2, 67, DIM), torch.randn(H, 67, 67)
    with reference():
        want = block(x, bias=bias)
    torch.testing.assert_close(block(x, bias=bias), want)
    half = block.bfloat16()(x.bfloat16(), bias=bias)
    assert relative_error(half, want) < 0.02


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (
            torch.ones(H, 5, 5, dtype=torch.bool),
            TypeError,
            "bias must be a floating point tensor, got dtype torch.bool",
        ),
        ([0.0], TypeError, "bias must be a floating point tensor, got list"),
        (
            torch.ones(5, 5),
            ValueError,
            r"bias must be \(h, i, j\) = \(4, 5, 5\) or .*, got shape \(5, 5\)",
        ),
        (torch.ones(H, 5, 4), ValueError, r"bias must be .*, got shape \(4, 5, 4\)"),
        (torch.ones(3, H, 5, 5), ValueError, r"bias must be .* with b = 1 or 2, got shape \(3, 4, 5, 5\)"),
        (torch.ones(H, 5, 5, device="meta"), ValueError, "bias must be on the device of x, cpu, got meta"),
    ],
)
def test_a_wrong_bias_is_refused_by_every_method(bias: Any, error: type[Exception], message: str) -> None:
    block = FullAttention(DIM, **SMALL)
    for method in (block.forward, block.step, block.attention_map, block.values_and_output):
        with pytest.raises(error, match=message):
            method(torch.randn(2, 5, DIM), bias=bias)
