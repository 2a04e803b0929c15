"""quartic-transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.interop.formulas.common import Weights, gelu, heads, linear, past, softmax

PACKAGE = "quartic-transformer"


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale


def attention_shapes(a: dict[str, Any], p: str = "", *, streams: int | None = None) -> dict[str, Any]:
    d, h, e = a["dim"], a.get("heads", 8), a.get("dim_head", 64)
    c = h * (a["num_streams"] if streams is None else streams)
    shapes: dict[str, Any] = {
        f"{p}to_qkv.0.weight": (3 * h * e, d),
        f"{p}to_gates.0.weight": (h, d),
        f"{p}to_gates.0.bias": (h,),
        f"{p}rmsnorm.scale": (d,),
        f"{p}to_out.1.weight": (d, h * e),
    }
    for name in ("pre", "post"):
        if a.get(f"{name}_talking_heads", False):
            here = f"{p}{name}_talking_heads."
            if a.get("non_linear_talking_heads"):
                shapes |= {f"{here}fn.0.scale": "one number", f"{here}fn.1.weight": (2 * c, c, 1, 1)}
                shapes[f"{here}fn.4.weight"] = (c, 2 * c, 1, 1)
            else:
                shapes[f"{here}weight"] = (c, c, 1, 1)
    return shapes


def mix(w: Weights, p: str, maps: Tensor) -> Tensor:
    """(b, c, i, j)."""
    if f"{p}weight" in w:
        return torch.einsum("oc,bcij->boij", w[f"{p}weight"][:, :, 0, 0], maps)
    if f"{p}fn.1.weight" not in w:
        return maps
    unit = maps * (maps.square().mean(1, keepdim=True) + 1e-5).rsqrt() * w[f"{p}fn.0.scale"].flatten()[0]
    hidden = gelu(torch.einsum("oc,bcij->boij", w[f"{p}fn.1.weight"][:, :, 0, 0], unit))
    return maps + torch.einsum("oc,bcij->boij", w[f"{p}fn.4.weight"][:, :, 0, 0], hidden)


def attend(
    w: Weights, p: str, x: Tensor, mask: Tensor | None, a: dict[str, Any], streams: int
) -> tuple[Tensor, Tensor]:
    """Rows (b s)."""
    h, e, n = a.get("heads", 8), a.get("dim_head", 64), x.shape[1]
    x = rms(x, w[f"{p}rmsnorm.scale"])
    q, k, v = (heads(part, h) for part in linear(w, f"{p}to_qkv.0", x).chunk(3, -1))
    scores = (e**0.5 * q @ k.transpose(-1, -2)).reshape(-1, streams * h, n, n)
    scores = mix(w, f"{p}pre_talking_heads.", scores).reshape(-1, h, n, n)
    allowed = past(n) if a.get("causal") else torch.ones(n, n, dtype=torch.bool)
    allowed = allowed if mask is None else allowed & mask[:, None, None]
    maps = softmax(scores, allowed)
    mixed = mix(w, f"{p}post_talking_heads.", maps.reshape(-1, streams * h, n, n)).reshape(-1, h, n, n)
    gate = linear(w, f"{p}to_gates.0", x).sigmoid().transpose(1, 2)[..., None]
    out = (mixed @ v) * gate
    return linear(w, f"{p}to_out.1", out.transpose(1, 2).flatten(2)), maps


def run_attention(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    out, maps = attend(w, "", inputs["x"], inputs.get("mask"), a, a["num_streams"])
    return {"out": out, "out1": maps}


def with_defaults(a: dict[str, Any]) -> dict[str, Any]:
    return {"num_streams": 2, "pre_talking_heads": True, "post_talking_heads": True, "max_seq_len": 2048, **a}


def mixed(a: dict[str, Any]) -> int:
    """Neighbouring rows (b s) whose heads are mixed: two, whatever the number of streams."""
    return 1 if a.get("ablate_cross_stream_talking_heads") else 2


def transformer_shapes(a: dict[str, Any]) -> dict[str, Any]:
    a = with_defaults(a)
    d, v, s, n = a["dim"], a["num_tokens"], a["num_streams"], a["max_seq_len"]
    if a.get("separate_stream_emb", True):
        shapes: dict[str, Any] = {"emb.token_emb": (s, v, d), "emb.pos_emb": (s, n, d)}
    else:
        shapes = {"emb.token_emb.weight": (v, d), "emb.pos_emb.weight": (n, d), "emb.stream_emb": (s, d)}
    hidden = int(a.get("ff_mult", 4) * d)
    for layer in range(a["depth"]):
        p = f"layers.{layer}."
        shapes |= attention_shapes(a, f"{p}0.", streams=mixed(a))
        shapes |= {f"{p}1.0.scale": (d,), f"{p}1.1.weight": (hidden, d), f"{p}1.4.weight": (d, hidden)}
    return shapes | {"to_logits.1.scale": (d,), "to_logits.2.weight": (v, d)}


def run_transformer(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    a = with_defaults(a)
    tokens, s = inputs["x"], a["num_streams"]
    n = tokens.shape[1]
    if "emb.stream_emb" in w:
        x = w["emb.token_emb.weight"][tokens] + w["emb.pos_emb.weight"][:n]
        x = x[:, None] + w["emb.stream_emb"][:, None]
    else:
        x = w["emb.token_emb"][:, tokens].transpose(0, 1) + w["emb.pos_emb"][:, :n]
    x = x.flatten(0, 1)
    mask = inputs.get("mask")
    if mask is not None and mask.shape[0] != x.shape[0]:
        mask = mask.repeat_interleave(s, 0)
    for layer in range(a["depth"]):
        p = f"layers.{layer}."
        x = x + attend(w, f"{p}0.", x, mask, a, mixed(a))[0]
        hidden = gelu(linear(w, f"{p}1.1", rms(x, w[f"{p}1.0.scale"])))
        x = x + linear(w, f"{p}1.4", hidden)
    x = x.view(-1, s, *x.shape[1:]).sum(1)
    return {"out": linear(w, "to_logits.2", rms(x, w["to_logits.1.scale"]))}


CLASSES = {
    "Attention": (attention_shapes, run_attention),
    "MultiStreamTransformer": (transformer_shapes, run_transformer),
}
