"""Memformer: an encoder, with or without a decoder, that carries a memory from segment to segment.

Paper: Memformer, https://arxiv.org/abs/2010.06891
Upstream: memformer, `Memformer`.
Differs: T5's buckets the right way round; padded targets are left out of the loss; cached decoding; unknown arguments
and a decoder without a context are errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_padding, check_positive, check_tokens
from attention_zoo.layers.memory_update import InitialMemory, MemoryUpdate
from attention_zoo.layers.positions import RelativeBias
from attention_zoo.models.layer_specs import BlockSpec
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops.losses import next_token_loss
from attention_zoo.saving.saved_model import SavedModel


class MemformerOutput(NamedTuple):
    """What one segment gives.

    Attributes:
        encoded: (b, n, d), the encoder's features.
        memory: (b, m, d), for the next segment.
        logits: (b, t, dec_num_tokens) of the token after each target token; None without a target.
        loss: mean cross entropy of the target's real tokens, in nats; None without a target.
    """

    encoded: Tensor
    memory: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None


class Memformer(SavedModel):
    """Encoder layers: self attention, reading the memory, feedforward. Decoder layers read the encoder's output.

    Each side has one T5 relative bias, shared by its layers: bidirectional in the encoder, causal in the decoder.
    Time O(n^2 d + n m d) per segment, whatever came before; what is carried over is m d numbers.

    Args:
        dim: features d.
        memory_slots: slots m of the memory.
        enc_num_tokens, enc_depth, enc_heads: vocabulary, layers and heads, of d / heads features, of the encoder.
        enc_max_seq_len: the longest segment of source, in tokens. None: no limit.
        dec_num_tokens, dec_depth, dec_heads, dec_max_seq_len: the same of the decoder. Without dec_num_tokens and
            dec_depth there is none: encoder only.
        memory_updates: how many times a segment is written to the memory.
        memory_heads: heads with which it is written.
        ff_mult: hidden features of feedforwards as a multiple of dim.
        attn_dropout, ff_dropout: probabilities with which attention weights and hidden features are dropped.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> model = Memformer(dim=512, memory_slots=128, enc_num_tokens=256, enc_depth=6)
        >>> memory = model.initial_memory(batch)
        >>> for segment in segments:
        ...     encoded, memory, *_ = model(segment, memory=memory)
    """

    encoder_blocks: ClassVar[Sequence[BlockSpec]] = ("full", "cross")
    decoder_blocks: ClassVar[Sequence[BlockSpec]] = ("full", "cross")

    def __init__(
        self,
        *,
        dim: int,
        memory_slots: int,
        enc_num_tokens: int,
        enc_depth: int,
        enc_heads: int = 8,
        enc_max_seq_len: int | None = None,
        dec_num_tokens: int | None = None,
        dec_depth: int | None = None,
        dec_heads: int = 8,
        dec_max_seq_len: int | None = None,
        memory_updates: int = 1,
        memory_heads: int = 8,
        ff_mult: float = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.remember(locals())
        if (dec_num_tokens is None) != (dec_depth is None):
            raise ValueError(f"dec_depth must be given with dec_num_tokens, got {dec_depth=}, {dec_num_tokens=}")
        if dec_num_tokens is None and dec_max_seq_len is not None:
            raise ValueError(f"dec_max_seq_len must come with a decoder, got {dec_max_seq_len=}, {dec_num_tokens=}")
        check_positive(enc_num_tokens=enc_num_tokens, dec_num_tokens=dec_num_tokens)
        check_positive(enc_max_seq_len=enc_max_seq_len, dec_max_seq_len=dec_max_seq_len)
        options = {"ff_mult": ff_mult, "attn_dropout": attn_dropout, "ff_dropout": ff_dropout}
        self.enc_num_tokens = enc_num_tokens
        self.enc_max_seq_len = enc_max_seq_len
        self.num_tokens = dec_num_tokens
        self.max_seq_len = dec_max_seq_len
        self.memory = InitialMemory(memory_slots, dim)
        self.source_embedding = _embedding(enc_num_tokens, dim)
        self.encoder = _body(self.encoder_blocks, dim, enc_depth, enc_heads, "enc_heads", causal=False, **options)
        self.update = MemoryUpdate(dim, heads=memory_heads, updates=memory_updates, ff_mult=ff_mult)
        self.target_embedding: nn.Embedding | None = None
        self.decoder: Stack | None = None
        self.to_logits: nn.Linear | None = None
        if dec_num_tokens is not None and dec_depth is not None:
            self.target_embedding = _embedding(dec_num_tokens, dim)
            self.decoder = _body(self.decoder_blocks, dim, dec_depth, dec_heads, "dec_heads", causal=True, **options)
            self.to_logits = nn.Linear(dim, dec_num_tokens)

    @property
    def takes_target(self) -> bool:
        """Whether there is a decoder, and so a target that `forward` takes."""
        return self.decoder is not None

    def initial_memory(self, batch: int) -> Tensor:
        """The learned memory before the first segment, (batch, m, d)."""
        return cast(Tensor, self.memory(batch))

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> MemformerOutput:
        """Read and write the memory over one segment, and predict its target.

        Args:
            source: (b, n) int.
            target: (b, t) int, t >= 2, for the decoder; None to read the source alone.
            memory: (b, m, d), what the segment before gave; None for the initial one.
            mask, target_mask: (b, n) and (b, t) bool, True = a real token.

        Raises:
            ValueError, TypeError: an argument does not fit; a target without a decoder.
        """
        encoded, memory = self._encode(source, memory, mask)
        if target is None:
            if target_mask is not None:
                raise ValueError("target_mask must come with a target, got target=None")
            return MemformerOutput(encoded, memory)
        self._check_target(target, target_mask, batch=source.shape[0], total=target.shape[-1])
        if target.shape[1] < 2:
            raise ValueError(f"target must hold at least two tokens for a loss, got shape {tuple(target.shape)}")
        embedding, decoder, to_logits = self._decoder()
        x = decoder(embedding(target), mask=target_mask, context=encoded, context_mask=mask)
        logits = to_logits(x)
        return MemformerOutput(encoded, memory, logits, next_token_loss(logits[:, :-1], target, target_mask))

    def step(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """Logits after each of some new target tokens.

        Args:
            tokens: (b, t) int, any t >= 1.
            state: what the step before returned; None at the start. It keeps its meaning.
            mask: (b, t) bool over the new tokens.
            context, context_mask: `encoded` of the source and the source's mask; with the first step alone.

        Returns:
            (b, t, dec_num_tokens) and the new state.

        Raises:
            ValueError: no decoder, no context at the first step, or more than dec_max_seq_len tokens.
        """
        embedding, decoder, to_logits = self._decoder()
        if state is None and context is None:
            raise ValueError("context must be given with the first step: encode a source, or decode through read()")
        # Under compile a length held in a tensor is no number to decide on.
        known = self.max_seq_len is not None and state is not None and not torch.compiler.is_compiling()
        start = state.length if state is not None and known else 0
        self._check_target(tokens, mask, batch=tokens.shape[0], total=start + tokens.shape[-1], name="tokens")
        x, state = decoder.step(embedding(tokens), state, mask=mask, context=context, context_mask=context_mask)
        return to_logits(x), state

    def read(self, source: Tensor, *, memory: Tensor | None = None, mask: Tensor | None = None) -> TargetDecoder:
        """Read a segment of source, in the mode that the model is in, and get what decodes its target.

        Example:
            >>> memory = None
            >>> for segment in segments:
            ...     reading = model.read(segment, memory=memory)
            ...     answer, memory = attention_zoo.generate(reading, prompt, 20), reading.memory
        """
        self._decoder()
        encoded, memory = self._encode(source, memory, mask)
        return TargetDecoder(self, encoded, memory, mask)

    def _encode(self, source: Tensor, memory: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        check_tokens(source, self.enc_num_tokens, name="source")
        check_padding(mask, source)
        if self.enc_max_seq_len is not None and source.shape[1] > self.enc_max_seq_len:
            limit, got = self.enc_max_seq_len, source.shape[1]
            raise ValueError(f"source must be one segment, of at most enc_max_seq_len={limit} tokens, got {got}")
        memory = self.initial_memory(source.shape[0]) if memory is None else memory
        self.memory.check(memory, source.shape[0])
        encoded = self.encoder(self.source_embedding(source), mask=mask, context=memory)
        return encoded, self.update(memory, encoded, mask=mask)

    def _decoder(self) -> tuple[nn.Embedding, Stack, nn.Linear]:
        if self.decoder is None or self.target_embedding is None or self.to_logits is None:
            raise ValueError("target must be None for a model without a decoder: give dec_num_tokens and dec_depth")
        return self.target_embedding, self.decoder, self.to_logits

    def _check_target(
        self, tokens: Tensor, mask: Tensor | None, *, batch: int, total: int, name: str = "target"
    ) -> None:
        self._decoder()
        check_tokens(tokens, cast(int, self.num_tokens), name=name)
        check_padding(mask, tokens, name="mask" if name == "tokens" else "target_mask")
        if tokens.shape[0] != batch:
            raise ValueError(f"{name} must have the batch of the source, got {tokens.shape[0]} and {batch}")
        if self.max_seq_len is not None and total > self.max_seq_len:
            raise ValueError(f"{name} must fit dec_max_seq_len={self.max_seq_len}, got a sequence of {total} tokens")


class TargetDecoder(nn.Module):
    """The decoder over one source that has been read: it has `step`, so `generate` samples from it.

    Attributes:
        encoded: (b, n, d).
        memory: (b, m, d), for the next segment.
    """

    def __init__(self, model: Memformer, encoded: Tensor, memory: Tensor, mask: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.num_tokens = model.num_tokens
        self.max_seq_len = model.max_seq_len
        self.encoded = encoded
        self.memory = memory
        self.mask = mask

    def step(
        self, tokens: Tensor, state: StackState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """Logits after each new target token (b, t), and the new state."""
        if state is not None:
            return self.model.step(tokens, state, mask=mask)
        return self.model.step(tokens, mask=mask, context=self.encoded, context_mask=self.mask)


def _embedding(num_tokens: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(num_tokens, dim)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


def _body(
    blocks: Sequence[BlockSpec], dim: int, depth: int, heads: int, name: str, *, causal: bool, **options: Any
) -> Stack:
    check_positive(dim=dim, **{name: heads})
    if dim % heads:
        raise ValueError(f"{name} must divide dim, got {name}={heads}, {dim=}")
    return Stack(
        dim,
        depth,
        attention=[list(blocks)],
        feedforward=("gelu", {"bias": True}),
        heads=heads,
        dim_head=dim // heads,
        causal=causal,
        bias=RelativeBias(heads, causal=causal),
        qkv_bias=True,
        out_bias=True,
        **options,
    )
