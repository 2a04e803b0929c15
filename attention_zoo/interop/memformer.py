"""Weights of memformer.

Its encoder had the distance buckets of a causal side, and its decoder those of a side that sees both ways. A masked
query read the mean of all values, and the loss counted padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import check_padding
from attention_zoo.attention import CrossAttention, FullAttention
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.memory_update import MemoryUpdate
from attention_zoo.layers.positions import RelativeBias
from attention_zoo.models import Memformer
from attention_zoo.models.memformer import MemformerOutput
from attention_zoo.models.stack import Stack
from attention_zoo.ops.losses import LossTerm
from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast


def averaging_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """softmax(e^-0.5 q k^T + bias) v, where hidden pairs score the lowest number there is.

    So a query to which all keys are hidden, in which ours reads 0, reads the mean of all values.

    Args:
        q: (b, h, i, e).
        k, v: (b, h, j, e).
        seen: bool, broadcast to (b, h, i, j); None for all.
        bias: broadcast to (b, h, i, j).

    Returns:
        (b, h, i, e).
    """
    with no_autocast(q):
        scores = q.shape[-1] ** -0.5 * at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)
        scores = scores if bias is None else scores + bias
        scores = scores if seen is None else scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        out: Tensor = scores.softmax(-1) @ at_least_float32(v)
        return out.to(v.dtype)


class AveragingAttention(FullAttention):
    """Full attention in which a masked token reads the mean of all values. Arguments as in `FullAttention`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return super().attend(q, k, v, mask)
        i, j = q.shape[2], k.shape[2]
        pairs = mask[:, None, -i:, None] & mask[:, None, None]
        seen = visible(i, j, mask=pairs, causal=self.causal, device=q.device)
        bias = self.score_bias(q, k)
        return averaging_attention(q, k, v, seen, None if bias is None else bias.pairs(i, j))


class AveragingCrossAttention(CrossAttention):
    """Cross attention in which a masked token reads the mean of the whole context. Arguments as in `CrossAttention`."""

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, *, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        if mask is None and context_mask is None:
            return super().forward(x, context)
        self._check(x, mask)
        keys, values = self._read(context, context_mask, x)
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device)
        seen = seen if mask is None else seen & mask[:, None, :, None]
        seen = seen if context_mask is None else seen & context_mask[:, None, None]
        out = averaging_attention(self._heads(self.to_q(x)), keys, values, seen)
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected


