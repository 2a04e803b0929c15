"""Feedforward layers against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_zoo import GEGLU, FeedForward, SwiGLU
from tests.formulas import relative_error


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


ACTIVATIONS: dict[type[FeedForward], Callable[[Tensor], Tensor]] = {FeedForward: gelu, GEGLU: gelu, SwiGLU: silu}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_output_and_gradients_equal_the_formula(kind: type[FeedForward], bias: bool) -> None:
    layer = kind(5, mult=3, bias=bias).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def linear(name: str, x: Tensor) -> Tensor:
        part = getattr(layer, name)
        return x @ part.weight.t() + (part.bias if bias else 0)

    if kind is FeedForward:
        hidden = gelu(linear("to_hidden", x))
    else:
        hidden = linear("to_hidden", x) * ACTIVATIONS[kind](linear("to_gate", x))
    want, out = linear("to_out", hidden), layer(x)
    inputs = [x, *layer.parameters()]
    assert hidden.shape[-1] == 15
    assert relative_error(out, want) < 1e-13
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, cotangent)
    for grad, want_grad in zip(grads, torch.autograd.grad(want, inputs, cotangent), strict=True):
        assert relative_error(grad, want_grad) < 1e-12


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_feedforward_mult_may_be_a_fraction(kind: type[FeedForward]) -> None:
    assert kind(6, mult=8 / 3).to_hidden.out_features == 16


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_feedforward_dim_inner_is_the_number_of_hidden_features(kind: type[FeedForward]) -> None:
    assert kind(6, dim_inner=7).to_hidden.out_features == 7


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_feedforward_dropout_is_active_only_in_training(kind: type[FeedForward]) -> None:
    layer, x = kind(8, dropout=0.5), torch.randn(64, 8)
    whole = kind(8)
    whole.load_state_dict(layer.state_dict())
    seen: list[Tensor] = []
    layer.to_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(x)
    share = (seen[0] == 0).double().mean()
    assert abs(share - 0.5) < 5 * (0.25 / seen[0].numel()) ** 0.5  # five standard deviations
    assert torch.equal(layer.eval()(x), whole(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got dim=0"),
        ({"dim": 2.0}, TypeError, "dim must be an int, got dim=2.0"),
        ({"dim": 4, "mult": 0.1}, ValueError, "mult must give at least one hidden feature, got mult=0.1 with dim=4"),
        ({"dim": 4, "mult": -2}, ValueError, "mult must give at least one hidden feature, got mult=-2"),
        ({"dim": 4, "dim_inner": 0}, ValueError, "dim_inner must be at least 1, got dim_inner=0"),
        ({"dim": 4, "dim_inner": 2.5}, TypeError, "dim_inner must be an int, got dim_inner=2.5"),
        ({"dim": 4, "dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got dropout=1.0"),
        ({"dim": 4, "dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\), got dropout=-0.1"),
    ],
)
def test_feedforward_rejects_invalid_sizes(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeedForward(**arguments)
