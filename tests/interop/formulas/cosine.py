"""flash-cosine-sim-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.formulas import unit_slices
from tests.interop.formulas.common import (
    Weights,
    gelu,
    heads,
    layer_norm,
    linear,
    merge,
    next_token_loss,
    past,
    softmax,
)

PACKAGE = "flash-cosine-sim-attention"


def attention_shapes(a: dict[str, Any], p: str = "") -> dict[str, Any]:
    d, inner = a["dim"], a.get("heads", 8) * a.get("dim_head", 64)
    shapes: dict[str, Any] = {f"{p}to_{name}.weight": (inner, d) for name in "qkv"}
    if a.get("pre_norm"):
        shapes |= {f"{p}norm.weight": (d,), f"{p}norm.bias": (d,)}
    return shapes | {f"{p}to_out.weight": (d, inner)}


def attend(w: Weights, p: str, x: Tensor, a: dict[str, Any], scale: float, groups: int) -> Tensor:
    if a.get("pre_norm"):
        x = layer_norm(w, f"{p}norm", x)
    q, k, v = (heads(linear(w, f"{p}to_{name}", x), a.get("heads", 8)) for name in "qkv")
    if a.get("non_cosine_sim_attn"):
        scale = q.shape[-1] ** -0.5
    else:
        q, k = unit_slices(q, groups, 1e-12), unit_slices(k, groups, 1e-12)
    return linear(w, f"{p}to_out", merge(softmax(scale * q @ k.transpose(-1, -2), past(x.shape[1])) @ v))


def run_attention(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    return {"out": attend(w, "", inputs["x"], a, a.get("scale", 8), a.get("l2norm_groups", 1))}


def transformer_shapes(a: dict[str, Any]) -> dict[str, Any]:
    d, v, pre = a["dim"], a["num_tokens"], a.get("pre_norm", False)
    shapes: dict[str, Any] = {"token_emb.weight": (v, d), "pos_emb.weight": (a["max_seq_len"], d)}
    for layer in range(a["depth"]):
        p = f"layers.{layer}."
        shapes |= attention_shapes(a, f"{p}0.")
        shapes |= {f"{p}2.1.weight": (4 * d, d), f"{p}2.3.weight": (d, 4 * d)}
        for norm in ("2.0",) if pre else ("1", "3"):
            shapes |= {f"{p}{norm}.weight": (d,), f"{p}{norm}.bias": (d,)}
    if pre:
        shapes |= {"to_logits.0.weight": (d,), "to_logits.0.bias": (d,)}
    return shapes | {"to_logits.1.weight": (v, d)}


def run_transformer(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    tokens, pre = inputs["x"], a.get("pre_norm", False)
    read = tokens[:, :-1] if options.get("return_loss") else tokens
    x = w["token_emb.weight"][read] + w["pos_emb.weight"][: read.shape[1]]
    alpha = 1 if pre else (2 * a["depth"]) ** 0.25
    for layer in range(a["depth"]):
        p = f"layers.{layer}."
        x = attend(w, f"{p}0.", x, a, a.get("attn_scale", 8), 1) + alpha * x
        x = x if pre else layer_norm(w, f"{p}1", x)
        y = layer_norm(w, f"{p}2.0", x) if pre else x
        x = linear(w, f"{p}2.3", gelu(linear(w, f"{p}2.1", y))) + alpha * x
        x = x if pre else layer_norm(w, f"{p}3", x)
    logits = linear(w, "to_logits.1", layer_norm(w, "to_logits.0", x) if pre else x)
    return {"out": next_token_loss(logits, tokens[:, 1:]) if options.get("return_loss") else logits}


CLASSES = {
    "Attention": (attention_shapes, run_attention),
    "CosineSimCausalTransformer": (transformer_shapes, run_transformer),
}
