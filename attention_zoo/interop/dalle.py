"""Weights of DALLE-pytorch.

Its rotary positions turned the values too. A module with `stable` scaled gradients into the embeddings, and divided by
the largest feature before the last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice
from attention_zoo.attention import AxialAttention, ConvAttention, FullAttention
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.positions import TextImageRotary
from attention_zoo.models import Stack, TextToImageTransformer
from attention_zoo.ops.sparse.image_layout import TextImageLayout

KINDS = {"full": "full", "axial_row": "axial_row", "axial_col": "axial_col", "conv_like": "conv", "sparse": "full"}
GLOBAL = 256  # tokens that every token saw in block-sparse attention, whatever blocks were drawn beside them
STABLE = 0.1  # the part of the gradient that reached the embeddings


class DivideMax(nn.Module):
    """x / max_d x, the maximum taken as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return x / x.detach().amax(-1, keepdim=True)


class StableTextToImage(TextToImageTransformer):
    """`TextToImageTransformer` as its weights were trained with `stable`. Arguments as there."""

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        x = super()._embed(tokens, start)
        return x * STABLE + x.detach() * (1 - STABLE)


def load_attention(
    weights: Weights,
    *,
    dim: int,
    seq_len: int,
    causal: bool = True,
    heads: int = 8,
    dim_head: int = 64,
    dropout: float = 0.0,
    stable: bool = False,
    static_mask: Tensor | None = None,
) -> FullAttention:
    """`Attention`; `stable` changed no number but by rounding."""
    static_mask = _static_mask(weights, static_mask)
    block = FullAttention(
        dim, heads=heads, dim_head=dim_head, causal=causal, dropout=dropout, pattern=static_mask, out_bias=True
    )
    _move_attention(Transfer(weights, block))
    return block


def load_conv(
    weights: Weights,
    *,
    dim: int,
    seq_len: int,
    image_size: int = 32,
    kernel_size: int = 5,
    dilation: int = 1,
    heads: int = 8,
    dim_head: int = 64,
    dropout: float = 0.0,
    stable: bool = False,
) -> ConvAttention:
    """`SparseConvCausalAttention`, whose window is the upper-left quadrant."""
    block = ConvAttention(
        dim,
        layout=_layout(seq_len, image_size, "image_size"),
        kernel_size=kernel_size,
        dilation=dilation,
        heads=heads,
        dim_head=dim_head,
        dropout=dropout,
        out_bias=True,
    )
    _move_attention(Transfer(weights, block))
    return block


def load_axial(
    weights: Weights,
    *,
    dim: int,
    seq_len: int,
    image_size: int = 32,
    axis: int = 0,
    heads: int = 8,
    dim_head: int = 64,
    dropout: float = 0.0,
    stable: bool = False,
) -> AxialAttention:
    """`SparseAxialCausalAttention`: within a row for axis 0, within a column for 1."""
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis=}")
    block = AxialAttention(
        dim,
        layout=_layout(seq_len, image_size, "image_size"),
        axis=("row", "column")[axis],
        heads=heads,
        dim_head=dim_head,
        dropout=dropout,
        out_bias=True,
    )
    _move_attention(Transfer(weights, block))
    return block


