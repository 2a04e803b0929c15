"""Weights of flash-cosine-sim-attention.

Upstream, the transformer's `attn_l2norm_groups` does not reach its layers: its weights are trained with one group.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from attention_zoo.attention import CosineSimAttention, FullAttention
from attention_zoo.interop.loader import Loader
from attention_zoo.interop.normed import Normed
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.norms import LayerNorm
from attention_zoo.models import LanguageModel, cosine_sim_lm


@dataclass(frozen=True, kw_only=True)
class AnyLoader(Loader):
    """Arguments of both classes."""

    dim: int
    dim_head: int = 64
    heads: int = 8
    pre_norm: bool = False
    use_cuda_kernel: bool = False  # does not change the result
    non_cosine_sim_attn: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionLoader(AnyLoader):
    """`Attention`, which is always causal."""

    scale: float = 8
    l2norm_groups: int = 1

    def build(self, weights: Weights) -> nn.Module:
        options = self.same("heads", "dim_head")
        if self.non_cosine_sim_attn:
            block: nn.Module = FullAttention(self.dim, **options)
        else:
            block = CosineSimAttention(self.dim, scale=self.scale, groups=self.l2norm_groups, **options)
        return Normed(LayerNorm(self.dim), block) if self.pre_norm else block

    def transfer(self, move: Transfer) -> None:
        if self.pre_norm:
            move.fill({"norm": "norm"})
        _move_attention(move.at("block." if self.pre_norm else "", ""))


@dataclass(frozen=True, kw_only=True)
class TransformerLoader(AnyLoader):
    """`CosineSimCausalTransformer`."""

    num_tokens: int
    max_seq_len: int
    depth: int
    attn_scale: float = 8
    attn_l2norm_groups: int = 1  # does not reach the layers

    def build(self, weights: Weights) -> LanguageModel:
        options = self.same("num_tokens", "dim", "depth", "max_seq_len", "heads", "dim_head", "pre_norm")
        return cosine_sim_lm(scale=self.attn_scale, cosine_sim=not self.non_cosine_sim_attn, **options)

    def transfer(self, move: Transfer) -> None:
        move.fill({"token_embedding": "token_emb", "positions": "pos_emb"})
        norms = ("0.norm", "2.0") if self.pre_norm else ("1", "3")
        for layer in range(self.depth):
            here = move.at(f"stack.layers.{layer}.sublayers.", f"layers.{layer}.")
            _move_attention(here.at("0.block.", "0."))
            here.fill({"0.residual.norm": norms[0], "1.residual.norm": norms[1]})
            here.fill({"1.block.to_hidden": "2.1", "1.block.to_out": "2.3"})
        move.fill({"stack.norm": "to_logits.0", "to_logits": "to_logits.1"})


def _move_attention(move: Transfer) -> None:
    move.qkv("to_q", "to_k", "to_v")
    move.fill({"to_out": "to_out"})


CLASSES: dict[str, type[Loader]] = {"Attention": AttentionLoader, "CosineSimCausalTransformer": TransformerLoader}
