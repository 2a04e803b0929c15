"""Models of the builders against the definition of the transformer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import LanguageModel, cosine_sim_lm
from tests.formulas import allowed_pairs, attend_one_by_one, relative_error, unit_slices


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def transformer(
    weights: dict[str, Tensor], tokens: Tensor, *, depth: int, heads: int, pre_norm: bool, cosine_sim: bool
) -> Tensor:
    """The model by its definition, with scale 3 and groups 2."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].t()

    def attention(x: Tensor, name: str) -> Tensor:
        parts = linear(x, f"{name}.to_qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        scale = q.shape[-1] ** -0.5
        if cosine_sim:
            q, k, scale = unit_slices(q, 2, 1e-12), unit_slices(k, 2, 1e-12), 3.0
        seen = allowed_pairs((*q.shape[:3], q.shape[2]), mask=None, causal=True)
        return linear(attend_one_by_one(q, k, v, seen, None, scale).transpose(1, 2).flatten(2), f"{name}.to_out")

    def feedforward(x: Tensor, name: str) -> Tensor:
        hidden = linear(x, f"{name}.to_hidden")
        return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.to_out")

    x = weights["token_embedding.weight"][tokens] + weights["positions.weight"][: tokens.shape[1]]
    for layer in range(depth):
        for index, branch in enumerate((attention, feedforward)):
            name = f"stack.layers.{layer}.sublayers.{index}"
            if pre_norm:
                x = x + branch(layer_norm(x, weights, f"{name}.residual.norm"), f"{name}.block")
            else:
                x = layer_norm(branch(x, f"{name}.block") + (2 * depth) ** 0.25 * x, weights, f"{name}.residual.norm")
    x = layer_norm(x, weights, "stack.norm") if pre_norm else x
    return linear(x, "to_logits")


def small(**options: object) -> LanguageModel:
    return cosine_sim_lm(num_tokens=19, dim=12, depth=3, max_seq_len=17, heads=2, dim_head=6, **options)


@pytest.mark.parametrize("cosine_sim", [True, False])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_cosine_sim_lm_logits_and_gradients_equal_the_definition(pre_norm: bool, cosine_sim: bool) -> None:
    model = small(scale=3.0, groups=2, pre_norm=pre_norm, cosine_sim=cosine_sim).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(19, (2, 11))
    weights = dict(model.named_parameters())
    out = model(tokens)
    want = transformer(weights, tokens, depth=3, heads=2, pre_norm=pre_norm, cosine_sim=cosine_sim)
    assert relative_error(out, want) < 1e-12
    cotangent = torch.randn_like(out)
    used = [p for name, p in weights.items()]
    grads = torch.autograd.grad(out, used, cotangent)
    for grad, want_grad in zip(grads, torch.autograd.grad(want, used, cotangent), strict=True):
        assert relative_error(grad, want_grad) < 1e-10


def spread(weight: Tensor) -> float:
    return weight.detach().std().item()


def test_deepnorm_initialization_equals_deepnet_and_upstream() -> None:
    model = cosine_sim_lm(num_tokens=256, dim=128, depth=4, max_seq_len=128, dim_head=16)
    near = {"rel": 0.03}  # a standard deviation estimated from 16384 numbers or more
    assert spread(model.token_embedding.weight) == pytest.approx(1e-5, **near)
    assert spread(model.positions.weight) == pytest.approx(1e-5, **near)
    assert spread(model.to_logits.weight) == pytest.approx(math.sqrt(2 / (256 + 128)), **near)
    attention, feedforward = (sub.block for sub in model.stack.layers[2].sublayers)
    gain = (8 * 4) ** -0.25
    for weight, factor in (
        (attention.to_qkv.part("q"), 1),
        (attention.to_qkv.part("k"), 1),
        (attention.to_qkv.part("v"), gain),
        (attention.to_out.weight, gain),
        (feedforward.to_hidden.weight, gain),
        (feedforward.to_out.weight, gain),
    ):
        assert spread(weight) == pytest.approx(factor * math.sqrt(2 / sum(weight.shape)), **near)


def test_scale_and_groups_default_to_upstreams_values() -> None:
    block = small().stack.layers[0].sublayers[0].block
    assert (block.scale, block.groups) == (8.0, 1)


def test_cosine_sim_lm_overfits_a_sequence() -> None:
    model = small(groups=2)
    tokens = torch.randint(19, (1, 17))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # log 19 = 2.9 at the start
