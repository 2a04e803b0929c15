"""Weights of quartic-transformer.

Upstream, scores are scaled by e^+0.5, masked tokens count as positions, and the model mixes the heads of two
neighbouring rows (b s) for any number of streams: of streams 0 and 1, 2 and 3, ... where the number is even, of
different texts of the batch where it is odd, which cannot be loaded. The norm weight of the non-linear mix has one
entry per key, so that it belongs to one sequence length unless all entries are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention_zoo.attention import TalkingHeadsAttention
from attention_zoo.interop.loader import Loader
from attention_zoo.interop.normed import Normed
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.norms import RMSNorm
from attention_zoo.models import MultiStreamTransformer
from attention_zoo.models.multi_stream import MultiStreamState
from attention_zoo.ops.documents import Documents

KERNELS = ("weight", "fn.1.weight")  # of linear and of non-linear head mixing


class IndexedPositions(MultiStreamTransformer):
    """`MultiStreamTransformer` in which masked tokens count as positions. Args: see `MultiStreamTransformer`."""

    def _embed(
        self, tokens: Tensor, mask: Tensor | None, state: MultiStreamState | None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        return super()._embed(tokens, None, state, documents)


@dataclass(frozen=True, kw_only=True)
class AnyLoader(Loader):
    """Arguments of both classes."""

    dim: int
    dim_head: int = 64
    heads: int = 8
    non_linear_talking_heads: bool = False
    pre_talking_heads: bool = False
    post_talking_heads: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of `TalkingHeadsAttention` and `MultiStreamTransformer`."""
        kind = "mlp" if self.non_linear_talking_heads else "linear"
        return {
            **self.same("dim", "heads", "dim_head"),
            "pre_softmax": kind if self.pre_talking_heads else None,
            "post_softmax": kind if self.post_talking_heads else None,
            "scale": self.dim_head**0.5,
        }


@dataclass(frozen=True, kw_only=True)
class AttentionLoader(AnyLoader):
    """`Attention`: RMSNorm, then talking heads over (b, streams, n, d), or (b, n, d) for one stream."""

    num_streams: int
    dropout: float = 0.0
    causal: bool = False

    def build(self, weights: Weights) -> Normed:
        block = TalkingHeadsAttention(streams=self.num_streams, **self.same("causal", "dropout"), **self.options())
        return Normed(RMSNorm(self.dim), block)

    def transfer(self, move: Transfer) -> None:
        move.fill({"norm": "rmsnorm"}, weight="scale")
        _move_attention(move.at("block.", ""))


@dataclass(frozen=True, kw_only=True)
class TransformerLoader(AnyLoader):
    """`MultiStreamTransformer`, which is bidirectional."""

    num_tokens: int
    depth: int
    num_streams: int = 2
    max_seq_len: int = 2048
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    ff_mult: float = 4.0
    ablate_cross_stream_talking_heads: bool = False
    pre_talking_heads: bool = True
    post_talking_heads: bool = True
    separate_stream_emb: bool = True

    def build(self, weights: Weights) -> IndexedPositions:
        return IndexedPositions(
            streams=self.num_streams,
            attention=("talking_heads", {"streams": self.mixed_streams(weights)}),
            causal=False,
            cross_stream=not self.ablate_cross_stream_talking_heads,
            separate_embeddings=self.separate_stream_emb,
            **self.same("num_tokens", "depth", "max_seq_len", "attn_dropout", "ff_dropout", "ff_mult"),
            **self.options(),
        )

    def mixed_streams(self, weights: Weights) -> int:
        """The number of neighbouring streams whose heads a layer mixes.

        Raises:
            ValueError: two rows are mixed, which are not all of one text.
        """
        if self.ablate_cross_stream_talking_heads:
            return 1
        kernels = [f"layers.0.0.{name}_talking_heads.{kernel}" for name in ("pre", "post") for kernel in KERNELS]
        if not any(weights[name].shape[1:2] == (2 * self.heads,) for name in kernels if name in weights):
            return self.num_streams
        if self.num_streams % 2:
            raise ValueError(
                f"num_streams must be even for weights that mix the heads of two rows, got {self.num_streams}: the "
                "package mixes rows two by two for any number of streams, so that some read another text of the batch"
            )
        return 2

    def transfer(self, move: Transfer) -> None:
        table = "" if self.separate_stream_emb else ".weight"
        move.put("token_embedding", f"emb.token_emb{table}")
        move.put("position_embedding", f"emb.pos_emb{table}")
        if not self.separate_stream_emb:
            move.put("stream_embedding", "emb.stream_emb")
        over_streams = self.mixed_streams(move.weights) > 1
        for layer in range(self.depth):
            here = move.at(f"stack.layers.{layer}.sublayers.", f"layers.{layer}.")
            here.fill({"0.residual.norm": "0.rmsnorm", "1.residual.norm": "1.0"}, weight="scale")
            _move_attention(here.at("0.block.block." if over_streams else "0.block.", "0."))
            here.fill({"1.block.to_hidden": "1.1", "1.block.to_out": "1.4"})
        move.fill({"norm": "to_logits.1"}, weight="scale")
        move.fill({"to_logits": "to_logits.2"})


def _move_attention(move: Transfer) -> None:
    block: TalkingHeadsAttention = move.target()
    move.qkv("to_qkv.0")
    move.fill({"to_gate": "to_gates.0", "to_out": "to_out.1"})
    for name, mixer in (("pre", block.pre_softmax), ("post", block.post_softmax)):
        if mixer is None:
            continue
        here = move.at(f"{name}_softmax.", f"{name}_talking_heads.")
        if mixer.kind == "linear":
            here.put("weight", "weight")
        else:
            here.put("norm", "fn.0.scale", change=partial(_one_number, count=len(mixer.norm)))
            here.put("w1", "fn.1.weight")
            here.put("w2", "fn.4.weight")


def _one_number(scale: Tensor, count: int) -> Tensor:
    if not torch.equal(scale, scale.flatten()[:1].expand_as(scale)):
        raise ValueError(
            f"the norm weight of the non-linear talking heads must have equal entries, got {scale.numel()} different "
            "ones: it has one entry per key and is defined for one sequence length"
        )
    return scale.flatten()[:1].expand(count)


CLASSES: dict[str, type[Loader]] = {"Attention": AttentionLoader, "MultiStreamTransformer": TransformerLoader}
