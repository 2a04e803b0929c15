"""Weights of DALLE-pytorch.

Upstream, the rotary position embedding is applied to the values too. With `stable`, the gradient into the embeddings is
scaled, and the features are divided by their maximum before the last norm. The random blocks of block-sparse attention
are drawn by every process and are in no file: beyond 256 tokens, where there are some, such weights cannot be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice
from attention_zoo.attention import AxialAttention, ConvAttention, FullAttention, SelfAttention
from attention_zoo.interop.loader import Loader
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.positions import TextImageRotary
from attention_zoo.models import Stack, TextToImageTransformer
from attention_zoo.ops.sparse import TextImageLayout

GLOBAL = 256  # first tokens, to which every token attends in block-sparse attention besides its random blocks
STABLE = 0.1  # fraction of the gradient that reaches the embeddings with `stable`


class DivideMax(nn.Module):
    """x / max_d x, without a gradient through the maximum."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return x / x.detach().amax(-1, keepdim=True)


class RotatedValues(SelfAttention):
    """Base class of layers whose rotary position embedding is applied to the values too."""

    def project(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, start)
        return q, k, v if self.rotary is None else self.rotary(v, start)


class RotatedFullAttention(RotatedValues, FullAttention):
    """`FullAttention` with rotated values. Args: see `FullAttention`."""


class RotatedAxialAttention(RotatedValues, AxialAttention):
    """`AxialAttention` with rotated values. Args: see `AxialAttention`."""


class RotatedConvAttention(RotatedValues, ConvAttention):
    """`ConvAttention` with rotated values. Args: see `ConvAttention`."""


ATTENTION: dict[str, Callable[..., nn.Module]] = {
    "full": RotatedFullAttention,
    "axial_row": partial(RotatedAxialAttention, axis="row"),
    "axial_col": partial(RotatedAxialAttention, axis="column"),
    "conv_like": RotatedConvAttention,
    "sparse": RotatedFullAttention,
}


class OldTextToImage(TextToImageTransformer):
    """`TextToImageTransformer` with rotated values.

    Args:
        attention: names in ATTENTION, cycled over the depth.
        stable: whether the gradient into the embeddings is scaled and the features are divided by their maximum.
        arguments: see `TextToImageTransformer`.
    """

    def __init__(self, *, attention: Sequence[str], stable: bool, **arguments: Any) -> None:
        super().__init__(attention=[ATTENTION[name] for name in attention], **arguments)
        self.stable = stable
        if stable:
            self.stack.norm = nn.Sequential(DivideMax(), self.stack.norm)

    def _embed(self, tokens: Tensor, start: int | Tensor) -> Tensor:
        x = super()._embed(tokens, start)
        return x * STABLE + x.detach() * (1 - STABLE) if self.stable else x


@dataclass(frozen=True, kw_only=True)
class AnyAttentionLoader(Loader):
    """Arguments of all attention classes."""

    dim: int
    seq_len: int
    heads: int = 8
    dim_head: int = 64
    dropout: float = 0.0
    stable: bool = False  # changes the result by rounding only

    def options(self) -> dict[str, Any]:
        """Arguments of all attention layers."""
        return {**self.same("heads", "dim_head", "dropout"), "out_bias": True}

    def transfer(self, move: Transfer) -> None:
        _move_attention(move)


@dataclass(frozen=True, kw_only=True)
class AttentionLoader(AnyAttentionLoader):
    """`Attention`."""

    causal: bool = True
    static_mask: Tensor | None = None

    def build(self, weights: Weights) -> FullAttention:
        return FullAttention(self.dim, causal=self.causal, pattern=self.pattern(weights), **self.options())

    def pattern(self, weights: Weights) -> Tensor | None:
        """The pattern from the arguments or the weights.

        Raises:
            ValueError: both have one, and they differ.
        """
        if "static_mask" not in weights:
            return self.static_mask
        saved = weights.take("static_mask", "pattern")
        if self.static_mask is not None and not torch.equal(saved, self.static_mask.to(saved)):
            raise ValueError("static_mask must be the one in the state_dict where both are given, got another")
        return saved


