"""Residual connections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import GEGLU, FeedForward, FullAttention
from attention_zoo.layers import RESIDUALS, DeepNorm, PostNorm, PreNorm, Projections, SandwichNorm
from tests.formulas import relative_error

DIM = 8


def branch(x: Tensor) -> Tensor:
    """Some sub-layer."""
    return x.sin() + 1


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * norm.weight + norm.bias


FORMULAS = {
    PreNorm: lambda x, rule: x + branch(normed(x, rule.norm)),
    PostNorm: lambda x, rule: normed(x + branch(x), rule.norm),
    SandwichNorm: lambda x, rule: x + normed(branch(normed(x, rule.norm)), rule.norm_out),
    DeepNorm: lambda x, rule: normed(6**0.25 * x + branch(x), rule.norm),  # (2 depth)^(1/4)
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_residual_halves_compose_to_the_formula(kind) -> None:
    rule = kind(DIM, norm="layer", depth=3).double()
    for parameter in rule.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    assert relative_error(rule.merge(x, branch(rule.branch(x))), FORMULAS[kind](x, rule)) < 1e-13


def test_residuals_are_registered_and_only_pre_norm_and_sandwich_need_a_final_norm() -> None:
    assert {"pre": PreNorm, "post": PostNorm, "sandwich": SandwichNorm, "deepnorm": DeepNorm} == RESIDUALS
    assert {name for name, rule in RESIDUALS.items() if rule.final_norm} == {"pre", "sandwich"}


@pytest.mark.parametrize("kind", [PreNorm, PostNorm, SandwichNorm])
def test_residuals_without_initialisation_keep_the_weights(kind) -> None:
    block = FullAttention(DIM, heads=2, dim_head=4)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    kind(DIM, depth=3).initialize(block)
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("make", [FullAttention, FeedForward, GEGLU])
def test_deepnorm_initialises_weights_with_the_gains_of_the_paper(make, depth: int) -> None:
    block = make(128)
    DeepNorm(128, depth=depth).initialize(block)
    for name, module in block.named_modules():
        if isinstance(module, Projections):
            for part in "qkv":
                weight = module.part(part)
                want = (1 if part in "qk" else (8 * depth) ** -0.25) * (2 / sum(weight.shape)) ** 0.5
                assert abs(weight.std().item() / want - 1) < 0.02, part
        elif isinstance(module, nn.Linear):
            gain = 1 if name in ("to_q", "to_k") else (8 * depth) ** -0.25
            want = gain * (2 / sum(module.weight.shape)) ** 0.5  # xavier normal
            # the standard deviation of a sample of 65536 is known to a third of a percent
            assert abs(module.weight.detach().std().item() / want - 1) < 0.02, name
