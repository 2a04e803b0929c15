"""Memformer: an encoder, optionally with a decoder, that passes a memory from one segment to the next.

Paper: Memformer, https://arxiv.org/abs/2010.06891
Upstream: memformer, `Memformer`.
Differs: the relative bias of the encoder is bidirectional and that of the decoder causal, where upstream has them
swapped; by default upstream's memory update, with memory_update="paper" that of the paper; padded targets are left out
of the loss; cached decoding; unknown arguments and a decoder without a context are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from attention_zoo._checks import check_int, check_padding, check_positive, check_tokens
from attention_zoo.layers.positions import RelativeBias, Rotary
from attention_zoo.layers.projections import project_logits
from attention_zoo.models.composed_model import ComposedModel
from attention_zoo.models.layer_specs import AttentionSpec, BlockSpec, parse_layers, takes_part
from attention_zoo.models.memory import MemoryMixin, MemoryUpdateSpec, make_initial_memory, make_memory_update
from attention_zoo.models.positions import check_length, embed_tokens
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops.losses import LossTerm, count_next_tokens, next_token_loss, total_loss


class MemformerOutput(NamedTuple):
    """Output of one segment.

    Attributes:
        encoded: (b, n, d), the encoder's features.
        memory: (b, m, d), for the next segment.
        logits: (b, t, dec_num_tokens) of the token after each target token; None without a target.
    """

    encoded: Tensor
    memory: Tensor
    logits: Tensor | None = None


class Memformer(MemoryMixin, ComposedModel):
    """Encoder and optional decoder, with a memory that is passed from one segment to the next.

    An encoder layer is self-attention, cross-attention to the memory and a feedforward; a decoder layer attends to the
    encoder's output in place of the memory. The encoder layers share one T5 relative position bias, bidirectional; the
    decoder layers share another, causal.

    Time O(n^2 d + n m d) per segment, whatever the number of segments before it. State between segments: m d numbers.

    Args:
        dim: features d.
        memory_slots: slots m of the memory.
        enc_num_tokens, enc_depth, enc_heads: vocabulary, layers and heads, of d / heads features, of the encoder.
        enc_max_seq_len: the longest source segment, in tokens. None: no limit.
        dec_num_tokens, dec_depth, dec_heads, dec_max_seq_len: the same of the decoder. None for the first two: no
            decoder.
        attention: self-attention of the encoder, bidirectional; see `Stack`. Blocks with neither an argument `bias` nor
            `rotary` get no positions; those without `bias` get rotary positions.
        dec_attention: self-attention of the decoder, causal. None: as `attention`.
        memory_update: "gru", upstream's `MemoryUpdate`; "paper", slot attention with biased memory normalisation, see
            `BiasedMemoryUpdate`; or (name, options), such as ("paper", {"temperature": 0.5}).
        memory_updates: number of memory updates per segment.
        memory_heads: number of heads of the memory update.
        ff_mult, attn_dropout, ff_dropout: see `Stack`.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.

    Example:
        >>> model = Memformer(dim=512, memory_slots=128, enc_num_tokens=256, enc_depth=6)
        >>> memory = model.initial_memory(batch)
        >>> for segment in segments:
        ...     encoded, memory, _ = model(segment, memory=memory)
    """

    stacks: ClassVar[Mapping[str, str]] = {"attention": "encoder", "dec_attention": "decoder"}
    encoder_cross: ClassVar[BlockSpec] = "cross"
    decoder_cross: ClassVar[BlockSpec] = "cross"

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
        attention: AttentionSpec = "full",
        dec_attention: AttentionSpec | None = None,
        memory_update: MemoryUpdateSpec = "gru",
        memory_updates: int = 1,
        memory_heads: int = 8,
        ff_mult: float = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if (dec_num_tokens is None) != (dec_depth is None):
            raise ValueError(f"dec_depth must be given with dec_num_tokens, got {dec_depth=}, {dec_num_tokens=}")
        if dec_num_tokens is None and dec_max_seq_len is not None:
            raise ValueError(f"dec_max_seq_len must come with a decoder, got {dec_max_seq_len=}, {dec_num_tokens=}")
        check_int(1, enc_num_tokens=enc_num_tokens)
        check_positive(dec_num_tokens=dec_num_tokens)
        check_positive(enc_max_seq_len=enc_max_seq_len, dec_max_seq_len=dec_max_seq_len)
        options = {"ff_mult": ff_mult, "attn_dropout": attn_dropout, "ff_dropout": ff_dropout}
        self.enc_num_tokens = enc_num_tokens
        self.enc_max_seq_len = enc_max_seq_len
        self.num_tokens = dec_num_tokens
        self.max_seq_len = dec_max_seq_len
        self.takes_target = dec_num_tokens is not None  # whether there is a decoder
        self.memory = make_initial_memory(memory_update, memory_slots, dim)
        self.source_embedding = _embedding(enc_num_tokens, dim)
        if dec_attention is not None and dec_depth is None:
            raise ValueError(f"dec_attention must come with a decoder, got {dec_attention=}, {dec_depth=}")
        self.encoder = _make_stack(
            attention, self.encoder_cross, dim, enc_depth, enc_heads, "enc_heads", causal=False, **options
        )
        self.update = make_memory_update(
            memory_update,
            dim,
            memory_slots=memory_slots,
            heads=memory_heads,
            updates=memory_updates,
            ff_mult=ff_mult,
        )
        if dec_num_tokens is not None and dec_depth is not None:
            self.target_embedding = _embedding(dec_num_tokens, dim)
            self.decoder = _make_stack(
                attention if dec_attention is None else dec_attention,
                self.decoder_cross,
                dim,
                dec_depth,
                dec_heads,
                "dec_heads",
                causal=True,
                **options,
            )
            self.to_logits = nn.Linear(dim, dec_num_tokens)

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> MemformerOutput:
        """Encode one segment, update the memory, and compute the logits of its target.

        Args:
            source: (b, n) int.
            target: (b, t) int, for the decoder; None to encode only.
            memory: (b, m, d), the memory after the previous segment. None: the initial memory.
            mask, target_mask: (b, n) and (b, t) bool, True = a valid token.

        Raises:
            ValueError, TypeError: an argument is invalid, or a target is given to a model without a decoder.
        """
        encoded, memory = self._encode(source, memory, mask)
        if target is None:
            if target_mask is not None:
                raise ValueError("target_mask must come with a target, got target=None")
            return MemformerOutput(encoded, memory)
        self._check_decoder()
        x = embed_tokens(self.target_embedding, target, None, dim=self.decoder.dim, name="target")
        check_padding(target_mask, target, name="target_mask")
        if target.shape[0] != source.shape[0]:
            raise ValueError(
                f"target must have the batch size of the source, got {target.shape[0]} and {source.shape[0]}"
            )
        check_length(target, None, self.max_seq_len, name="target", limit="dec_max_seq_len")
        x = self.decoder(x, mask=target_mask, context=encoded, context_mask=mask)
        return MemformerOutput(encoded, memory, project_logits(self.to_logits, x))

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy, in nats, of every valid target token given the source, the memory and those before it.

        Args:
            source, memory, mask, target_mask: see `forward`.
            target: (b, t) int with t >= 2.
        """
        return total_loss(self.loss_terms(source, target, memory=memory, mask=mask, target_mask=target_mask))

    def loss_terms(
        self,
        source: Tensor,
        target: Tensor,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> list[LossTerm]:
        """The loss as a mean and its count of targets. Arguments as in `loss`."""
        self._check_decoder()
        check_tokens(target, self.target_embedding.num_embeddings, name="target", minimum=2)
        output = self(source, target, memory=memory, mask=mask, target_mask=target_mask)
        mean = next_token_loss(output.logits[:, :-1], target, target_mask)
        return [LossTerm(mean, count_next_tokens(target, target_mask))]

    def step(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """Logits after each new target token.

        Args:
            tokens: (b, t) int, any t >= 1.
            state: the state returned by the previous step; None for the first. It is not modified.
            mask: (b, t) bool, True = a valid token.
            context, context_mask: `encoded` of the source and the source's mask; given with the first step only.

        Returns:
            (b, t, dec_num_tokens) and the new state.

        Raises:
            ValueError: the model has no decoder, the first step has no context, or there are more than dec_max_seq_len
                tokens.
        """
        self._check_decoder()
        if state is None and context is None:
            raise ValueError("context must be given with the first step: encode a source, or decode through read()")
        x = embed_tokens(self.target_embedding, tokens, None, dim=self.decoder.dim)
        check_padding(mask, tokens)
        check_length(tokens, state, self.max_seq_len, limit="dec_max_seq_len")
        x, state = self.decoder.step(x, state, mask=mask, context=context, context_mask=context_mask)
        return project_logits(self.to_logits, x), state

    def read(self, source: Tensor, *, memory: Tensor | None = None, mask: Tensor | None = None) -> TargetDecoder:
        """Encode a source segment and return the decoder of its target, from which `generate` samples.

        The model stays in its mode, training or eval. Arguments as in `forward`.

        Example:
            >>> memory = None
            >>> for segment in segments:
            ...     reading = model.read(segment, memory=memory)
            ...     answer, memory = attention_zoo.generate(reading, prompt, 20), reading.memory
        """
        self._check_decoder()
        encoded, memory = self._encode(source, memory, mask)
        return TargetDecoder(self, encoded, memory, mask)

    def _encode(self, source: Tensor, memory: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x = embed_tokens(self.source_embedding, source, None, dim=self.encoder.dim, name="source")
        check_padding(mask, source)
        check_length(source, None, self.enc_max_seq_len, name="source", limit="enc_max_seq_len")
        memory = self.initial_memory(source.shape[0]) if memory is None else memory
        self._start.check(memory, source.shape[0])
        encoded = self.encoder(x, mask=mask, context=memory)
        return encoded, self.update(memory, encoded, mask=mask)

    def _check_decoder(self) -> None:
        if not self.takes_target:
            raise ValueError("target must be None for a model without a decoder: give dec_num_tokens and dec_depth")


class TargetDecoder(nn.Module):
    """The decoder of a model over one encoded source. It has `step`, so `generate` samples from it.

    Attributes:
        encoded: (b, n, d), the encoder's features.
        memory: (b, m, d), for the next segment of a `Memformer`; None for other models.
    """

    def __init__(self, model: nn.Module, encoded: Tensor, memory: Tensor | None, mask: Tensor | None) -> None:
        super().__init__()
        self.model: Any = model
        self.num_tokens = self.model.num_tokens
        self.max_seq_len = self.model.max_seq_len
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


def _make_stack(
    attention: AttentionSpec,
    cross: BlockSpec,
    dim: int,
    depth: int,
    heads: int,
    name: str,
    *,
    causal: bool,
    **options: Any,
) -> Stack:
    check_int(1, dim=dim, **{name: heads})
    if dim % heads:
        raise ValueError(f"{name} must divide dim, got {name}={heads}, {dim=}")
    positions: dict[str, Any] = {"bias": RelativeBias(heads, causal=causal)}
    if not takes_part(attention, "bias"):
        positions = {"rotary": Rotary()}
    stack = Stack(
        dim,
        depth,
        attention=[[*layer, cross] for layer in parse_layers(attention)],
        feedforward=("gelu", {"bias": True}),
        heads=heads,
        dim_head=dim // heads,
        causal=causal,
        defaults={**positions, "qkv_bias": True, "out_bias": True},
        **options,
    )
    stack.fixed_blocks = 1  # the cross-attention
    return stack
