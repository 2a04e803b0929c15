"""gateloop-transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.interop.formulas.common import (
    Weights,
    gelu,
    heads,
    layer_norm,
    linear,
    merge,
    next_token_loss,
    past,
    rotate,
    softmax,
)

PACKAGE = "gateloop-transformer"


def rms(x: Tensor, gamma: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12) * x.shape[-1] ** 0.5 * gamma


def loop_shapes(a: dict[str, Any], p: str = "") -> dict[str, Any]:
    d = a["dim"]
    inner = a.get("dim_inner") or d
    h = a.get("heads") or inner
    swish = a.get("add_swish_gating", True)
    shapes: dict[str, Any] = {
        f"{p}to_qkv.weight": (3 * inner, d),
        f"{p}to_a.0.weight": (2 * h, d),
        f"{p}to_a.0.bias": (2 * h,),
    }
    if a.get("sub_ln"):
        shapes |= {f"{p}maybe_sub_ln.weight": (inner,), f"{p}maybe_sub_ln.bias": (inner,)}
    if swish:
        shapes[f"{p}to_gates.0.weight"] = (inner, d)
    if swish or inner != d:
        shapes[f"{p}to_out.weight"] = (d, inner)
    return shapes


def loop(w: Weights, p: str, x: Tensor, a: dict[str, Any]) -> Tensor:
    q, k, v = linear(w, f"{p}to_qkv", x).chunk(3, -1)
    h = a.get("heads") or q.shape[-1]
    q, k, v = (heads(part, h) for part in (q, k, v))
    z = linear(w, f"{p}to_a.0", x).view(*x.shape[:2], h, 2).transpose(1, 2)
    fraction = a.get("frac_gradient_state_transition", 0.9)
    z = z * fraction + z.detach() * (1 - fraction)
    if a.get("ablate_complex"):
        z = torch.stack((z[..., 0], torch.zeros_like(z[..., 0])), -1)
    z = torch.view_as_complex(z.contiguous())
    gate = z.abs().sigmoid() * z / z.abs()
    if a.get("ablate_state_transition"):
        gate = torch.ones_like(gate)
    state, rows = torch.zeros(*q.shape[:2], q.shape[-1], q.shape[-1], dtype=gate.dtype), []
    for t in range(x.shape[1]):
        state = gate[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ state.real)[:, :, 0])
    y = merge(torch.stack(rows, 2))
    if a.get("sub_ln"):
        y = layer_norm(w, f"{p}maybe_sub_ln", y)
    if a.get("add_swish_gating", True):
        gates = linear(w, f"{p}to_gates.0", x)
        y = y * gates * gates.sigmoid()
    return linear(w, f"{p}to_out", y) if f"{p}to_out.weight" in w else y


def full_shapes(a: dict[str, Any], p: str = "") -> dict[str, Any]:
    d, e = a["dim"], a.get("dim_head", 64)
    inner = a.get("heads", 8) * e
    shapes: dict[str, Any] = {
        f"{p}to_qkv.0.weight": (3 * inner, d),
        f"{p}to_out.1.weight": (d, inner),
        f"{p}to_out.1.bias": (d,),
    }
    if a.get("rotary_emb"):
        shapes[f"{p}rotary_emb.freqs"] = "frequencies", e // 2
    if a.get("data_dependent_rel_pos"):
        shapes[f"{p}to_a.0.weight"] = (inner, d)
    if a.get("add_swish_gating"):
        shapes[f"{p}to_gates.0.weight"] = (inner, d)
    return shapes


def full(w: Weights, p: str, x: Tensor, a: dict[str, Any]) -> Tensor:
    q, k, v = (heads(part, a.get("heads", 8)) for part in linear(w, f"{p}to_qkv.0", x).chunk(3, -1))
    if a.get("rotary_emb"):
        angle = torch.arange(x.shape[1])[:, None] * w[f"{p}rotary_emb.freqs"]
        q, k = rotate(q, angle), rotate(k, angle)
    scores, allowed = q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2), past(x.shape[1])
    raw = a.get("data_dependent_rel_pos") if a.get("softmax_normalize") is None else not a["softmax_normalize"]
    y = merge((scores.masked_fill(~allowed, 0) if raw else softmax(scores, allowed)) @ v)
    if a.get("add_swish_gating"):
        gates = linear(w, f"{p}to_gates.0", x)
        y = y * gates * gates.sigmoid()
    return linear(w, f"{p}to_out.1", y)


def simple_shapes(a: dict[str, Any]) -> dict[str, Any]:
    d = a["dim"]
    shapes: dict[str, Any] = {"to_qkva.0.weight": (3 * d, d)}
    if a.get("prenorm", True):
        shapes["norm.gamma"] = (d,)
    if a.get("post_ln"):
        shapes |= {"maybe_post_ln.weight": (d,), "maybe_post_ln.bias": (d,)}
    return shapes


def run_simple(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    x = inputs["x"].flip(1) if a.get("reverse") else inputs["x"]
    q, kv, gate = linear(w, "to_qkva.0", rms(x, w["norm.gamma"]) if a.get("prenorm", True) else x).chunk(3, -1)
    state, rows = torch.zeros_like(kv[:, 0]), []
    for t in range(x.shape[1]):
        state = gate[:, t].sigmoid() * state + kv[:, t]
        rows.append(q[:, t] * state)
    y = torch.stack(rows, 1)
    y = layer_norm(w, "maybe_post_ln", y) if a.get("post_ln") else y
    return {"out": y.flip(1) if a.get("reverse") else y}


def mixer(a: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Shapes, formula and arguments of the transformer's attention layer."""
    swish = a.get("attn_add_swish_gating", True)
    if a.get("use_gate_looped_attn", True):
        names = ("sub_ln", "frac_gradient_state_transition", "ablate_complex", "ablate_state_transition")
        arguments = {name: a[name] for name in names if name in a}
        sizes = {"dim_inner": a.get("dim_gate_looped_attn"), "heads": a.get("gate_loop_heads")}
        return loop_shapes, loop, {"dim": a["dim"], "add_swish_gating": swish, **sizes, **arguments}
    names = ("dim", "heads", "dim_head", "rotary_emb", "data_dependent_rel_pos")
    sizes = {name: a[name] for name in names if name in a}
    softmaxed = {"softmax_normalize": a.get("attn_softmax_normalize")}
    return full_shapes, full, {"add_swish_gating": swish, **sizes, **softmaxed}


