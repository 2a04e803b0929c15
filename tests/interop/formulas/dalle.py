"""DALLE-pytorch."""

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
    rotate,
    softmax,
)

PACKAGE = "DALLE-pytorch"


def attention_shapes(a: dict[str, Any], p: str = "") -> dict[str, Any]:
    d, inner = a["dim"], a.get("heads", 8) * a.get("dim_head", 64)
    return {f"{p}to_qkv.weight": (3 * inner, d), f"{p}to_out.0.weight": (d, inner), f"{p}to_out.0.bias": (d,)}


def visible(kind: str, n: int, text: int, side: int | None, a: dict[str, Any]) -> Tensor:
    """(n, n) bool, one pair at a time."""
    allowed = torch.zeros(n, n, dtype=torch.bool)
    size, dilation = a.get("kernel_size", 5), a.get("dilation", 1)
    for i in range(n):
        for j in range(n):
            if kind == "full" and not a.get("causal", True):
                allowed[i, j] = True
            elif j > i:
                continue
            elif kind in ("full", "sparse") or j < text or side is None:
                allowed[i, j] = True
            else:
                (row, column), (r, c) = divmod(i - text, side), divmod(j - text, side)
                down, right = row - r, column - c
                reach = (size - 1) * dilation
                near = 0 <= down <= reach and 0 <= right <= reach and not down % dilation and not right % dilation
                allowed[i, j] = {"axial_row": row == r, "axial_col": column == c, "conv_like": near}[kind]
    return allowed


def attend(w: Weights, p: str, x: Tensor, a: dict[str, Any], allowed: Tensor, angle: Tensor | None = None) -> Tensor:
    q, k, v = (heads(part, a.get("heads", 8)) for part in linear(w, f"{p}to_qkv", x).chunk(3, -1))
    if angle is not None:
        q, k, v = (rotate(part, angle[: x.shape[1]]) for part in (q, k, v))
    return linear(w, f"{p}to_out.0", merge(softmax(q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2), allowed) @ v))


