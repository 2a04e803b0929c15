"""Weights of memformer.

Upstream, the encoder has the distance buckets of causal attention and the decoder those of bidirectional attention, a
masked query reads the mean of all values, and the loss counts padding. Causal attention to a context runs only if the
context is as long as the input, or the input is one token, which attends to all keys; here other contexts are aligned
at the last key, or refused where there is no alignment. A model with num_mem_updates=0 never writes: its memory stays
as it is, and the weights of the update are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from attention_zoo.attention import CrossAttention, FullAttention
from attention_zoo.interop.loader import Loader
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.memory_update import MemoryUpdate
from attention_zoo.layers.positions import RelativeBias
from attention_zoo.models import Memformer
from attention_zoo.ops.losses import LossTerm, count_next_tokens, next_token_loss
from attention_zoo.ops.softmax import softmax_attention


class AveragingAttention(FullAttention):
    """Full attention in which a masked query reads the mean of all values. Args: see `FullAttention`."""

    no_attn_mask = "whose masked queries read the mean of all values"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = super().attend(q, k, v, mask)
        if mask is None:
            return out
        return torch.where(mask[:, None, -q.shape[2] :, None], out, v.mean(2, keepdim=True))


class AveragingCrossAttention(CrossAttention):
    """Cross attention in which a query without visible keys, or a masked one, reads the mean of the whole context.

    Args: see `CrossAttention`.
    """

    no_attn_mask = "whose masked queries read the mean of the context"

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        out = super().forward(x, context, mask=mask, context_mask=context_mask, attn_mask=attn_mask)
        mean = self.to_out(self.to_v(context).mean(1, keepdim=True))
        out = out if mask is None else torch.where(mask[..., None], out, mean)
        return out if context_mask is None else torch.where(context_mask.any(1)[:, None, None], out, mean)


class AlwaysWriting(MemoryUpdate):
    """A memory update that also changes the memory of a row without valid tokens. Args: see `MemoryUpdate`."""

    def forward(self, memory: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.write(memory, x, mask)


class NeverWriting(nn.Module):
    """A memory update that keeps the memory as it is."""

    def forward(self, memory: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """`memory`."""
        return memory


class MemformerAttention(nn.Module):
    """Multi-head attention to x or to a context in which a query without visible keys reads the mean of all values.

    Args:
        dim: features d.
        heads: heads h of d / heads features.
        causal: causal masking, aligned bottom-right: the last query attends to the last key.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int = 8, causal: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads=}, {dim=}")
        self.heads = heads
        self.causal = causal
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        kv_mask: Tensor | None = None,
        attend_self: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            x: (b, i, d).
            context: (b, j, d), source of keys and values; None for x itself.
            mask: (b, i, j) bool.
            query_mask, kv_mask: (b, i) and (b, j) bool; without a context, kv_mask defaults to query_mask.
            attend_self: keys and values are from x followed by the context.

        Returns:
            (b, i, d).

        Raises:
            ValueError: with causal masking, there are fewer keys than queries, or with `attend_self` several queries
                and a context.
        """
        read = x if context is None else torch.cat((x, context), dim=1) if attend_self else context
        projected = self.to_q(x), self.to_k(read), self.to_v(read)
        q, k, v = (rearrange(part, "b n (h e) -> b h n e", h=self.heads) for part in projected)
        if kv_mask is None and context is None:
            kv_mask = query_mask
        queries, keys = x.shape[1], read.shape[1]
        if self.causal and (keys < queries or (attend_self and 1 < queries < keys)):
            raise ValueError(
                "context must hold at least as many tokens as x with causal=True, and with attend_self x must be one "
                f"token, got {queries} queries and {keys} keys with {attend_self=}"
            )
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=x.device)
        allowed = allowed.tril(keys - queries) if self.causal else allowed
        allowed = allowed if query_mask is None else allowed & query_mask[:, None, :, None]
        allowed = allowed if kv_mask is None else allowed & kv_mask[:, None, None]
        allowed = allowed if mask is None else allowed & mask[:, None]
        out = softmax_attention(q, k, v, mask=allowed)
        out = torch.where(allowed.any(-1, keepdim=True), out, v.mean(2, keepdim=True))
        return self.to_out(rearrange(out, "b h n e -> b n (h e)"))


class OldMemformer(Memformer):
    """`Memformer` with upstream's distance buckets and treatment of masks and padding.

    Args:
        memory_updates: number of memory updates per segment; 0 for a memory that is never written.
        arguments: see `Memformer`.
    """

    encoder_cross = CrossAttention
    decoder_cross = AveragingCrossAttention

    def __init__(self, *, memory_updates: int = 1, **arguments: Any) -> None:
        super().__init__(attention=AveragingAttention, memory_updates=max(memory_updates, 1), **arguments)
        old = {"heads": self.update.heads, "updates": memory_updates}
        self.update = NeverWriting() if memory_updates < 1 else AlwaysWriting(self.update.dim, **old)
        for stack in (self.encoder, self.decoder) if self.takes_target else (self.encoder,):
            attention = [sublayer.block for sublayer in stack.sublayers() if isinstance(sublayer.block, FullAttention)]
            swapped = RelativeBias(attention[0].heads, causal=not stack.causal)
            for block in attention:
                block.bias = swapped

    def loss_terms(
        self,
        source: Tensor,
        target: Tensor,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> list[LossTerm]:
        """The loss of `target` (b, t), padding included; `target_mask` is (b, t) or (b, t - 1). See `Memformer`."""
        read = target[:, :-1]
        target_mask = None if target_mask is None else target_mask[:, : read.shape[1]]
        logits = self(source, read, memory=memory, mask=mask, target_mask=target_mask).logits
        return [LossTerm(next_token_loss(logits, target), count_next_tokens(target))]


@dataclass(frozen=True, kw_only=True)
class AttentionLoader(Loader):
    """`Attention`."""

    dim: int
    heads: int = 8
    causal: bool = False
    rel_pos_emb: bool = False  # not read

    def build(self, weights: Weights) -> MemformerAttention:
        return MemformerAttention(self.dim, heads=self.heads, causal=self.causal)

    def transfer(self, move: Transfer) -> None:
        _move_attention(move)


@dataclass(frozen=True, kw_only=True)
class MemformerLoader(Loader):
    """`Memformer`."""

    dim: int
    num_memory_slots: int
    enc_num_tokens: int
    enc_depth: int
    enc_max_seq_len: int | None = None  # not checked
    enc_heads: int = 8
    dec_num_tokens: int | None = None
    dec_depth: int | None = None
    dec_max_seq_len: int | None = None  # not checked
    dec_heads: int = 8
    num_mem_updates: int = 1
    encoder_only: bool = False
    mem_update_attn_heads: int = 8

    def build(self, weights: Weights) -> OldMemformer:
        decoder = self.same("dec_num_tokens", "dec_depth")
        if not self.encoder_only and None in decoder.values():
            raise ValueError(f"dec_num_tokens and dec_depth must be given with a decoder, got {decoder}")
        return OldMemformer(
            memory_slots=self.num_memory_slots,
            memory_updates=self.num_mem_updates,
            memory_heads=self.mem_update_attn_heads,
            **self.same("dim", "enc_num_tokens", "enc_depth", "enc_heads", "dec_heads"),
            **({} if self.encoder_only else decoder),
        )

    def transfer(self, move: Transfer) -> None:
        move.put("memory.weight", "memory_slots")
        move.fill({"source_embedding": "encoder.token_emb"})
        _move_stack(move.at("encoder.", "encoder."))
        if self.num_mem_updates < 1:
            for prefix in ("mem_updater.", "gru.", "mem_ff."):
                move.weights.leave(prefix, "the memory is never written")
        else:
            _move_attention(move.at("update.", "mem_updater."))
            move.fill({"update.gru": "gru", "update.norm": "mem_ff.fn.norm"})
            _move_feedforward(move.at("update.feedforward.", "mem_ff.fn.fn."))
        if not self.encoder_only:
            move.fill({"target_embedding": "decoder.net.token_emb", "to_logits": "decoder.net.to_logits"})
            _move_stack(move.at("decoder.", "decoder.net."))


def _move_stack(move: Transfer) -> None:
    move.fill({"layers.0.sublayers.0.block.bias": "layer_blocks.rel_pos_emb.relative_attention_bias", "norm": "norm"})
    for layer in range(len(move.target("layers"))):
        for place in range(3):
            here = move.at(f"layers.{layer}.sublayers.{place}.", f"layer_blocks.layers.{layer}.{place}.fn.")
            here.fill({"residual.norm": "norm"})
            (_move_feedforward if place == 2 else _move_attention)(here.at("block.", "fn."))


def _move_attention(move: Transfer) -> None:
    move.qkv("to_q", "to_kv")
    move.fill({"to_out": "to_out"})


def _move_feedforward(move: Transfer) -> None:
    move.fill({"to_hidden": "net.0", "to_out": "net.2"})


CLASSES: dict[str, type[Loader]] = {"Attention": AttentionLoader, "Memformer": MemformerLoader}