def transformer_shapes(a: dict[str, Any]) -> dict[str, Any]:
    d, v, post = a["dim"], a["num_tokens"], a.get("post_ln_norm", False)
    hidden = int(d * a.get("ff_mult", 4))
    shapes_of, _, arguments = mixer(a)
    shapes: dict[str, Any] = {"token_emb.weight": (v, d)}
    for layer in range(a["depth"]):
        p = f"layers.{layer}."
        shapes |= shapes_of(arguments, f"{p}0.fn.")
        shapes |= {f"{p}1.fn.0.weight": (hidden, d), f"{p}1.fn.0.bias": (hidden,)}
        shapes |= {f"{p}1.fn.2.weight": (d, hidden), f"{p}1.fn.2.bias": (d,)}
        for place in (0, 1):
            if post:
                shapes |= {f"{p}{place}.norm.weight": (d,), f"{p}{place}.norm.bias": (d,)}
            else:
                shapes[f"{p}{place}.norm.gamma"] = (d,)
    if post:
        return shapes | {"to_logits.weight": (v, d)}
    return shapes | {"to_logits.0.gamma": (d,), "to_logits.1.weight": (v, d)}


def run_transformer(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    _, mix, arguments = mixer(a)
    tokens, post = inputs["x"], a.get("post_ln_norm", False)
    x = w["token_emb.weight"][tokens[:, :-1] if options.get("return_loss") else tokens]
    for layer in range(a["depth"]):
        for place in (0, 1):
            p = f"layers.{layer}.{place}."
            y = x if post else rms(x, w[f"{p}norm.gamma"])
            y = linear(w, f"{p}fn.2", gelu(linear(w, f"{p}fn.0", y))) if place else mix(w, f"{p}fn.", y, arguments)
            x = layer_norm(w, f"{p}norm", x + y) if post else x + y
    logits = linear(w, "to_logits", x) if post else linear(w, "to_logits.1", rms(x, w["to_logits.0.gamma"]))
    return {"out": next_token_loss(logits, tokens[:, 1:]) if options.get("return_loss") else logits}


CLASSES = {
    "GateLoopedAttention": (loop_shapes, lambda w, i, a, o: {"out": loop(w, "", i["x"], {**a, **o})}),
    "CausalFullAttention": (full_shapes, lambda w, i, a, o: {"out": full(w, "", i["x"], a)}),
    "SimpleGateLoopLayer": (simple_shapes, run_simple),
    "Transformer": (
        transformer_shapes,
        lambda w, i, a, o: run_transformer(w, i, {**a, **{k: v for k, v in o.items() if v is not None}}, o),
    ),
}