@dataclass(frozen=True, kw_only=True)
class ConvLoader(AnyAttentionLoader):
    """`SparseConvCausalAttention`, whose window is the upper-left quadrant."""

    image_size: int = 32
    kernel_size: int = 5
    dilation: int = 1

    def build(self, weights: Weights) -> ConvAttention:
        layout = _layout(self.seq_len, self.image_size, "image_size")
        return ConvAttention(self.dim, layout=layout, **self.same("kernel_size", "dilation"), **self.options())


@dataclass(frozen=True, kw_only=True)
class AxialLoader(AnyAttentionLoader):
    """`SparseAxialCausalAttention`: attention within a row for axis 0, within a column for axis 1."""

    image_size: int = 32
    axis: int = 0

    def build(self, weights: Weights) -> AxialAttention:
        if self.axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1, got axis={self.axis}")
        layout = _layout(self.seq_len, self.image_size, "image_size")
        return AxialAttention(self.dim, layout=layout, axis=("row", "column")[self.axis], **self.options())


@dataclass(frozen=True, kw_only=True)
class AnyModelLoader(Loader):
    """Arguments of `Transformer` and `DALLE`."""

    dim: int
    depth: int
    heads: int = 8
    dim_head: int = 64
    reversible: bool = False
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    attn_types: Sequence[str] | str | None = None
    sandwich_norm: bool = False
    rotary_emb: bool = True
    shared_attn_ids: Sequence[int] | None = None
    shared_ff_ids: Sequence[int] | None = None
    stable: bool = False  # in `Transformer` it changes the result by rounding only
    sparse_attn: Any = False  # not read
    optimize_for_inference: bool = False  # does not change the result

    def options(self) -> dict[str, Any]:
        """Arguments of `Stack` and `TextToImageTransformer`."""
        return {
            "residual": "sandwich" if self.sandwich_norm else "pre",
            **self.same("depth", "heads", "dim_head", "reversible", "attn_dropout", "ff_dropout"),
            **self.same("shared_attn_ids", "shared_ff_ids"),
        }

    def kinds(self, seq_len: int) -> list[str]:
        """The names of the attention layers in ATTENTION, one cycle over the depth at most.

        Raises:
            ValueError: a name is unknown, or block-sparse attention has random blocks.
        """
        types = self.attn_types or ("full",)
        names = (types,) if isinstance(types, str) else tuple(types)
        for name in names:
            check_choice("attn_types", name, ATTENTION)
        if "sparse" in names and seq_len > GLOBAL:
            raise ValueError(
                f"attn_types must not hold 'sparse' beyond {GLOBAL} tokens, got {self.attn_types} with {seq_len}: the "
                "random blocks are drawn by every process and are not saved. To train with saved random blocks, use "
                "BlockSparseAttention"
            )
        return list(names[: self.depth])


@dataclass(frozen=True, kw_only=True)
class TransformerLoader(AnyModelLoader):
    """`Transformer`, which has no norm after its layers."""

    seq_len: int
    causal: bool = True
    ff_mult: float = 4
    image_fmap_size: int | None = None
    shift_tokens: bool = False

    def build(self, weights: Weights) -> Stack:
        kinds = self.kinds(self.seq_len)
        sparse = not {*kinds} <= {"full", "sparse"}
        layout = None
        needs = {"rotary_emb": self.rotary_emb, "shift_tokens": self.shift_tokens, "attn_types": sparse}
        names = [name for name, needed in needs.items() if needed]
        if self.image_fmap_size is not None:
            layout = _layout(self.seq_len, self.image_fmap_size, "image_fmap_size")
        elif names:
            raise ValueError(f"image_fmap_size must be given with {', '.join(names)}, got None")
        full = partial(RotatedFullAttention, causal=self.causal)
        blocks: dict[str, Callable[..., nn.Module]] = {**ATTENTION, "full": full, "sparse": full}
        stack = Stack(
            self.dim,
            causal=True if self.causal else None,  # only full attention can be bidirectional upstream
            attention=[blocks[kind] for kind in kinds],
            feedforward=("geglu", {"bias": True}),
            ff_mult=self.ff_mult,
            layer_scale=True,
            token_shift=layout if self.shift_tokens else None,
            layout=layout if sparse else None,
            rotary=TextImageRotary(layout) if self.rotary_emb and layout is not None else None,
            out_bias=True,
            **self.options(),
        )
        stack.norm = nn.Identity()
        if sparse and not self.causal:  # upstream, layers over an image stay causal
            for module in stack.modules():
                if isinstance(module, RotatedFullAttention):
                    module.causal = False
        return stack

    def transfer(self, move: Transfer) -> None:
        _move_stack(move)


