"""memformer."""

from __future__ import annotations

import math
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
    softmax,
)

PACKAGE = "memformer"


def attention_shapes(a: dict[str, Any], p: str = "") -> dict[str, Any]:
    d = a["dim"]
    shapes: dict[str, Any] = {}
    for name, rows in (("to_q", d), ("to_kv", 2 * d), ("to_out", d)):
        shapes |= {f"{p}{name}.weight": (rows, d), f"{p}{name}.bias": (rows,)}
    return shapes


def attend(
    w: Weights, p: str, x: Tensor, read: Tensor, h: int, allowed: Tensor | None, bias: Tensor | float = 0.0
) -> Tensor:
    q = heads(linear(w, f"{p}to_q", x), h)
    k, v = (heads(part, h) for part in linear(w, f"{p}to_kv", read).chunk(2, -1))
    scores = q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2) + bias
    maps = scores.softmax(-1) if allowed is None else softmax(scores, allowed)
    return linear(w, f"{p}to_out", merge(maps @ v))


def both(queries: Tensor | None, keys: Tensor | None) -> Tensor | None:
    """(b, 1, i, j) of masks (b, i) and (b, j)."""
    if queries is None and keys is None:
        return None
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    allowed = allowed if queries is None else allowed & queries[:, None, :, None]
    return allowed if keys is None else allowed & keys[:, None, None]