def run_attention(kind: Any) -> Any:
    def run(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
        x, side = inputs["x"], a.get("image_size", 32)
        text = a["seq_len"] + 1 - side**2
        allowed = visible(kind(a), x.shape[1], text, side, a)
        if "static_mask" in a:
            allowed = allowed & a["static_mask"][: x.shape[1], : x.shape[1]]
        if "mask" in inputs:
            allowed = allowed & inputs["mask"][:, None, None, : x.shape[1]]
        return {"out": attend(w, "", x, a, allowed)}

    return run


def kinds(a: dict[str, Any]) -> list[str]:
    given = a.get("attn_types") or ("full",)
    given = (given,) if isinstance(given, str) else given
    return [given[layer % len(given)] for layer in range(a["depth"])]


def places(a: dict[str, Any], p: str, layer: int) -> tuple[list[str], list[str]]:
    """Prefixes of both sub-layers and of the layers inside their norms."""
    if a.get("reversible"):
        outer = [f"{p}layers.blocks.{layer}.{part}.net." for part in "fg"]
    else:
        outer = [f"{p}layers.layers.{layer}.{place}." for place in (0, 1)]
    more = "fn.fn." if a.get("shift_tokens") else ""
    return outer, [f"{outer[0]}fn.fn.fn.{more}", f"{outer[1]}fn.fn.{more}"]


def transformer_shapes(a: dict[str, Any], p: str = "") -> dict[str, Any]:
    d, shapes = a["dim"], {}
    hidden = d * a.get("ff_mult", 4)
    first: dict[tuple[int, int], str] = {}
    for layer in range(a["depth"]):
        outer, inner = places(a, p, layer)
        for place in (0, 1):
            ids = a.get(("shared_attn_ids", "shared_ff_ids")[place]) or range(a["depth"])
            shapes |= {f"{outer[place]}scale": (1, 1, d)}
            for norm in ("norm", "norm_out") if a.get("sandwich_norm") else ("norm",):
                shapes |= {f"{outer[place]}fn.{norm}.weight": (d,), f"{outer[place]}fn.{norm}.bias": (d,)}
            here = inner[place]
            own = {
                f"{here}net.0.weight": (2 * hidden, d),
                f"{here}net.0.bias": (2 * hidden,),
                f"{here}net.3.weight": (d, hidden),
                f"{here}net.3.bias": (d,),
            } if place else attention_shapes(a, here)  # fmt: skip
            before = first.setdefault((place, ids[layer % len(ids)]), here)
            shapes |= own if before == here else {name: before + name.removeprefix(here) for name in own}
    if a.get("rotary_emb", True):
        shapes[f"{p}pos_emb"] = "buffer"
    return shapes


def angles(a: dict[str, Any]) -> Tensor:
    """Angles of the rotary table, (tokens, pairs)."""
    side, r = a["image_fmap_size"], a.get("dim_head", 64) // 3
    text = a["seq_len"] + 1 - side**2
    pairs = r // 2
    rows = []
    for i in range(text + side**2):
        is_text = i < text
        at = float(i if is_text else 8192)
        turns = [at * 10000 ** (-2 * k / r) for k in range(pairs)]
        for index in divmod(i - text, side):
            where = -10.0 if is_text else float(torch.linspace(-1, 1, side, dtype=torch.float64)[index])
            turns += [where * torch.pi * float(f) for f in torch.linspace(1, 5, pairs, dtype=torch.float64)]
        rows.append(turns)
    return torch.tensor(rows, dtype=torch.float64).float()


def shift(x: Tensor, text: int, side: int) -> Tensor:
    """Token by token."""
    half, quarter, rows = x.shape[-1] // 2, x.shape[-1] // 4, []
    zero = torch.zeros_like(x[:, 0])
    for i in range(x.shape[1]):
        left = x[:, i - 1] if i and (i < text or (i - text) % side) else zero
        above = x[:, i - side] if i - text >= side else zero
        if i < text:
            rows.append(torch.cat((left[:, :half], x[:, i, half:]), -1))
        else:
            rows.append(torch.cat((above[:, :quarter], left[:, quarter:half], x[:, i, half:]), -1))
    return torch.stack(rows, 1)


def transform(w: Weights, p: str, x: Tensor, a: dict[str, Any]) -> Tensor:
    side = a.get("image_fmap_size")
    text = a["seq_len"] + 1 - side**2 if side else a["seq_len"]
    angle = angles(a) if a.get("rotary_emb", True) else None
    streams = [x, x]
    for layer, kind in enumerate(kinds(a)):
        outer, inner = places(a, p, layer)
        allowed = visible(kind, x.shape[1], text, side, {"causal": a.get("causal", True)})
        for place in (0, 1):
            y = layer_norm(w, f"{outer[place]}fn.norm", streams[1 - place])
            y = shift(y, text, side) if a.get("shift_tokens") else y
            if place:
                value, gate = linear(w, f"{inner[1]}net.0", y).chunk(2, -1)
                y = linear(w, f"{inner[1]}net.3", value * gelu(gate))
            else:
                y = attend(w, inner[0], y, a, allowed, angle)
            y = layer_norm(w, f"{outer[place]}fn.norm_out", y) if a.get("sandwich_norm") else y
            new = streams[place] + w[f"{outer[place]}scale"] * y
            if a.get("reversible"):
                streams[place] = new
            else:
                streams = [streams[1 - place] + w[f"{outer[place]}scale"] * y] * 2
    return (streams[0] + streams[1]) / 2


def dalle_defaults(a: dict[str, Any]) -> dict[str, Any]:
    a = {"num_text_tokens": 10000, "text_seq_len": 256, "shift_tokens": True, **a}
    return {**a, "seq_len": a["text_seq_len"] + a["image_fmap_size"] ** 2}


def dalle_shapes(a: dict[str, Any]) -> dict[str, Any]:
    a = dalle_defaults(a)
    d, t, m, side = a["dim"], a["text_seq_len"], a["num_image_tokens"], a["image_fmap_size"]
    ids = a["num_text_tokens"] + t
    shapes = transformer_shapes(a, "transformer.")
    shapes |= {"to_logits.0.weight": (d,), "to_logits.0.bias": (d,)}
    shapes |= {"to_logits.1.weight": (ids + m, d), "to_logits.1.bias": (ids + m,)}
    if a.get("share_input_output_emb"):
        for name in ("text_emb", "image_emb"):
            shapes |= {f"{name}.linear.{kind}": f"to_logits.1.{kind}" for kind in ("weight", "bias")}
    else:
        shapes |= {"text_emb.weight": (ids, d), "image_emb.weight": (m, d)}
    if not a.get("rotary_emb", True):
        shapes |= {"text_pos_emb.weight": (t + 1, d)}
        shapes |= {"image_pos_emb.weights.0": (1, side, 1, d), "image_pos_emb.weights.1": (1, 1, side, d)}
    return shapes | {"vae.encoder.weight": (3, 3)}


def run_dalle(w: Weights, inputs: Weights, a: dict[str, Any], options: dict[str, Any]) -> Weights:
    a = dalle_defaults(a)
    t, side, words = a["text_seq_len"], a["image_fmap_size"], a["num_text_tokens"]
    ids, text = words + t, inputs["text"]
    text = torch.where(text == 0, words + torch.arange(t), text)
    text = torch.cat((torch.zeros_like(text[:, :1]), text), 1)
    image = inputs.get("image", text[:, :0])
    tables = ("to_logits.1.weight",) * 2 if a.get("share_input_output_emb") else ("text_emb.weight", "image_emb.weight")
    x, y = w[tables[0]][text], w[tables[1]][image + (ids if a.get("share_input_output_emb") else 0)]
    if not a.get("rotary_emb", True):
        x = x + w["text_pos_emb.weight"]
        y = y + (w["image_pos_emb.weights.0"] + w["image_pos_emb.weights.1"]).flatten(1, 2)[:, : y.shape[1]]
    x = torch.cat((x, y), 1)[:, : t + side**2]
    if a.get("stable"):
        x = x * 0.1 + x.detach() * 0.9
    x = transform(w, "transformer.", x, a)
    if a.get("stable"):
        x = x / x.amax(-1, keepdim=True).detach()
    logits = linear(w, "to_logits.1", layer_norm(w, "to_logits.0", x))
    is_image = torch.arange(x.shape[1]) >= t
    wrong = is_image[:, None] != (torch.arange(logits.shape[-1]) >= ids)
    logits = logits.masked_fill(wrong, torch.finfo(logits.dtype).min)
    if not options.get("return_loss"):
        return {"out": logits}
    weight = a.get("loss_img_weight", 7)
    losses = next_token_loss(logits[:, :t], text[:, 1:]), next_token_loss(logits[:, t:], image + ids)
    return {"out": (losses[0] + weight * losses[1]) / (weight + 1)}


CLASSES = {
    "Attention": (attention_shapes, run_attention(lambda a: "full")),
    "SparseConvCausalAttention": (attention_shapes, run_attention(lambda a: "conv_like")),
    "SparseAxialCausalAttention": (
        attention_shapes,
        run_attention(lambda a: ("axial_row", "axial_col")[a.get("axis", 0)]),
    ),
    "Transformer": (transformer_shapes, lambda w, i, a, o: {"out": transform(w, "", i["x"], a)}),
    "DALLE": (dalle_shapes, run_dalle),
}