def load_transformer(
    weights: Weights,
    *,
    dim: int,
    depth: int,
    seq_len: int,
    reversible: bool = False,
    causal: bool = True,
    heads: int = 8,
    dim_head: int = 64,
    ff_mult: float = 4,
    attn_dropout: float = 0.0,
    ff_dropout: float = 0.0,
    attn_types: Sequence[str] | str | None = None,
    image_fmap_size: int | None = None,
    sparse_attn: Any = False,
    stable: bool = False,
    sandwich_norm: bool = False,
    shift_tokens: bool = False,
    rotary_emb: bool = True,
    shared_attn_ids: Sequence[int] | None = None,
    shared_ff_ids: Sequence[int] | None = None,
    optimize_for_inference: bool = False,
) -> Stack:
    """`Transformer`, which had no norm after its layers."""
    kinds = _kinds(attn_types, seq_len)
    layout = None if image_fmap_size is None else _layout(seq_len, image_fmap_size, "image_fmap_size")
    wants = {"rotary_emb": rotary_emb, "shift_tokens": shift_tokens, "attn_types": set(kinds) != {"full"}}
    if layout is None and any(wants.values()):
        names = [name for name, wanted in wants.items() if wanted]
        raise ValueError(f"image_fmap_size must be given with {', '.join(names)}, got None")
    stack = Stack(
        dim,
        depth,
        attention=[("full", {"causal": causal}) if kind == "full" else kind for kind in kinds][:depth],
        feedforward=("geglu", {"bias": True}),
        residual="sandwich" if sandwich_norm else "pre",
        heads=heads,
        dim_head=dim_head,
        attn_dropout=attn_dropout,
        ff_dropout=ff_dropout,
        ff_mult=ff_mult,
        layer_scale=True,
        token_shift=layout if shift_tokens else None,
        shared_attn_ids=shared_attn_ids,
        shared_ff_ids=shared_ff_ids,
        reversible=reversible,
        layout=layout if set(kinds[:depth]) != {"full"} else None,
        rotary=TextImageRotary(layout) if rotary_emb and layout is not None else None,
        rotate_values=rotary_emb or None,
        out_bias=True,
    )
    stack.norm = nn.Identity()
    weights.leave("pos_emb", "a table that is computed anew")
    _move_stack(Transfer(weights, stack), stack)
    return stack


def load_dalle(
    weights: Weights,
    *,
    dim: int,
    num_image_tokens: int,
    image_fmap_size: int,
    num_text_tokens: int = 10000,
    text_seq_len: int = 256,
    depth: int,
    heads: int = 8,
    dim_head: int = 64,
    reversible: bool = False,
    attn_dropout: float = 0.0,
    ff_dropout: float = 0.0,
    sparse_attn: Any = False,
    attn_types: Sequence[str] | str | None = None,
    loss_img_weight: float = 7,
    stable: bool = False,
    sandwich_norm: bool = False,
    shift_tokens: bool = True,
    rotary_emb: bool = True,
    shared_attn_ids: Sequence[int] | None = None,
    shared_ff_ids: Sequence[int] | None = None,
    share_input_output_emb: bool = False,
    optimize_for_inference: bool = False,
) -> TextToImageTransformer:
    """`DALLE` without its image autoencoder: `num_image_tokens` and `image_fmap_size` stand in for it."""
    for name in weights.names("vae."):
        weights.leave(name, "the image autoencoder, which is a model of its own")
    model = (StableTextToImage if stable else TextToImageTransformer)(
        num_text_tokens=num_text_tokens,
        text_len=text_seq_len,
        num_image_tokens=num_image_tokens,
        height=image_fmap_size,
        width=image_fmap_size,
        dim=dim,
        depth=depth,
        attention=_kinds(attn_types, text_seq_len + image_fmap_size**2)[:depth],
        heads=heads,
        dim_head=dim_head,
        positions="rotary" if rotary_emb else "learned",
        rotate_values=rotary_emb,
        residual="sandwich" if sandwich_norm else "pre",
        token_shift=shift_tokens,
        shared_attn_ids=shared_attn_ids,
        shared_ff_ids=shared_ff_ids,
        reversible=reversible,
        attn_dropout=attn_dropout,
        ff_dropout=ff_dropout,
        image_loss_weight=loss_img_weight,
        tie_embeddings=share_input_output_emb,
    )
    move = Transfer(weights, model)
    weights.leave("transformer.pos_emb", "a table that is computed anew")
    _move_stack(move.at("stack.", "transformer."), model.stack)
    move.affine("stack.norm", "to_logits.0")
    move.affine("to_logits", "to_logits.1")
    if share_input_output_emb:
        for name in ("text_emb", "image_emb"):
            for kind in ("weight", "bias"):
                weights.repeat(f"{name}.linear.{kind}", f"to_logits.1.{kind}")
    else:
        move.put("embedding.weight", "text_emb.weight", "image_emb.weight", change=lambda *rows: torch.cat(rows))
    if not rotary_emb:
        move.put("text_positions", "text_pos_emb.weight")
        for index, name in enumerate(("row_positions", "column_positions")):
            source = f"image_pos_emb.weights.{index}"
            source = source if source in weights else f"image_pos_emb.weights_{index}"  # older files
            move.put(name, source, change=lambda table: table.flatten(0, -2))
    if stable:
        model.stack.norm = nn.Sequential(DivideMax(), model.stack.norm)
    return model


