"""Run a record of an old package through the module that its weights become.

A record holds the package, the class and its arguments, the weights, the inputs, the outputs, and the cotangents with
which the outputs were multiplied before their sum was back-propagated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.attention.talking_heads import HeadMixer
from attention_zoo.interop import from_upstream

ABLATIONS = ("ablate_complex", "ablate_state_transition")  # of forward there, of the module here


def replay(record: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The outputs and gradients of our module, under the record's names.

    Args:
        record: `meta`, `state_dict`, `inputs`, `cotangents`, and where there are some `ctor_tensors`.

    Returns:
        `outputs`, and `grads`: of each float input, and the norm of all parameters' gradients in float64.
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
    """Forbidden logits are constants: -inf here, and no gradient."""
    return out.masked_fill(out < -1e30, 0.0) if out.is_floating_point() and cotangent.ndim else out


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _gradient_norm(module: nn.Module) -> Tensor:
    """Over all parameters but the norms of non-linear talking heads, which the records leave out."""
    left_out = {id(part.norm) for part in module.modules() if isinstance(part, HeadMixer) and part.kind == "mlp"}
    squares = [
        parameter.grad.double().square().sum()
        for parameter in module.parameters()
        if parameter.grad is not None and id(parameter) not in left_out
    ]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


Run = Callable[[Any, dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]


def run_block(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """x and its mask, whose first entries count where it is longer."""
    _only(options)
    mask = inputs.get("mask")
    return {"out": module(inputs["x"], mask=None if mask is None else mask[:, : inputs["x"].shape[1]])}


def run_language_model(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, or the loss of the next token."""
    _only(options, "return_loss")
    return {"out": module.loss(inputs["x"]) if options.get("return_loss") else module(inputs["x"])}


def run_talking_heads(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Rows (b s), the streams of one row beside each other; the map before the last mix is the second output."""
    _only(options)
    block = module.block
    x, mask = inputs["x"], inputs.get("mask")
    rows = x if block.streams == 1 else x.view(-1, block.streams, *x.shape[1:])
    mask = None if mask is None else mask[:: block.streams]
    maps = module.attention_map(rows, mask=mask, mixed=False)
    return {"out": module(rows, mask=mask).view(x.shape), "out1": maps.reshape(x.shape[0], -1, *maps.shape[2:])}


def run_multi_stream(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Logits; a mask may have a row per stream. The package's diversity loss, whose logarithm was none, is not ours."""
    _only({name: value for name, value in options.items() if value})
    mask = inputs.get("mask")
    if mask is not None and mask.shape[0] != inputs["x"].shape[0]:
        mask = mask[:: module.streams]
    return {"out": module(inputs["x"], mask=mask)}


def run_memformer_attention(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Every input is an argument of the same name."""
    return {"out": module(**inputs, **options)}


def run_memformer(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Features, memory, and the loss where there is a target."""
    _only(options)
    names = {"src": "source", "tgt": "target", "mems": "memory", "src_mask": "mask", "tgt_mask": "target_mask"}
    arguments = {names[name]: tensor for name, tensor in inputs.items()}
    output = module(**arguments)
    found = {"enc_out": output.encoded, "mem": output.memory}
    return found if output.logits is None else {**found, "dec_out": module.loss(**arguments)}


def run_dalle(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, the lowest number for those of the wrong kind, or the loss."""
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
