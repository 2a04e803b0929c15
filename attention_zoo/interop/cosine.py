"""Weights of flash-cosine-sim-attention.

The transformer's `attn_l2norm_groups` never reached its layers: its weights were trained with one group.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from attention_zoo.attention import CosineSimAttention, FullAttention
from attention_zoo.interop.normed import Normed
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.norms import LayerNorm
from attention_zoo.models import LanguageModel, cosine_sim_lm


def load_attention(
    weights: Weights,
    *,
    dim: int,
    dim_head: int = 64,
    heads: int = 8,
    scale: float = 8,
    l2norm_groups: int = 1,
    pre_norm: bool = False,
    use_cuda_kernel: bool = False,
    non_cosine_sim_attn: bool = False,
) -> nn.Module:
    """`Attention`, always causal; the kernel changes no number."""
    block: nn.Module
    if non_cosine_sim_attn:
        block = FullAttention(dim, heads=heads, dim_head=dim_head)
    else:
        block = CosineSimAttention(dim, heads=heads, dim_head=dim_head, scale=scale, groups=l2norm_groups)
    module = Normed(LayerNorm(dim), block) if pre_norm else block
    move = Transfer(weights, module)
    if pre_norm:
        move.affine("norm", "norm")
    _move_attention(move.at("block." if pre_norm else "", ""))
    return module


def load_transformer(
    weights: Weights,
    *,
    num_tokens: int,
    dim: int,
    max_seq_len: int,
    depth: int,
    attn_scale: float = 8,
    attn_l2norm_groups: int = 1,
    heads: int = 8,
    dim_head: int = 64,
    use_cuda_kernel: bool = False,
    pre_norm: bool = False,
    non_cosine_sim_attn: bool = False,
) -> LanguageModel:
    """`CosineSimCausalTransformer`; the groups and the kernel change no number."""
    model = cosine_sim_lm(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        max_seq_len=max_seq_len,
        heads=heads,
        dim_head=dim_head,
        scale=attn_scale,
        pre_norm=pre_norm,
        cosine_sim=not non_cosine_sim_attn,
    )
    move = Transfer(weights, model)
    move.put("token_embedding.weight", "token_emb.weight")
    move.put("positions.weight", "pos_emb.weight")
    norms = ("0.norm", "2.0") if pre_norm else ("1", "3")
    for layer in range(depth):
        here = move.at(f"stack.layers.{layer}.sublayers.", f"layers.{layer}.")
        _move_attention(here.at("0.block.", "0."))
        here.affine("0.residual.norm", norms[0])
        here.affine("1.residual.norm", norms[1])
        here.put("1.block.to_hidden.weight", "2.1.weight")
        here.put("1.block.to_out.weight", "2.3.weight")
    if pre_norm:
        move.affine("stack.norm", "to_logits.0")
    move.put("to_logits.weight", "to_logits.1.weight")
    return model


def _move_attention(move: Transfer) -> None:
    move.qkv("to_q", "to_k", "to_v")
    move.put("to_out.weight", "to_out.weight")


CLASSES: dict[str, Callable[..., nn.Module]] = {
    "Attention": load_attention,
    "CosineSimCausalTransformer": load_transformer,
}
