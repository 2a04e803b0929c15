"""Output gates: the equation, in every layer that takes one, and the names of their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo import (
    AttentionBlock,
    CosineSimAttention,
    FullAttention,
    GateLoopAttention,
    RelativeGateAttention,
    TalkingHeadsAttention,
)
from attention_zoo.testing import check_block
from tests.cases import DIM, SMALL

GATED: dict[str, Callable[..., AttentionBlock]] = {
    "full": lambda **options: FullAttention(DIM, **SMALL, **options),
    "cosine_sim": lambda **options: CosineSimAttention(DIM, **SMALL, **options),
    "talking_heads": lambda **options: TalkingHeadsAttention(DIM, **SMALL, **options),
    "gate_loop": lambda **options: GateLoopAttention(DIM, heads=4, **options),
    "relative_gate": lambda **options: RelativeGateAttention(DIM, **SMALL, **options),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


@pytest.mark.parametrize("per", ["head", "feature"])
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize("name", GATED)
def test_output_gate_multiplies_the_merged_heads(name: str, activation: str, per: str) -> None:
    block = GATED[name](output_gate=activation, output_gate_per=per)
    x, mask = torch.randn(2, 7, DIM), torch.rand(2, 7) < 0.7
    parts = dict(block.to_gate.named_parameters())
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == (
        {"weight": (4, DIM), "bias": (4,)} if per == "head" else {"weight": (32, DIM)}
    )
    z = x @ parts["weight"].t()
    if per == "head":
        z = (z + parts["bias"]).repeat_interleave(8, dim=-1)
    merged = block.values_and_output(x, mask=mask).output.transpose(1, 2).reshape(2, 7, 32)
    want = (merged * ACTIVATIONS[activation](z)) @ block.to_out.weight.t()
    torch.testing.assert_close(block(x, mask=mask), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("full", None),
        ("cosine_sim", None),
        ("talking_heads", ("sigmoid", "head")),
        ("gate_loop", ("silu", "feature")),
        ("relative_gate", ("silu", "feature")),
    ],
)
def test_output_gate_of_each_layer_by_default(name: str, gate: tuple[str, str] | None) -> None:
    block = GATED[name]()
    assert (block.to_gate and (block.to_gate.activation, block.to_gate.per)) == gate
    without = GATED[name](output_gate=None)
    assert without.to_gate is None
    assert not any("to_gate" in key for key in without.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "activation", "per"),
    [
        ("full", "silu", "head"),
        ("cosine_sim", "sigmoid", "feature"),
        ("talking_heads", "silu", "feature"),
        ("gate_loop", "sigmoid", "head"),
        ("relative_gate", "sigmoid", "head"),
    ],
)
def test_gated_layer_passes_the_contract_checks(name: str, activation: str, per: str) -> None:
    options = {"output_gate": activation, "output_gate_per": per}
    if name in ("gate_loop", "relative_gate"):
        options["gradient_fraction"] = 1.0
    make = GATED[name]
    checks = ("shapes", "causality", "padding", "empty rows", "steps", "map", "derivatives", "half precision")
    report = check_block(lambda: make(**options), dim=DIM, causal=True, lengths=(1, 7), checks=checks)
    report.raise_for_failures()


@pytest.mark.parametrize("name", GATED)
def test_row_without_valid_tokens_gives_zero_under_an_output_gate(name: str) -> None:
    block = GATED[name](output_gate="sigmoid", output_gate_per="head")
    mask = torch.tensor([[False] * 5, [False, True, True, True, True]])
    out = block(torch.randn(2, 5, DIM), mask=mask)
    assert not out[0].any()
    assert not out[1, 0].any()
    assert out[1, 1:].all()


@pytest.mark.parametrize("name", GATED)
def test_layers_reject_unknown_output_gates(name: str) -> None:
    with pytest.raises(ValueError, match=r"output_gate must be one of .*'sigmoid', 'silu'.*, got output_gate='swish'"):
        GATED[name](output_gate="swish")
    with pytest.raises(ValueError, match=r"output_gate_per must be one of .*, got output_gate_per='row'"):
        GATED[name](output_gate="silu", output_gate_per="row")


@pytest.mark.parametrize("make", [GateLoopAttention, RelativeGateAttention])
@pytest.mark.parametrize("gate", ["complex", "real", None])
def test_gate_is_complex_real_or_absent(make: type[AttentionBlock], gate: str | None) -> None:
    torch.manual_seed(3)
    block, x = (
        make(DIM, gate=gate, heads=4, **({"dim_head": 8} if make is RelativeGateAttention else {})),
        torch.randn(1, 9, DIM),
    )
    if gate is None:
        assert block.to_a is None
        return
    found = block.project(x, None)[3] if make is RelativeGateAttention else block.split(*block.project(x), None)[3]
    z = block.to_a(x).unflatten(-1, (-1, 2))
    if gate == "real":
        want = z[..., 0].abs().sigmoid() * z[..., 0].sign() + 0j
        assert (found.real < 0).any()
    else:
        want = torch.polar(z.norm(dim=-1).sigmoid(), torch.atan2(z[..., 1], z[..., 0]))
    torch.testing.assert_close(found.transpose(1, 2).reshape(want.shape), want, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"gate must be one of \['complex', 'real'\], got gate='imaginary'"):
        make(DIM, gate="imaginary")
