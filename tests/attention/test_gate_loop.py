"""The gate loops: golden records, states of fixed size, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import BLOCKS, GateLoopAttention, RelativeGateAttention, Rotary, SimpleGateLoop, gate_loop_lm
from attention_zoo.layers.norms import RMSNorm
from tests.slow import relative_error

UPSTREAM = Path(__file__).parent.parent / "data" / "upstream"


def read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = torch.load(UPSTREAM / f"gateloop_{name}.pt", weights_only=True)
    return record


def looped(old: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Upstream's weights of GateLoopedAttention or CausalFullAttention under our names."""
    names = {
        "to_a.0.weight": "to_a.weight", "to_a.0.bias": "to_a.bias", "to_gates.0.weight": "to_gate.weight",
        "to_out.weight": "to_out.weight", "to_out.1.weight": "to_out.weight", "to_out.1.bias": "to_out.bias",
        "maybe_sub_ln.weight": "norm.weight", "maybe_sub_ln.bias": "norm.bias",
    }  # fmt: skip
    new = {ours: old[prefix + theirs] for theirs, ours in names.items() if prefix + theirs in old}
    packed = old[f"{prefix}to_qkv.weight"] if f"{prefix}to_qkv.weight" in old else old[f"{prefix}to_qkv.0.weight"]
    return new | dict(zip(("to_q.weight", "to_k.weight", "to_v.weight"), packed.chunk(3), strict=True))


def check(block: nn.Module, record: dict[str, Any]) -> None:
    """Output and gradients as recorded; our packing of weights does not change the norm over all gradients."""
    x = record["inputs"]["x"]
    if x.is_floating_point():
        x = x.requires_grad_()
    out = block(x)
    assert relative_error(out, record["outputs"]["out"]) < 1e-5
    (out * record["cotangents"]["out"]).sum().backward()
    if x.requires_grad:
        assert relative_error(x.grad, record["grads"]["input:x"]) < 1e-4
    norm = sum(float(p.grad.double().square().sum()) for p in block.parameters() if p.grad is not None) ** 0.5
    assert norm == pytest.approx(float(record["grads"]["param_grad_norm"]), rel=2e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention_max_heads", {}),
        ("attention_heads_subln", {"heads": 4, "dim_inner": 32, "sub_norm": True}),
        ("attention_ablate_state_transition", {"heads": 4, "swish_gate": False, "transition": False}),
    ],
)
def test_upstreams_gate_loops_give_upstreams_numbers(name: str, options: dict[str, Any]) -> None:
    record = read(name)
    block = GateLoopAttention(24, **options)
    weights = looped(record["state_dict"])
    if block.to_a is None:
        weights = {key: value for key, value in weights.items() if not key.startswith("to_a")}
    block.load_state_dict(weights)
    check(block, record)


def rms_as_upstream(norm: nn.Module) -> None:
    """Upstream's norm has no eps to speak of."""
    for module in norm.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-12


@pytest.mark.parametrize("name", ["simple", "simple_reverse_postln"])
def test_upstreams_simple_layers_give_upstreams_numbers(name: str) -> None:
    record = read(name)
    old, reverse = record["state_dict"], "reverse" in name
    block = SimpleGateLoop(24, reverse=reverse, post_norm=reverse)
    rms_as_upstream(block)
    new = {"norm.weight": old["norm.gamma"], "to_qkva.weight": old["to_qkva.0.weight"]}
    if reverse:
        new |= {"post_norm.weight": old["maybe_post_ln.weight"], "post_norm.bias": old["maybe_post_ln.bias"]}
    block.load_state_dict(new)
    check(block, record)


@pytest.mark.parametrize("name", ["full_attention_rotary_gated", "full_attention_unnormalized"])
def test_upstreams_full_attention_gives_upstreams_numbers(name: str) -> None:
    record = read(name)
    old, turned = record["state_dict"], "rotary" in name
    rotary = Rotary(8, freqs=old["rotary_emb.freqs"].tolist()) if turned else None
    block = RelativeGateAttention(
        24, heads=3, dim_head=8, transition=False, out_bias=True, softmax=turned, swish_gate=turned, rotary=rotary
    )
    block.load_state_dict(looped(old))
    x = record["inputs"]["x"].requires_grad_()
    out = block(x)
    assert relative_error(out, record["outputs"]["out"]) < 1e-5
    (gradient,) = torch.autograd.grad((out * record["cotangents"]["out"]).sum(), x)
    assert relative_error(gradient, record["grads"]["input:x"]) < 1e-4


