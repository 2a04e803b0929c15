"""Loaded modules equal explicit formulas over the upstream weight names, for every class and option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.formulas import cosine, dalle, gateloop, memformer, quartic
from tests.interop.replay import replay
from tests.interop.test_parity import RECORDS, check

FORMULAS = {
    (module.PACKAGE, cls): found for module in (cosine, dalle, gateloop, memformer, quartic)
    for cls, found in module.CLASSES.items()
}  # fmt: skip


def draw(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights, norms near 1; a name in place of a shape repeats that tensor."""
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if shape == "one number":
            weights[name] = torch.full((7,), 0.8)
        elif shape == "buffer":
            weights[name] = torch.randn(3)
        elif isinstance(shape, str):
            weights[name] = weights[shape]
        elif shape and shape[0] == "frequencies":
            weights[name] = torch.rand(shape[1])
        else:
            near_one = len(shape) == 1 and not name.endswith("bias")
            weights[name] = torch.randn(shape) * 0.3 + float(near_one)
    return weights


def run(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the outputs and gradients of the formulas."""
    meta, options = record["meta"], record["meta"]["forward_kwargs"]
    arguments = {**meta["kwargs"], **record["ctor_tensors"]}
    _, formula = FORMULAS[meta["package"], meta["cls"]]
    constant = ("rotary_emb.freqs", "fn.0.scale")  # not trained, or excluded from the gradient norm
    leaves: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in record["state_dict"].items():
        leaf = leaves.setdefault(id(tensor), tensor.clone())
        weights[name] = leaf.requires_grad_(not name.endswith(constant))
    inputs = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in record["inputs"].items()
    }
    outputs = formula(weights, inputs, arguments, options)
    cotangents = record.get("cotangents") or {name: torch.randn_like(out) for name, out in outputs.items()}
    cotangents = {name: tensor.masked_fill(outputs[name] < -1e30, 0) for name, tensor in cotangents.items()}
    sum((outputs[name].clamp(min=-1e30) * cotangent).sum() for name, cotangent in cotangents.items()).backward()
    grads = {f"input:{name}": tensor.grad for name, tensor in inputs.items() if tensor.requires_grad}
    squares = [leaf.grad.double().square().sum() for leaf in leaves.values() if leaf.grad is not None]
    grads["param_grad_norm"] = torch.stack(squares).sum().sqrt()
    outputs = {name: out.detach() for name, out in outputs.items()}
    return {**record, "outputs": outputs, "cotangents": cotangents, "grads": grads}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_formulas_reproduce_the_recorded_numbers(path: Path) -> None:
    record = torch.load(path, weights_only=True)
    computed = run({"ctor_tensors": {}, **record})
    check(
        {"outputs": {name: computed["outputs"][name] for name in record["outputs"]}, "grads": computed["grads"]}, record
    )


SMALL = {"dim": 24, "heads": 3, "dim_head": 8}
QUARTIC = {**SMALL, "num_streams": 2}
STREAMS = {"dim": 24, "num_tokens": 41, "depth": 2, "heads": 3, "dim_head": 8, "max_seq_len": 70}
COSINE = {"num_tokens": 41, "dim": 24, "max_seq_len": 80, "depth": 3, "heads": 3, "dim_head": 8}
LOOPS = {"dim": 24, "num_tokens": 41, "depth": 2, "heads": 3, "dim_head": 8}
ENCODER = {"dim": 24, "num_memory_slots": 5, "enc_num_tokens": 41, "enc_depth": 2, "enc_heads": 3}
SEQ2SEQ = {**ENCODER, "dec_num_tokens": 37, "dec_depth": 1, "dec_heads": 2, "mem_update_attn_heads": 4}
IMAGE = {**SMALL, "seq_len": 31, "image_size": 5}
WIDE = {**SMALL, "seq_len": 266, "image_size": 16}
BODY = {"dim": 24, "depth": 3, "heads": 3, "dim_head": 9, "seq_len": 31, "image_fmap_size": 5}
ALL = ["full", "axial_row", "axial_col", "conv_like"]
DALLE = {
    "dim": 24, "num_image_tokens": 17, "image_fmap_size": 4, "num_text_tokens": 31, "text_seq_len": 6, "depth": 3,
    "heads": 3, "dim_head": 9,
}  # fmt: skip
X = {"x": (2, 19, 24)}
LONG = {"x": (2, 67, 24)}
ROWS = {"x": (4, 19, 24)}
TOKENS = {"x": "tokens"}
BOTH = {"text": "text", "image": 16}

CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("quartic-transformer", "Attention", {**QUARTIC, "pre_talking_heads": True}, ROWS, {}),
    ("quartic-transformer", "Attention", {**QUARTIC, "post_talking_heads": True, "causal": True}, ROWS, {}),
    ("quartic-transformer", "Attention", QUARTIC, {**ROWS, "mask": "streams"}, {}),
    ("quartic-transformer", "Attention", {**SMALL, "num_streams": 1, "pre_talking_heads": True}, X, {}),
    (
        "quartic-transformer", "Attention",
        {**SMALL, "num_streams": 3, "pre_talking_heads": True, "post_talking_heads": True,
         "non_linear_talking_heads": True, "causal": True},
        {"x": (6, 66, 24)}, {},
    ),
    ("quartic-transformer", "MultiStreamTransformer", STREAMS, TOKENS, {}),
    ("quartic-transformer", "MultiStreamTransformer", {**STREAMS, "num_streams": 4, "ff_mult": 2}, TOKENS, {}),
    (
        "quartic-transformer", "MultiStreamTransformer",
        {**STREAMS, "num_streams": 6, "non_linear_talking_heads": True, "separate_stream_emb": False},
        {**TOKENS, "mask": (2, 19)}, {},
    ),
    (
        "quartic-transformer", "MultiStreamTransformer",
        {**STREAMS, "num_streams": 3, "ablate_cross_stream_talking_heads": True}, TOKENS, {},
    ),
    (
        "quartic-transformer", "MultiStreamTransformer",
        {**STREAMS, "ablate_cross_stream_talking_heads": True, "separate_stream_emb": False},
        {**TOKENS, "mask": (2, 19)}, {},
    ),
    (
        "quartic-transformer", "MultiStreamTransformer",
        {**STREAMS, "non_linear_talking_heads": True, "pre_talking_heads": False}, {**TOKENS, "mask": "streams"}, {},
    ),
    ("flash-cosine-sim-attention", "Attention", {**SMALL, "scale": 3.0, "l2norm_groups": 2}, LONG, {}),
    ("flash-cosine-sim-attention", "Attention", {**SMALL, "non_cosine_sim_attn": True, "pre_norm": True}, X, {}),
    ("flash-cosine-sim-attention", "CosineSimCausalTransformer", {**COSINE, "attn_scale": 2}, TOKENS, {}),
    (
        "flash-cosine-sim-attention", "CosineSimCausalTransformer", {**COSINE, "non_cosine_sim_attn": True}, TOKENS,
        {"return_loss": True},
    ),
    ("flash-cosine-sim-attention", "CosineSimCausalTransformer", {**COSINE, "pre_norm": True}, TOKENS, {}),
    ("gateloop-transformer", "GateLoopedAttention", {"dim": 24, "add_swish_gating": False}, LONG, {}),
    ("gateloop-transformer", "GateLoopedAttention", {"dim": 24, "dim_inner": 12, "sub_ln": True}, X, {}),
    ("gateloop-transformer", "GateLoopedAttention", {"dim": 24, "heads": 3}, LONG, {"ablate_complex": True}),
    ("gateloop-transformer", "GateLoopedAttention", {"dim": 24}, X, {"ablate_complex": True}),
    ("gateloop-transformer", "GateLoopedAttention", {"dim": 24}, X, {"ablate_state_transition": True}),
    (
        "gateloop-transformer", "GateLoopedAttention",
        {"dim": 24, "heads": 2, "dim_inner": 12, "add_swish_gating": False, "frac_gradient_state_transition": 0.3},
        X, {},
    ),
    ("gateloop-transformer", "CausalFullAttention", SMALL, X, {"ablate_complex": True}),
    ("gateloop-transformer", "CausalFullAttention", {**SMALL, "rotary_emb": True}, LONG, {}),
    ("gateloop-transformer", "CausalFullAttention", {**SMALL, "dim_head": 5, "add_swish_gating": True}, X, {}),
    (
        "gateloop-transformer", "CausalFullAttention",
        {**SMALL, "softmax_normalize": False, "rotary_emb": True, "add_swish_gating": True}, X, {},
    ),
    ("gateloop-transformer", "SimpleGateLoopLayer", {"dim": 24, "prenorm": False, "post_ln": True}, LONG, {}),
    ("gateloop-transformer", "SimpleGateLoopLayer", {"dim": 24, "reverse": True}, X, {}),
    ("gateloop-transformer", "Transformer", {**LOOPS, "gate_loop_heads": 4, "sub_ln": True}, TOKENS, {}),
    (
        "gateloop-transformer", "Transformer",
        {**LOOPS, "dim_gate_looped_attn": 36, "post_ln_norm": True, "attn_add_swish_gating": False}, TOKENS,
        {"return_loss": True},
    ),
    ("gateloop-transformer", "Transformer", {**LOOPS, "ablate_complex": True, "ff_mult": 2}, TOKENS, {}),
    (
        "gateloop-transformer", "Transformer", {**LOOPS, "ablate_complex": True}, TOKENS,
        {"ablate_complex": False, "ablate_state_transition": True},
    ),
    (
        "gateloop-transformer", "Transformer",
        {**LOOPS, "use_gate_looped_attn": False, "attn_softmax_normalize": False}, TOKENS, {},
    ),
    (
        "gateloop-transformer", "Transformer",
        {**LOOPS, "use_gate_looped_attn": False, "rotary_emb": True, "attn_add_swish_gating": False}, TOKENS,
        {"return_loss": True},
    ),
    (
        "gateloop-transformer", "CausalFullAttention", {**SMALL, "data_dependent_rel_pos": True}, X,
        {"ablate_state_transition": True},
    ),
    (
        "gateloop-transformer", "CausalFullAttention",
        {**SMALL, "data_dependent_rel_pos": True, "softmax_normalize": True, "rotary_emb": True}, LONG,
        {"ablate_state_transition": True},
    ),
    (
        "gateloop-transformer", "Transformer",
        {**LOOPS, "use_gate_looped_attn": False, "data_dependent_rel_pos": True, "ablate_state_transition": True},
        TOKENS, {},
    ),
    ("memformer", "Attention", {"dim": 24, "causal": True}, {"x": (2, 1, 24), "context": (2, 5, 24)}, {}),
    ("memformer", "Attention", {"dim": 24, "causal": True}, {**X, "context": (2, 19, 24)}, {}),
    (
        "memformer", "Attention", {"dim": 24, "causal": True}, {"x": (2, 1, 24), "context": (2, 5, 24)},
        {"attend_self": True},
    ),
    ("memformer", "Attention", {"dim": 24, "heads": 3, "causal": True}, {**X, "query_mask": (2, 19)}, {}),
    ("memformer", "Attention", {"dim": 24, "heads": 2}, {**X, "context": (2, 7, 24), "query_mask": (2, 19)}, {}),
    (
        "memformer", "Attention", {"dim": 24, "heads": 3},
        {**X, "context": (2, 7, 24), "kv_mask": (2, 7), "mask": (2, 19, 7)}, {},
    ),
    ("memformer", "Attention", {"dim": 24}, {**X, "context": (2, 7, 24)}, {"attend_self": True}),
    ("memformer", "Memformer", {**ENCODER, "encoder_only": True, "num_mem_updates": 3}, {"src": "tokens"}, {}),
    ("memformer", "Memformer", {**ENCODER, "encoder_only": True, "num_mem_updates": 0}, {"src": "tokens"}, {}),
    (
        "memformer", "Memformer", {**SEQ2SEQ, "num_mem_updates": 0},
        {"src": "tokens", "tgt": "target", "src_mask": "empty row", "mems": (2, 5, 24)}, {},
    ),
    (
        "memformer", "Memformer", {**ENCODER, "encoder_only": True},
        {"src": "tokens", "src_mask": "empty row", "mems": (2, 5, 24)}, {},
    ),
    ("memformer", "Memformer", SEQ2SEQ, {"src": "tokens", "tgt": "target", "src_mask": (2, 19)}, {}),
    (
        "memformer", "Memformer", SEQ2SEQ,
        {"src": "long tokens", "tgt": "target", "src_mask": (2, 140), "tgt_mask": (2, 17)}, {},
    ),
    ("memformer", "Memformer", SEQ2SEQ, {"src": "tokens", "tgt": "target", "tgt_mask": (2, 16)}, {}),
    ("DALLE-pytorch", "Attention", {**SMALL, "seq_len": 40, "causal": False}, {**X, "mask": "padded"}, {}),
    ("DALLE-pytorch", "Attention", {**SMALL, "seq_len": 40, "static_mask": 40}, X, {}),
    ("DALLE-pytorch", "SparseConvCausalAttention", IMAGE, {"x": (2, 31, 24)}, {}),
    ("DALLE-pytorch", "SparseConvCausalAttention", {**IMAGE, "kernel_size": 3, "dilation": 2}, X, {}),
    ("DALLE-pytorch", "SparseConvCausalAttention", {**IMAGE, "stable": True}, {"x": (2, 4, 24)}, {}),
    ("DALLE-pytorch", "SparseAxialCausalAttention", {**IMAGE, "axis": 1}, {"x": (2, 28, 24)}, {}),
    ("DALLE-pytorch", "SparseAxialCausalAttention", WIDE, {"x": (1, 266, 24)}, {}),
    ("DALLE-pytorch", "SparseConvCausalAttention", WIDE, {"x": (1, 266, 24)}, {}),
    ("DALLE-pytorch", "Transformer", {**BODY, "attn_types": ALL, "reversible": True}, {"x": (2, 31, 24)}, {}),
    (
        "DALLE-pytorch", "Transformer",
        {**BODY, "attn_types": ALL, "reversible": True, "shift_tokens": True, "sandwich_norm": True,
         "shared_ff_ids": [0, 1]},
        {"x": (2, 25, 24)}, {},
    ),
    (
        "DALLE-pytorch", "Transformer",
        {**BODY, "attn_types": ["full", "conv_like"], "shared_attn_ids": [0, 1], "shared_ff_ids": [0], "ff_mult": 2},
        X, {},
    ),
    ("DALLE-pytorch", "Transformer", {**BODY, "attn_types": "sparse", "shift_tokens": True}, {"x": (2, 31, 24)}, {}),
    ("DALLE-pytorch", "Transformer", {**BODY, "causal": False, "attn_types": ["full", "axial_col"]}, X, {}),
    (
        "DALLE-pytorch", "Transformer",
        {"dim": 24, "depth": 2, "heads": 3, "dim_head": 8, "seq_len": 30, "rotary_emb": False}, X, {},
    ),
    ("DALLE-pytorch", "Transformer", {**BODY, "depth": 1, "attn_types": ALL, "dim_head": 16}, {"x": (1, 7, 24)}, {}),
    ("DALLE-pytorch", "DALLE", {**DALLE, "stable": True, "attn_types": ALL}, BOTH, {}),
    ("DALLE-pytorch", "DALLE", {**DALLE, "stable": True, "reversible": True}, BOTH, {"return_loss": True}),
    ("DALLE-pytorch", "DALLE", {**DALLE, "share_input_output_emb": True}, {"text": "text", "image": 5}, {}),
    ("DALLE-pytorch", "DALLE", {**DALLE, "share_input_output_emb": True}, BOTH, {"return_loss": True}),
    ("DALLE-pytorch", "DALLE", {**DALLE, "rotary_emb": False, "sandwich_norm": True}, {"text": "text"}, {}),
    (
        "DALLE-pytorch", "DALLE",
        {**DALLE, "shift_tokens": False, "shared_attn_ids": [0, 1, 0], "shared_ff_ids": [2, 1], "loss_img_weight": 3},
        BOTH, {"return_loss": True},
    ),
]  # fmt: skip


def make_input(name: str, shape: Any, arguments: dict[str, Any]) -> Tensor:
    if shape in ("tokens", "long tokens"):
        return torch.randint(41, (2, 19 if shape == "tokens" else 140))
    if shape == "target":
        return torch.randint(37, (2, 17))
    if shape == "text":
        text = torch.randint(1, 31, (2, 6))
        text[0, 3:] = 0  # padding
        return text
    if name == "image":
        return torch.randint(17, (2, shape))
    if shape == "padded":  # longer than x; the first entries are used
        return torch.rand(2, 40) < 0.7
    if shape == "streams":
        return (torch.rand(2, 19) < 0.7).repeat_interleave(2, 0)
    if shape == "empty row":
        return torch.tensor([[False] * 19, [True] * 12 + [False] * 7])
    return torch.rand(shape) < 0.7 if "mask" in name else torch.randn(shape)


@pytest.mark.parametrize(("package", "cls", "arguments", "inputs", "options"), CASES)
def test_a_loaded_module_equals_the_formulas_of_its_class(
    package: str, cls: str, arguments: dict[str, Any], inputs: dict[str, Any], options: dict[str, Any]
) -> None:
    tensors = {name: torch.rand(size, size) < 0.8 for name, size in arguments.items() if name == "static_mask"}
    for tensor in tensors.values():
        tensor.fill_diagonal_(True)  # a row without any key is 0 here, and was a mean there
    plain = {name: value for name, value in arguments.items() if name not in tensors}
    shapes, _ = FORMULAS[package, cls]
    made = {name: make_input(name, shape, arguments) for name, shape in inputs.items()}
    if package == "quartic-transformer" and "mask" in made:
        made["mask"][:, 0] = True  # as above
    record = {
        "meta": {"package": package, "cls": cls, "kwargs": plain, "forward_kwargs": options},
        "state_dict": draw(shapes(plain)),
        "inputs": made,
        "ctor_tensors": tensors,
    }
    want = run(record)
    check(replay(want), want)