class AlwaysWriting(MemoryUpdate):
    """A memory update that also changes the memory of a row without real tokens. Arguments as in `MemoryUpdate`."""

    def forward(self, memory: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        check_padding(mask, x)
        return self.write(memory, x, mask)


class MemformerAttention(nn.Module):
    """The package's bare attention: out = W_o averaging_attention(W_q x, W_k y, W_v y), y = context, or x without one.

    Args:
        dim: features d.
        heads: heads h of d / heads features.
        causal: hide key j from query i where j > i.
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
            context: (b, j, d), what is read; None for x itself.
            mask: (b, i, j) bool.
            query_mask, kv_mask: (b, i) and (b, j) bool; without a context the second is the first where it is None.
            attend_self: the keys are x, and the context after it.

        Returns:
            (b, i, d).
        """
        read = x if context is None else torch.cat((x, context), dim=1) if attend_self else context
        q, k, v = (
            to(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2)
            for to, y in ((self.to_q, x), (self.to_k, read), (self.to_v, read))
        )
        if kv_mask is None and context is None:
            kv_mask = query_mask
        seen = torch.ones(1, 1, x.shape[1], read.shape[1], dtype=torch.bool, device=x.device)
        seen = seen.tril() if self.causal else seen
        seen = seen if query_mask is None else seen & query_mask[:, None, :, None]
        seen = seen if kv_mask is None else seen & kv_mask[:, None, None]
        seen = seen if mask is None else seen & mask[:, None]
        out = averaging_attention(q, k, v, seen)
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected


class OldMemformer(Memformer):
    """`Memformer` as its old weights were trained: see the head of this file. Arguments as in `Memformer`."""

    encoder_blocks = (AveragingAttention, CrossAttention)
    decoder_blocks = (AveragingAttention, AveragingCrossAttention)

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> MemformerOutput:
        """As in `Memformer`, but the last target token is not read.

        Args:
            source, memory, mask: see `Memformer`.
            target: (b, t) int.
            target_mask: (b, t) or (b, t - 1) bool; what it says of the last token, which is not read, does not matter.

        Returns:
            See `Memformer`; logits are (b, t - 1, dec_num_tokens), without those after the last token.
        """
        encoded, memory = self._encode(source, memory, mask)
        if target is None:
            return MemformerOutput(encoded, memory)
        read = target[:, :-1]
        target_mask = None if target_mask is None else target_mask[:, : read.shape[1]]
        x = self.decoder(self.target_embedding(read), mask=target_mask, context=encoded, context_mask=mask)
        return MemformerOutput(encoded, memory, self.to_logits(x))

    def loss_terms(
        self,
        source: Tensor,
        target: Tensor,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> list[LossTerm]:
        """As in `Memformer`, but padded targets count."""
        logits = self(source, target, memory=memory, mask=mask, target_mask=target_mask).logits
        targets = target[:, 1:].flatten()
        mean = F.cross_entropy(logits.flatten(0, 1), targets)
        return [LossTerm(mean, torch.tensor(targets.numel(), device=targets.device))]


def load_attention(
    weights: Weights, *, dim: int, heads: int = 8, causal: bool = False, rel_pos_emb: bool = False
) -> MemformerAttention:
    """`Attention`; its `rel_pos_emb` was never read."""
    module = MemformerAttention(dim, heads=heads, causal=causal)
    move = Transfer(weights, module)
    _move_attention(move)
    return module


def load_memformer(
    weights: Weights,
    *,
    dim: int,
    num_memory_slots: int,
    enc_num_tokens: int,
    enc_depth: int,
    enc_max_seq_len: int | None = None,
    enc_heads: int = 8,
    dec_num_tokens: int | None = None,
    dec_depth: int | None = None,
    dec_max_seq_len: int | None = None,
    dec_heads: int = 8,
    num_mem_updates: int = 1,
    encoder_only: bool = False,
    mem_update_attn_heads: int = 8,
) -> OldMemformer:
    """`Memformer`; the longest lengths, which it never checked, are left out."""
    decodes = not encoder_only
    if decodes and (dec_num_tokens is None or dec_depth is None):
        raise ValueError(f"dec_num_tokens and dec_depth must be given, got {dec_num_tokens=}, {dec_depth=}")
    model = OldMemformer(
        dim=dim,
        memory_slots=num_memory_slots,
        enc_num_tokens=enc_num_tokens,
        enc_depth=enc_depth,
        enc_heads=enc_heads,
        dec_num_tokens=dec_num_tokens if decodes else None,
        dec_depth=dec_depth if decodes else None,
        dec_heads=dec_heads,
        memory_updates=num_mem_updates,
        memory_heads=mem_update_attn_heads,
    )
    update = AlwaysWriting(dim, heads=mem_update_attn_heads, updates=num_mem_updates)
    model.update = update
    move = Transfer(weights, model)
    move.put("memory.weight", "memory_slots")
    move.put("source_embedding.weight", "encoder.token_emb.weight")
    _move_stack(move.at("encoder.", "encoder."), model.encoder)
    _move_attention(move.at("update.", "mem_updater."))
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        move.put(f"update.gru.{name}", f"gru.{name}")
    move.affine("update.norm", "mem_ff.fn.norm")
    _move_feedforward(move.at("update.feedforward.", "mem_ff.fn.fn."))
    if model.takes_target:
        move.put("target_embedding.weight", "decoder.net.token_emb.weight")
        _move_stack(move.at("decoder.", "decoder.net."), model.decoder)
        move.affine("to_logits", "decoder.net.to_logits")
    return model


def _move_stack(move: Transfer, stack: Stack) -> None:
    self_attention = [sub.block for sub in stack.sublayers() if isinstance(sub.block, FullAttention)]
    swapped = RelativeBias(self_attention[0].heads, causal=not stack.causal)
    for block in self_attention:
        block.bias = swapped
    first = move.at("layers.0.sublayers.0.block.bias.", "layer_blocks.rel_pos_emb.relative_attention_bias.")
    first.put("weight", "weight")
    for layer in range(len(stack.layers)):
        for place in range(3):
            here = move.at(f"layers.{layer}.sublayers.{place}.", f"layer_blocks.layers.{layer}.{place}.fn.")
            here.affine("residual.norm", "norm")
            (_move_feedforward if place == 2 else _move_attention)(here.at("block.", "fn."))
    move.affine("norm", "norm")


def _move_attention(move: Transfer) -> None:
    move.qkv("to_q", "to_kv", bias=True)
    move.affine("to_out", "to_out")


def _move_feedforward(move: Transfer) -> None:
    move.affine("to_hidden", "net.0")
    move.affine("to_out", "net.2")


CLASSES: dict[str, Callable[..., nn.Module]] = {"Attention": load_attention, "Memformer": load_memformer}
