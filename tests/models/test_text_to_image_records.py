"""Blocks, stack and model compute what the original package computed, with its weights mapped by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import (
    AxialAttention,
    ConvAttention,
    FullAttention,
    Stack,
    TextImageLayout,
    TextImageRotary,
    TextToImageTransformer,
)
from tests.slow import relative_error

DATA = Path(__file__).parents[1] / "data" / "upstream"
KINDS = {"full": "full", "axial_row": "axial_row", "axial_col": "axial_col", "conv_like": "conv"}
LAYOUT = TextImageLayout(text_len=7, height=4, width=4)  # six words behind a start token, as in every record


def record(name: str) -> dict[str, Any]:
    return torch.load(DATA / f"dalle_{name}.pt", weights_only=True)


def map_attention(weights: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {
        f"{target}to_qkv.weight": weights[f"{source}to_qkv.weight"],
        f"{target}to_out.weight": weights[f"{source}to_out.0.weight"],
        f"{target}to_out.bias": weights[f"{source}to_out.0.bias"],
    }


def map_feedforward(weights: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    mapped = {}
    for kind in ("weight", "bias"):
        hidden, gate = weights[f"{source}net.0.{kind}"].chunk(2)
        mapped[f"{target}to_hidden.{kind}"] = hidden
        mapped[f"{target}to_gate.{kind}"] = gate
        mapped[f"{target}to_out.{kind}"] = weights[f"{source}net.3.{kind}"]
    return mapped


def map_layers(weights: dict[str, Tensor], depth: int, *, shift: bool, prefix: str, target: str) -> dict[str, Tensor]:
    mapped: dict[str, Tensor] = {}
    more, block = ("fn.fn.", "block.block.") if shift else ("", "block.")
    for layer in range(depth):
        for place in range(2):
            source = f"{prefix}layers.layers.{layer}.{place}."
            sub = f"{target}layers.{layer}.sublayers.{place}."
            mapped[f"{sub}residual.scale.weight"] = weights[f"{source}scale"].flatten()
            for norm in ("norm", "norm_out"):
                if f"{source}fn.{norm}.weight" in weights:
                    mapped[f"{sub}residual.{norm}.weight"] = weights[f"{source}fn.{norm}.weight"]
                    mapped[f"{sub}residual.{norm}.bias"] = weights[f"{source}fn.{norm}.bias"]
            if place == 0:
                mapped |= map_attention(weights, f"{source}fn.fn.fn.{more}", sub + block)
            else:
                mapped |= map_feedforward(weights, f"{source}fn.fn.{more}", sub + block)
    return mapped


def assert_same(kept: dict[str, Any], module: nn.Module, out: Tensor, x: Tensor | None) -> None:
    """The output where it counts, the gradient to x, and the norm of all gradients to weights."""
    want, counts = kept["outputs"]["out"], kept.get("compare", {}).get("out")
    finite = want > -1e30
    if counts is not None:
        finite &= counts[..., None]
    assert relative_error(out.masked_fill(~finite, 0), want.masked_fill(~finite, 0)) < 1e-5
    module.zero_grad()
    (out.masked_fill(~finite, 0) * kept["cotangents"]["out"].masked_fill(~finite, 0)).sum().backward()
    if x is not None:
        assert x.grad is not None
        assert relative_error(x.grad, kept["grads"]["input:x"]) < 1e-5
    norms = [p.grad.double().norm() for p in module.parameters() if p.grad is not None]
    assert relative_error(torch.stack(norms).norm(), kept["grads"]["param_grad_norm"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("attention_causal_mask", lambda dim, **sizes: FullAttention(dim, **sizes)),
        ("conv_k3", lambda dim, **sizes: ConvAttention(dim, layout=LAYOUT, kernel_size=3, **sizes)),
        ("conv_k3_d2_mask", lambda dim, **sizes: ConvAttention(dim, layout=LAYOUT, kernel_size=3, dilation=2, **sizes)),
        ("axial_row", lambda dim, **sizes: AxialAttention(dim, layout=LAYOUT, **sizes)),
        ("axial_col_mask", lambda dim, **sizes: AxialAttention(dim, layout=LAYOUT, axis="column", **sizes)),
    ],
)
def test_a_block_equals_the_original(name: str, make: Any) -> None:
    kept = record(name)
    block = make(24, heads=3, dim_head=8, out_bias=True)
    block.load_state_dict(map_attention(kept["state_dict"], "", ""))
    x = kept["inputs"]["x"].requires_grad_()
    mask = kept["inputs"].get("mask")
    mask = None if mask is None else mask[:, : x.shape[1]].clone()
    assert_same(kept, block, block(x, mask=mask), x)


@pytest.mark.parametrize("name", ["transformer_all_types", "transformer_norotary", "transformer_shift_sandwich"])
def test_a_stack_equals_the_original(name: str) -> None:
    kept = record(name)
    said = kept["meta"]["kwargs"]
    rotary = said.get("rotary_emb", True)
    stack = Stack(
        24,
        4,
        attention=[KINDS[kind] for kind in said["attn_types"]],
        feedforward=("geglu", {"bias": True}),
        residual="sandwich" if said.get("sandwich_norm") else "pre",
        heads=3,
        dim_head=9,
        layer_scale=True,
        token_shift=LAYOUT if said.get("shift_tokens") else None,
        layout=LAYOUT,
        out_bias=True,
        **({"rotary": TextImageRotary(LAYOUT), "rotate_values": True} if rotary else {}),
    )
    stack.norm = nn.Identity()  # the original norms behind its transformer, in the model
    shift = said.get("shift_tokens", False)
    stack.load_state_dict(map_layers(kept["state_dict"], 4, shift=shift, prefix="", target=""))
    x = kept["inputs"]["x"].requires_grad_()
    assert_same(kept, stack, stack(x), x)


def original_model(kept: dict[str, Any], **options: Any) -> TextToImageTransformer:
    said = kept["meta"]["kwargs"]
    rotary, shift = said.get("rotary_emb", True), said.get("shift_tokens", True)
    model = TextToImageTransformer(
        num_text_tokens=31,
        text_len=6,
        num_image_tokens=17,
        height=4,
        width=4,
        dim=24,
        depth=4,
        attention=[(KINDS[kind], {}) for kind in said["attn_types"]],
        heads=3,
        dim_head=9,
        positions="rotary" if rotary else "learned",
        rotate_values=rotary,
        token_shift=shift,
        **options,
    )
    weights = kept["state_dict"]
    mapped = map_layers(weights, 4, shift=shift, prefix="transformer.", target="stack.")
    mapped["embedding.weight"] = torch.cat((weights["text_emb.weight"], weights["image_emb.weight"]))
    for kind in ("weight", "bias"):
        mapped[f"stack.norm.{kind}"] = weights[f"to_logits.0.{kind}"]
        mapped[f"to_logits.{kind}"] = weights[f"to_logits.1.{kind}"]
    if not rotary:
        mapped["text_positions"] = weights["text_pos_emb.weight"]
        mapped["row_positions"] = weights["image_pos_emb.weights.0"].view(4, 24)
        mapped["column_positions"] = weights["image_pos_emb.weights.1"].view(4, 24)
    model.load_state_dict(mapped)
    return model


def test_logits_equal_the_original_s() -> None:
    kept = record("model_logits")
    model = original_model(kept)
    logits = model(kept["inputs"]["text"], kept["inputs"]["image"])
    assert torch.equal(logits == -torch.inf, kept["outputs"]["out"] < -1e30)
    assert_same(kept, model, logits, None)


def test_the_loss_equals_the_original_s() -> None:
    kept = record("model_loss")
    model = original_model(kept)
    loss = model.loss(kept["inputs"]["text"], kept["inputs"]["image"])
    assert_same(kept, model, loss, None)
