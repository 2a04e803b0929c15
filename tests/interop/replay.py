"""Replay of a record of an upstream package by the module that loads its weights.

A record holds the package, the class and its arguments, the weights, the inputs, the outputs, and the cotangents of
the outputs (the scalar that was differentiated is the sum of outputs times cotangents).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.attention.talking_heads import HeadMixer
from attention_zoo.interop import from_upstream

ABLATIONS = ("ablate_complex", "ablate_state_transition")  # arguments of forward upstream, of the constructor here


def replay(record: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The outputs and gradients of the loaded module, under the names in the record.

    Args:
        record: `meta`, `state_dict`, `inputs`, `outputs`, `cotangents`, and optionally `ctor_tensors`.

    Returns:
        `outputs`; and `grads`: the gradient of each float input, and the norm over all parameters in float64.
    """
    meta = record["meta"]
    options = dict(meta.get("forward_kwargs") or {})
    arguments = {**meta["kwargs"], **(record.get("ctor_tensors") or {})}
    arguments |= {name: options.pop(name) for name in ABLATIONS if options.get(name) is not None}
    options = {name: value for name, value in options.items() if name not in ABLATIONS}
    module = from_upstream(meta["package"], meta["cls"], record["state_dict"], **arguments)
    inputs = {name: tensor.clone() for name, tensor in record["inputs"].items()}
    floats = {name: tensor.requires_grad_() for name, tensor in inputs.items() if tensor.is_floating_point()}
    outputs = RUN[meta["package"], meta["cls"]](module, inputs, options)
    outputs = {name: outputs[name] for name in record["outputs"]}
    total = sum(
        (_finite(outputs[name], cotangent) * cotangent).sum() for name, cotangent in record["cotangents"].items()
    )
    grads = {}
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
        grads = {f"input:{name}": _gradient(tensor) for name, tensor in floats.items()}
        grads["param_grad_norm"] = _gradient_norm(module)
    return {"outputs": {name: tensor.detach() for name, tensor in outputs.items()}, "grads": grads}


def _finite(out: Tensor, cotangent: Tensor) -> Tensor:
    """Masked logits (-inf) as constants without a gradient."""
    return out.masked_fill(out < -1e30, 0.0) if out.is_floating_point() and cotangent.ndim else out


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _gradient_norm(module: nn.Module) -> Tensor:
    """Gradient norm over all parameters except the norms of non-linear talking heads, which the records exclude."""
    left_out = {id(part.norm) for part in module.modules() if isinstance(part, HeadMixer) and part.kind == "mlp"}
    squares = [
        parameter.grad.double().square().sum()
        for parameter in module.parameters()
        if parameter.grad is not None and id(parameter) not in left_out
    ]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


Run = Callable[[Any, dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]


def run_block(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """x and its mask; the first entries are used where the mask is longer."""
    _only(options)
    mask = inputs.get("mask")
    return {"out": module(inputs["x"], mask=None if mask is None else mask[:, : inputs["x"].shape[1]])}


def run_language_model(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, or the next-token loss."""
    _only(options, "return_loss")
    return {"out": module.loss(inputs["x"]) if options.get("return_loss") else module(inputs["x"])}


def run_talking_heads(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Rows (b s); the second output is the attention map before the mix after the softmax."""
    _only(options)
    block = module.block
    x, mask = inputs["x"], inputs.get("mask")
    rows = x if block.streams == 1 else x.view(-1, block.streams, *x.shape[1:])
    mask = None if mask is None else mask[:: block.streams]
    maps = module.attention_map(rows, mask=mask, mixed=False)
    return {"out": module(rows, mask=mask).view(x.shape), "out1": maps.reshape(x.shape[0], -1, *maps.shape[2:])}


def run_multi_stream(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Logits; a mask may have a row per stream. Upstream's diversity loss has no equivalent here."""
    _only({name: value for name, value in options.items() if value})
    mask = inputs.get("mask")
    if mask is not None and mask.shape[0] != inputs["x"].shape[0]:
        mask = mask[:: module.streams]
    return {"out": module(inputs["x"], mask=mask)}


def run_memformer_attention(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs are arguments of the same name."""
    return {"out": module(**inputs, **options)}


def run_memformer(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Features, memory, and with a target the loss."""
    _only(options)
    names = {"src": "source", "tgt": "target", "mems": "memory", "src_mask": "mask", "tgt_mask": "target_mask"}
    arguments = {names[name]: tensor for name, tensor in inputs.items()}
    output = module(**{name: tensor for name, tensor in arguments.items() if not name.startswith("target")})
    found = {"enc_out": output.encoded, "mem": output.memory}
    return {**found, "dec_out": module.loss(**arguments)} if "target" in arguments else found


def run_dalle(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, with the lowest finite number for tokens of the other kind, or the loss."""
    _only(options, "return_loss")
    if options.get("return_loss"):
        return {"out": module.loss(inputs["text"], inputs["image"])}
    logits = module(inputs["text"], inputs.get("image"))
    return {"out": logits.masked_fill(logits == -torch.inf, torch.finfo(logits.dtype).min)}


def _only(options: Mapping[str, Any], *known: str) -> None:
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"forward_kwargs must be of {known} to be replayed, got {name}={value!r}")


RUN: dict[tuple[str, str], Run] = {
    ("quartic-transformer", "Attention"): run_talking_heads,
    ("quartic-transformer", "MultiStreamTransformer"): run_multi_stream,
    ("flash-cosine-sim-attention", "Attention"): run_block,
    ("flash-cosine-sim-attention", "CosineSimCausalTransformer"): run_language_model,
    ("gateloop-transformer", "CausalFullAttention"): run_block,
    ("gateloop-transformer", "GateLoopedAttention"): run_block,
    ("gateloop-transformer", "SimpleGateLoopLayer"): run_block,
    ("gateloop-transformer", "Transformer"): run_language_model,
    ("memformer", "Attention"): run_memformer_attention,
    ("memformer", "Memformer"): run_memformer,
    ("DALLE-pytorch", "Attention"): run_block,
    ("DALLE-pytorch", "SparseConvCausalAttention"): run_block,
    ("DALLE-pytorch", "SparseAxialCausalAttention"): run_block,
    ("DALLE-pytorch", "Transformer"): run_block,
    ("DALLE-pytorch", "DALLE"): run_dalle,
}
