"""Weights of quartic-transformer.

Its scale was e^+0.5 in place of e^-0.5, and its groups of streams were fixed at two. The norm weight of its non-linear
mix lay along the keys, so that it belongs to one length, unless all its numbers are equal. Masked tokens counted as
positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.attention import TalkingHeadsAttention
from attention_zoo.interop.normed import Normed
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.norms import RMSNorm
from attention_zoo.models import MultiStreamTransformer
from attention_zoo.models.multi_stream import MultiStreamState


class IndexedPositions(MultiStreamTransformer):
    """`MultiStreamTransformer` whose positions are the tokens' indices, masked tokens counted. Arguments as there."""

    def _embed(self, tokens: Tensor, mask: Tensor | None, state: MultiStreamState | None) -> tuple[Tensor, Tensor]:
        return super()._embed(tokens, None, state)


def load_attention(
    weights: Weights,
    *,
    dim: int,
    num_streams: int,
    dim_head: int = 64,
    heads: int = 8,
    dropout: float = 0.0,
    causal: bool = False,
    pre_talking_heads: bool = False,
    post_talking_heads: bool = False,
    non_linear_talking_heads: bool = False,
) -> nn.Module:
    """`Attention`: RMSNorm, then talking heads over (b, streams, n, d), or (b, n, d) for one stream."""
    kind = "mlp" if non_linear_talking_heads else "linear"
    block = TalkingHeadsAttention(
        dim,
        heads=heads,
        dim_head=dim_head,
        streams=num_streams,
        pre_softmax=kind if pre_talking_heads else None,
        post_softmax=kind if post_talking_heads else None,
        scale=dim_head**0.5,
        causal=causal,
        dropout=dropout,
    )
    module = Normed(RMSNorm(dim), block)
    move = Transfer(weights, module)
    move.put("norm.weight", "rmsnorm.scale")
    _move_attention(move.at("block.", ""), block)
    return module


def load_transformer(
    weights: Weights,
    *,
    dim: int,
    num_tokens: int,
    depth: int,
    num_streams: int = 2,
    dim_head: int = 64,
    heads: int = 8,
    max_seq_len: int = 2048,
    attn_dropout: float = 0.0,
    ff_dropout: float = 0.0,
    ff_mult: float = 4.0,
    ablate_cross_stream_talking_heads: bool = False,
    pre_talking_heads: bool = True,
    post_talking_heads: bool = True,
    separate_stream_emb: bool = True,
    non_linear_talking_heads: bool = False,
) -> MultiStreamTransformer:
    """`MultiStreamTransformer`, which sees both ways."""
    kind = "mlp" if non_linear_talking_heads else "linear"
    model = IndexedPositions(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        streams=num_streams,
        heads=heads,
        dim_head=dim_head,
        max_seq_len=max_seq_len,
        causal=False,
        cross_stream=not ablate_cross_stream_talking_heads,
        pre_softmax=kind if pre_talking_heads else None,
        post_softmax=kind if post_talking_heads else None,
        scale=dim_head**0.5,
        separate_embeddings=separate_stream_emb,
        attn_dropout=attn_dropout,
        ff_dropout=ff_dropout,
        ff_mult=ff_mult,
    )
    move = Transfer(weights, model)
    table = "" if separate_stream_emb else ".weight"
    move.put("token_embedding", f"emb.token_emb{table}")
    move.put("position_embedding", f"emb.pos_emb{table}")
    if not separate_stream_emb:
        move.put("stream_embedding", "emb.stream_emb")
    for layer in range(depth):
        here = move.at(f"stack.layers.{layer}.sublayers.", f"layers.{layer}.")
        here.put("0.residual.norm.weight", "0.rmsnorm.scale")
        over_streams = num_streams > 1 and not ablate_cross_stream_talking_heads
        attend = here.at("0.block.block." if over_streams else "0.block.", "0.")
        _move_attention(attend, model.get_submodule(attend.to.rstrip(".")))
        here.put("1.residual.norm.weight", "1.0.scale")
        here.put("1.block.to_hidden.weight", "1.1.weight")
        here.put("1.block.to_out.weight", "1.4.weight")
    move.put("norm.weight", "to_logits.1.scale")
    move.put("to_logits.weight", "to_logits.2.weight")
    return model


def _move_attention(move: Transfer, block: Any) -> None:
    move.qkv("to_qkv.0")
    move.affine("to_gate", "to_gates.0")
    move.put("to_out.weight", "to_out.1.weight")
    for name in ("pre", "post"):
        mixer = getattr(block, f"{name}_softmax")
        if mixer is None:
            continue
        source = move.at(f"{name}_softmax.", f"{name}_talking_heads.")
        first = "weight" if mixer.kind == "linear" else "fn.1.weight"
        _refuse_pairs(source, first, heads=block.heads, streams=block.streams)
        if mixer.kind == "linear":
            source.put("weight", "weight", change=_matrix)
        else:
            heads = mixer.norm.shape[0]
            source.put("norm", "fn.0.scale", change=lambda scale, heads=heads: _one_number(scale).expand(heads))
            source.put("w1", "fn.1.weight", change=_matrix)
            source.put("w2", "fn.4.weight", change=_matrix)


def _refuse_pairs(move: Transfer, name: str, *, heads: int, streams: int) -> None:
    """Say what is the matter with weights that mix two rows at a time, whatever the number of streams."""
    if f"{move.source}{name}" not in move.weights or streams == 2:
        return
    maps = move.weights.take(f"{move.source}{name}", f"{move.to}{name}").shape[1]
    if maps == 2 * heads:
        raise ValueError(
            f"num_streams must be 2, and mixed, for weights that mix the heads of two rows, got {streams}: the package "
            "mixed rows two by two whatever the number of streams, so that they read other texts of the batch; such "
            "weights cannot be loaded"
        )


def _matrix(kernel: Tensor) -> Tensor:
    """A 1 x 1 convolution's kernel (o, c, 1, 1) as (o, c)."""
    return kernel.flatten(1) if kernel.ndim == 4 and kernel.shape[2:] == (1, 1) else kernel


def _one_number(scale: Tensor) -> Tensor:
    if not torch.equal(scale, scale.flatten()[:1].expand_as(scale)):
        raise ValueError(
            f"the norm weight of the non-linear talking heads must be one number to be loaded, got {scale.numel()} "
            "different ones: it lay along the keys, and holds for sequences of that one length alone"
        )
    return scale.flatten()[:1]


CLASSES: dict[str, Callable[..., nn.Module]] = {"Attention": load_attention, "MultiStreamTransformer": load_transformer}