def test_upstreams_language_model_gives_upstreams_numbers() -> None:
    record = read("transformer")
    old = record["state_dict"]
    model = gate_loop_lm(num_tokens=41, dim=24, depth=2)
    rms_as_upstream(model)
    new = {"token_embedding.weight": old["token_emb.weight"], "to_logits.weight": old["to_logits.1.weight"]}
    loops = [name for name, part in model.named_modules() if isinstance(part, GateLoopAttention)]
    for layer, name in enumerate(loops):
        new |= {f"{name}.{key}": value for key, value in looped(old, f"layers.{layer}.0.fn.").items()}
    norms = [name for name, part in model.named_modules() if isinstance(part, RMSNorm)]
    gammas = [f"layers.{layer}.{branch}.norm.gamma" for layer in range(2) for branch in range(2)]
    new |= {f"{name}.weight": old[key] for name, key in zip(norms, [*gammas, "to_logits.0.gamma"], strict=True)}
    feeds = [key for key in model.state_dict() if key not in new]  # weights and biases of the feedforwards, in order
    theirs = [
        f"layers.{layer}.1.fn.{part}.{kind}" for layer in range(2) for part in (0, 2) for kind in ("weight", "bias")
    ]
    new |= {key: old[name] for key, name in zip(feeds, theirs, strict=True)}
    model.load_state_dict(new)
    check(model, record)


@pytest.mark.parametrize("name", ["gate_loop", "simple_gate_loop"])
def test_the_state_has_one_size_however_many_tokens_came_before(name: str) -> None:
    block = BLOCKS[name](16)
    with torch.no_grad():
        _, short = block.step(torch.randn(2, 3, 16))
        _, long = block.step(torch.randn(2, 500, 16), short)
    assert short.nbytes == long.nbytes
    assert (short.length, long.length) == (3, 503)


@pytest.mark.parametrize("heads", [None, 4])
def test_masked_tokens_leave_the_recurrent_state_unchanged(heads: int | None) -> None:
    block = GateLoopAttention(16, heads=heads)
    with torch.no_grad():
        _, state = block.step(torch.randn(2, 5, 16))
        _, later = block.step(torch.randn(2, 70, 16), state, mask=torch.zeros(2, 70, dtype=torch.bool))
    torch.testing.assert_close(later.memory, state.memory, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sub_norm", [False, True])
def test_a_block_keeps_less_than_eight_times_its_input_for_backward(sub_norm: bool) -> None:
    block, x = GateLoopAttention(64, sub_norm=sub_norm), torch.randn(1, 256, 64, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *block.parameters())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    assert out.requires_grad
    assert 6.9 < sum(kept.values()) / x.nbytes < 7.1  # q, k, v, z twice as wide, what the loop gives, the swish gate


@pytest.mark.parametrize("heads", [None, 4])
def test_a_run_over_100_000_tokens_in_pieces_equals_the_whole(heads: int | None) -> None:
    block, x, state, pieces = GateLoopAttention(8, heads=heads), torch.randn(1, 100_000, 8), None, []
    with torch.no_grad():
        whole = block(x)
        for part in x.split(9973, 1):
            out, state = block.step(part, state)
            pieces.append(out)
    assert bool(whole.isfinite().all())
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-5


def test_relative_gates_give_outputs_of_order_one_at_4096_tokens() -> None:
    with torch.no_grad():
        out = RelativeGateAttention(16, heads=1, dim_head=8).mix(torch.randn(1, 4096, 16)).mixed
    assert 1e-3 < float(out.abs().max()) < 10


def test_the_gradient_fraction_scales_the_gradient_to_the_gates_alone() -> None:
    grads = []
    for fraction in (1.0, 0.25):
        torch.manual_seed(0)
        block = GateLoopAttention(16, heads=4, gradient_fraction=fraction)
        block(torch.randn(2, 9, 16)).square().sum().backward()
        grads.append((block.to_a.weight.grad, block.to_k.weight.grad))
    torch.testing.assert_close(grads[1][0], 0.25 * grads[0][0])
    torch.testing.assert_close(grads[1][1], grads[0][1])


def test_the_real_gates_error_under_autocast_is_that_of_rounding_its_inputs() -> None:
    block = GateLoopAttention(32, heads=8, real_gate=True, swish_gate=False)
    x = torch.randn(3, 67, 32)
    rounded = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
        exact, rounded_exactly = block.double()(x.double()), rounded.double()(x.bfloat16().double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = block.float()(x)
    assert relative_error(got, rounded_exactly) < 1e-2
    assert relative_error(rounded_exactly, exact) > 2e-2  # the gate jumps from -1/2 to 1/2 where z changes its sign


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="heads must divide dim_inner, got heads=5, dim_inner=16"):
        GateLoopAttention(16, heads=5)
    with pytest.raises(ValueError, match=r"gradient_fraction must lie in \[0, 1\], got gradient_fraction=1.5"):
        GateLoopAttention(16, gradient_fraction=1.5)
    with pytest.raises(ValueError, match=r"dim_head must be even.*got dim_head=7"):
        RelativeGateAttention(16, dim_head=7)
    with pytest.raises(ValueError, match="step needs a block built with reverse=False, got reverse=True"):
        SimpleGateLoop(16, reverse=True).step(torch.randn(1, 2, 16))