@dataclass(frozen=True, kw_only=True)
class DALLELoader(AnyModelLoader):
    """`DALLE` without its image autoencoder: `num_image_tokens` and `image_fmap_size` replace it in the arguments."""

    num_image_tokens: int
    image_fmap_size: int
    num_text_tokens: int = 10000
    text_seq_len: int = 256
    loss_img_weight: float = 7
    shift_tokens: bool = True
    share_input_output_emb: bool = False

    def build(self, weights: Weights) -> OldTextToImage:
        return OldTextToImage(
            text_len=self.text_seq_len,
            height=self.image_fmap_size,
            width=self.image_fmap_size,
            attention=self.kinds(self.text_seq_len + self.image_fmap_size**2),
            positions="rotary" if self.rotary_emb else "learned",
            token_shift=self.shift_tokens,
            image_loss_weight=self.loss_img_weight,
            tie_embeddings=self.share_input_output_emb,
            **self.same("num_text_tokens", "num_image_tokens", "dim", "stable"),
            **self.options(),
        )

    def transfer(self, move: Transfer) -> None:
        move.weights.leave("vae.", "the image autoencoder is a model of its own")
        _move_stack(move.at("stack.", "transformer."))
        move.fill({"stack.norm.1" if self.stable else "stack.norm": "to_logits.0", "to_logits": "to_logits.1"})
        if self.share_input_output_emb:
            move.weights.repeat("text_emb.linear.", "to_logits.1.")
            move.weights.repeat("image_emb.linear.", "to_logits.1.")
        else:
            move.put("embedding.weight", "text_emb.weight", "image_emb.weight")
        if not self.rotary_emb:
            move.put("text_positions", "text_pos_emb.weight")
            dot = "_" if "image_pos_emb.weights_0" in move.weights else "."  # "_" in older versions
            move.put("row_positions", f"image_pos_emb.weights{dot}0")
            move.put("column_positions", f"image_pos_emb.weights{dot}1")


def _layout(seq_len: int, side: int, name: str) -> TextImageLayout:
    text_len = seq_len + 1 - side**2
    if text_len < 1:
        raise ValueError(f"{name} must leave text before the image, got {name}={side} with {seq_len=}")
    return TextImageLayout(text_len, side, side)


def _move_stack(move: Transfer) -> None:
    move.weights.leave(f"{move.source}pos_emb", "a table that is recomputed")
    stack: Stack = move.target()
    shift = "fn.fn." if stack.token_shift is not None else ""
    first: dict[nn.Module, str] = {}  # upstream prefixes of the layers, which may be shared
    for layer in range(len(stack.layers)):
        for place, (inner, move_block) in enumerate((("fn.fn.fn.", _move_attention), ("fn.fn.", _move_feedforward))):
            source = f"blocks.{layer}.{'fg'[place]}.net." if stack.reversible else f"layers.{layer}.{place}."
            here = move.at(f"layers.{layer}.sublayers.{place}.", f"layers.{source}")
            here.put("residual.scale.weight", "scale")
            here.fill({"residual.norm": "fn.norm"})
            if hasattr(here.target("residual"), "norm_out"):
                here.fill({"residual.norm_out": "fn.norm_out"})
            block = here.at("block.block." if stack.token_shift is not None else "block.", f"{inner}{shift}")
            source = first.setdefault(block.target(), block.source)
            if source == block.source:
                move_block(block)
            else:
                move.weights.repeat(block.source, source)


def _move_attention(move: Transfer) -> None:
    move.qkv("to_qkv")
    move.fill({"to_out": "to_out.0"})


def _move_feedforward(move: Transfer) -> None:
    move.split(("to_hidden", "to_gate"), "net.0")
    move.fill({"to_out": "net.3"})


CLASSES: dict[str, type[Loader]] = {
    "Attention": AttentionLoader,
    "DALLE": DALLELoader,
    "SparseAxialCausalAttention": AxialLoader,
    "SparseConvCausalAttention": ConvLoader,
    "Transformer": TransformerLoader,
}