def run_attention(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    x, context = inputs["x"], inputs.get("context")
    read = x if context is None else torch.cat((x, context), 1) if options.get("attend_self") else context
    queries, keys = inputs.get("query_mask"), inputs.get("kv_mask")
    allowed = both(queries, queries if keys is None and context is None else keys)
    allowed = torch.ones(x.shape[1], read.shape[1], dtype=torch.bool) if allowed is None else allowed
    if a.get("causal") and x.shape[1] > 1:  # upstream, a single query attends to all keys
        allowed = allowed & past(x.shape[1])
    allowed = allowed & inputs["mask"][:, None] if "mask" in inputs else allowed
    return {"out": attend(w, "", x, read, a.get("heads", 8), allowed)}


def bucket(distance: int, *, both_sides: bool) -> int:
    """T5's, distance = key - query."""
    buckets, offset = (16, 16 if distance > 0 else 0) if both_sides else (32, 0)
    n = abs(distance) if both_sides else max(-distance, 0)
    exact = buckets // 2
    if n < exact:
        return offset + n
    return offset + min(exact + int(math.log(n / exact) / math.log(128 / exact) * (buckets - exact)), buckets - 1)


def bias_of(w: Weights, p: str, n: int, *, both_sides: bool) -> Tensor:
    """(h, n, n)."""
    index = torch.tensor([[bucket(key - query, both_sides=both_sides) for key in range(n)] for query in range(n)])
    return w[f"{p}rel_pos_emb.relative_attention_bias.weight"][index].permute(2, 0, 1)


def side_shapes(d: int, v: int, depth: int, h: int, p: str) -> dict[str, Any]:
    layers = f"{p}layer_blocks."
    shapes: dict[str, Any] = {
        f"{p}token_emb.weight": (v, d),
        f"{layers}rel_pos_emb.relative_attention_bias.weight": (32, h),
        f"{p}norm.weight": (d,),
        f"{p}norm.bias": (d,),
    }
    for layer in range(depth):
        here = f"{layers}layers.{layer}."
        for place in range(3):
            shapes |= {f"{here}{place}.fn.norm.weight": (d,), f"{here}{place}.fn.norm.bias": (d,)}
            if place < 2:
                shapes |= attention_shapes({"dim": d}, f"{here}{place}.fn.fn.")
            else:
                shapes |= feedforward_shapes(d, f"{here}2.fn.fn.")
    return shapes


def feedforward_shapes(d: int, p: str) -> dict[str, Any]:
    return {
        f"{p}net.0.weight": (4 * d, d),
        f"{p}net.0.bias": (4 * d,),
        f"{p}net.2.weight": (d, 4 * d),
        f"{p}net.2.bias": (d,),
    }


def feedforward(w: Weights, p: str, x: Tensor) -> Tensor:
    return linear(w, f"{p}net.2", gelu(linear(w, f"{p}net.0", x)))


def memformer_shapes(a: dict[str, Any]) -> dict[str, Any]:
    d = a["dim"]
    shapes: dict[str, Any] = {"memory_slots": (a["num_memory_slots"], d)}
    shapes |= side_shapes(d, a["enc_num_tokens"], a["enc_depth"], a.get("enc_heads", 8), "encoder.")
    shapes |= attention_shapes(a, "mem_updater.") | feedforward_shapes(d, "mem_ff.fn.fn.")
    shapes |= {"mem_ff.fn.norm.weight": (d,), "mem_ff.fn.norm.bias": (d,)}
    shapes |= {"gru.weight_ih": (3 * d, d), "gru.weight_hh": (3 * d, d), "gru.bias_ih": (3 * d,)}
    shapes |= {"gru.bias_hh": (3 * d,)}
    if not a.get("encoder_only"):
        shapes |= side_shapes(d, a["dec_num_tokens"], a["dec_depth"], a.get("dec_heads", 8), "decoder.net.")
        shapes |= {"decoder.net.to_logits.weight": (a["dec_num_tokens"], d)}
        shapes |= {"decoder.net.to_logits.bias": (a["dec_num_tokens"],)}
    return shapes


def side(
    w: Weights, p: str, x: Tensor, h: int, depth: int, allowed: Tensor | None, read: Any, *, decodes: bool
) -> Tensor:
    bias = bias_of(w, f"{p}layer_blocks.", x.shape[1], both_sides=decodes)  # swapped, as upstream
    if decodes:
        allowed = past(x.shape[1]) if allowed is None else allowed & past(x.shape[1])
    context, visible = read
    for layer in range(depth):
        here = f"{p}layer_blocks.layers.{layer}."
        y = layer_norm(w, f"{here}0.fn.norm", x)
        x = x + attend(w, f"{here}0.fn.fn.", y, y, h, allowed, bias)
        x = x + attend(w, f"{here}1.fn.fn.", layer_norm(w, f"{here}1.fn.norm", x), context, h, visible)
        x = x + feedforward(w, f"{here}2.fn.fn.", layer_norm(w, f"{here}2.fn.norm", x))
    return layer_norm(w, f"{p}norm", x)


def run_memformer(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    source, mask = inputs["src"], inputs.get("src_mask")
    memory = inputs["mems"] if "mems" in inputs else w["memory_slots"].expand(source.shape[0], -1, -1)
    h, x = a.get("enc_heads", 8), w["encoder.token_emb.weight"][source]
    encoded = side(w, "encoder.", x, h, a["enc_depth"], both(mask, mask), (memory, None), decodes=False)
    slots, new = memory.shape[1], memory
    for _ in range(a.get("num_mem_updates", 1)):
        allowed = torch.cat((torch.eye(slots, dtype=torch.bool), torch.ones(slots, x.shape[1], dtype=torch.bool)), 1)
        if mask is not None:
            allowed = allowed & torch.cat((mask.new_ones(len(mask), slots), mask), 1)[:, None, None]
        read = torch.cat((new, encoded), 1)
        update = attend(w, "mem_updater.", new, read, a.get("mem_update_attn_heads", 8), allowed)
        new = gru(w, update, new)
        new = new + feedforward(w, "mem_ff.fn.fn.", layer_norm(w, "mem_ff.fn.norm", new))
    found = {"enc_out": encoded, "mem": new}
    if "tgt" not in inputs:
        return found
    target, target_mask = inputs["tgt"], inputs.get("tgt_mask")
    read, p = target[:, :-1], "decoder.net."
    target_mask = None if target_mask is None else target_mask[:, : read.shape[1]]
    x = w[f"{p}token_emb.weight"][read]
    cross = (encoded, both(target_mask, mask))
    allowed = both(target_mask, target_mask)
    x = side(w, p, x, a.get("dec_heads", 8), a["dec_depth"], allowed, cross, decodes=True)
    return {**found, "dec_out": next_token_loss(linear(w, f"{p}to_logits", x), target[:, 1:])}


def gru(w: Weights, x: Tensor, hidden: Tensor) -> Tensor:
    """torch's cell: reset, update, new."""
    r, z, n = (x @ w["gru.weight_ih"].t() + w["gru.bias_ih"]).chunk(3, -1)
    hr, hz, hn = (hidden @ w["gru.weight_hh"].t() + w["gru.bias_hh"]).chunk(3, -1)
    keep = (z + hz).sigmoid()
    return (1 - keep) * (n + (r + hr).sigmoid() * hn).tanh() + keep * hidden


CLASSES = {"Attention": (attention_shapes, run_attention), "Memformer": (memformer_shapes, run_memformer)}