def _static_mask(weights: Weights, given: Tensor | None) -> Tensor | None:
    """The pattern that is an argument, or lies with the weights; where both are there they must agree."""
    if "static_mask" not in weights:
        return given
    kept = weights.take("static_mask", "pattern")
    if given is not None and not torch.equal(kept, given.to(kept)):
        raise ValueError("static_mask must be the one in the state_dict where both are given, got another")
    return kept


def _kinds(attn_types: Sequence[str] | str | None, seq_len: int) -> list[str]:
    """The blocks, to be cycled over the layers."""
    names = ("full",) if attn_types is None else (attn_types,) if isinstance(attn_types, str) else tuple(attn_types)
    for name in names:
        check_choice("attn_types", name, KINDS)
    if "sparse" in names and seq_len > GLOBAL:
        raise ValueError(
            f"attn_types must not hold 'sparse' beyond {GLOBAL} tokens to be loaded, got {attn_types} with {seq_len}: "
            "its random blocks were drawn anew by every process and are in no file. BlockSparseAttention keeps its "
            "blocks with the weights, for training anew"
        )
    return [KINDS[name] for name in names]


def _layout(seq_len: int, side: int, name: str) -> TextImageLayout:
    text_len = seq_len + 1 - side**2
    if text_len < 1:
        raise ValueError(f"{name} must leave text before the image, got {name}={side} with {seq_len=}")
    return TextImageLayout(text_len, side, side)


def _move_stack(move: Transfer, stack: Stack) -> None:
    shifted = ".fn.fn" if stack.shifts else ""
    moved: dict[nn.Module, str] = {}
    for layer in range(len(stack.layers)):
        for place, move_block in enumerate((_move_attention, _move_feedforward)):
            source = f"blocks.{layer}.{'fg'[place]}.net" if stack.reversible else f"layers.{layer}.{place}"
            to = f"layers.{layer}.sublayers.{place}."
            here = move.at(to, f"layers.{source}.")
            here.put("residual.scale.weight", "scale", change=torch.flatten)
            here.affine("residual.norm", "fn.norm")
            if hasattr(stack.get_submodule(f"{to}residual"), "norm_out"):
                here.affine("residual.norm_out", "fn.norm_out")
            inner = here.at("block.block." if stack.shifts else "block.", ("fn.fn.fn", "fn.fn")[place] + f"{shifted}.")
            _move_once(inner, stack.get_submodule(inner.to[len(move.to) :].rstrip(".")), move_block, moved)


def _move_once(
    move: Transfer, block: nn.Module, move_block: Callable[[Transfer], None], moved: dict[nn.Module, str]
) -> None:
    """Fill a block, or check that a layer which shares it holds the same weights."""
    if block not in moved:
        moved[block] = move.source
        move_block(move)
        return
    for name in move.weights.names(move.source):
        move.weights.repeat(name, moved[block] + name.removeprefix(move.source))


def _move_attention(move: Transfer) -> None:
    move.qkv("to_qkv")
    move.affine("to_out", "to_out.0")


def _move_feedforward(move: Transfer) -> None:
    for kind in ("weight", "bias"):
        for index, name in enumerate(("to_hidden", "to_gate")):
            move.put(f"{name}.{kind}", f"net.0.{kind}", change=lambda rows, i=index: rows.chunk(2)[i])
    move.affine("to_out", "net.3")


CLASSES: dict[str, Callable[..., nn.Module]] = {
    "Attention": load_attention,
    "DALLE": load_dalle,
    "SparseAxialCausalAttention": load_axial,
    "SparseConvCausalAttention": load_conv,
    "Transformer": load_transformer,
}
