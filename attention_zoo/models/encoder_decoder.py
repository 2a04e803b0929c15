"""An encoder-decoder: a bidirectional encoder of the source, and a causal decoder that attends to its output.

Paper: Attention Is All You Need, https://arxiv.org/abs/1706.03762
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from attention_zoo._checks import check_int, check_padding, check_positive, check_tokens
from attention_zoo.generation import generate
from attention_zoo.layers.projections import project_logits
from attention_zoo.layers.residual import Norm
from attention_zoo.models.composed_model import ComposedModel
from attention_zoo.models.layer_specs import AttentionSpec, FeedForwardSpec, parse_layers
from attention_zoo.models.memformer import TargetDecoder
from attention_zoo.models.positions import PositionSpec, check_length, embed_tokens, position_parts
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops.losses import LossTerm, count_next_tokens, next_token_loss, total_loss


class EncoderDecoder(ComposedModel):
    """p(target token | the source, all target tokens before it), with any bidirectional and any causal blocks.

    Every layer of the decoder is self-attention, cross-attention to the encoder's output and a feedforward.

    Args:
        num_tokens: size of the target's vocabulary.
        source_num_tokens: size of the source's vocabulary. None: `num_tokens`.
        dim: features d.
        enc_depth, dec_depth: number of layers of encoder and decoder.
        attention: self-attention of the encoder, not causal; see `Stack`.
        dec_attention: self-attention of the decoder, causal. None: as `attention`.
        heads, dim_head, feedforward, ff_mult, norm, residual, attn_dropout, ff_dropout, checkpoint_layers: of both;
            see `Stack`.
        positions: "auto", "rotary", "t5", "alibi" or None; see `LanguageModel`. Encoder and decoder have their own.
        max_seq_len: the longest source and the longest target, in tokens. None: no limit.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.

    Example:
        >>> model = EncoderDecoder(num_tokens=256, dim=512, enc_depth=6, dec_depth=6)
        >>> loss = model.loss(source, target)
        >>> new = model.generate(source, prompt, 64, temperature=0.8)
    """

    stacks: ClassVar[Mapping[str, str]] = {"attention": "encoder", "dec_attention": "decoder"}

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        enc_depth: int,
        dec_depth: int,
        source_num_tokens: int | None = None,
        attention: AttentionSpec = "full",
        dec_attention: AttentionSpec | None = None,
        heads: int | None = None,
        dim_head: int | None = None,
        positions: PositionSpec = "auto",
        max_seq_len: int | None = None,
        feedforward: FeedForwardSpec = "gelu",
        ff_mult: float = 4,
        norm: Norm = "layer",
        residual: str = "pre",
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        checkpoint_layers: bool = False,
    ) -> None:
        super().__init__()
        check_int(1, num_tokens=num_tokens, dim=dim)
        check_positive(source_num_tokens=source_num_tokens, max_seq_len=max_seq_len)
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.source_embedding = nn.Embedding(num_tokens if source_num_tokens is None else source_num_tokens, dim)
        self.target_embedding = nn.Embedding(num_tokens, dim)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        known = ("auto", "rotary", "t5", "alibi")
        options: dict[str, Any] = {
            "feedforward": feedforward,
            "norm": norm,
            "residual": residual,
            "heads": heads,
            "dim_head": dim_head,
            "attn_dropout": attn_dropout,
            "ff_dropout": ff_dropout,
            "ff_mult": ff_mult,
            "checkpoint_layers": checkpoint_layers,
        }
        parts = position_parts(positions, heads, known=known, causal=False)
        self.encoder = Stack(dim, enc_depth, attention=attention, causal=False, **options, **parts)
        if self.encoder.takes_context:
            raise ValueError(f"attention must not read a context in the encoder, which has none, got {attention!r}")
        layers = parse_layers(attention if dec_attention is None else dec_attention)
        parts = position_parts(positions, heads, known=known)
        self.decoder = Stack(dim, dec_depth, attention=[[*layer, "cross"] for layer in layers], **options, **parts)
        self.decoder.fixed_blocks = 1  # the cross-attention to the source
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def encode(self, source: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The encoder's features (b, n, d) of source tokens (b, n) with mask (b, n) bool, True = a valid token."""
        x = embed_tokens(self.source_embedding, source, None, dim=self.encoder.dim, name="source")
        check_padding(mask, source)
        check_length(source, None, self.max_seq_len, name="source")
        return self.encoder(x, mask=mask)

    def forward(
        self, source: Tensor, target: Tensor, *, mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each target token.

        Args:
            source: (b, n) int.
            target: (b, t) int.
            mask, target_mask: (b, n) and (b, t) bool, True = a valid token of source and target.

        Returns:
            (b, t, num_tokens).

        Raises:
            TypeError: `source` or `target` is not an integer tensor, or a mask is not boolean.
            ValueError: an id is out of range, there are more than max_seq_len tokens, or a shape is wrong.
        """
        encoded = self.encode(source, mask=mask)
        x = self._embed_target(target, None, target_mask, name="target")
        if target.shape[0] != source.shape[0]:
            raise ValueError(
                f"target must have the batch size of the source, got {target.shape[0]} and {source.shape[0]}"
            )
        return project_logits(self.to_logits, self.decoder(x, mask=target_mask, context=encoded, context_mask=mask))

    def loss(
        self, source: Tensor, target: Tensor, *, mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Mean cross entropy, in nats, of every valid target token given the source and the target tokens before it.

        Args:
            source, mask, target_mask: see `forward`.
            target: (b, t) int with t >= 2.
        """
        return total_loss(self.loss_terms(source, target, mask=mask, target_mask=target_mask))

    def loss_terms(
        self, source: Tensor, target: Tensor, *, mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> list[LossTerm]:
        """The loss as a mean and its count of targets. Arguments as in `loss`."""
        check_tokens(target, self.num_tokens, name="target", minimum=2)
        check_padding(target_mask, target, name="target_mask")
        read = None if target_mask is None else target_mask[:, :-1]
        logits = self(source, target[:, :-1], mask=mask, target_mask=read)
        return [LossTerm(next_token_loss(logits, target, target_mask), count_next_tokens(target, target_mask))]

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
            context, context_mask: the result of `encode` and the source's mask; given with the first step only.

        Returns:
            (b, t, num_tokens) and the new state.

        Raises:
            ValueError: the first step has no context, or there are more than max_seq_len tokens.
        """
        if state is None and context is None:
            raise ValueError("context must be given with the first step, got None; see encode() and read()")
        x = self._embed_target(tokens, state, mask, name="tokens")
        x, state = self.decoder.step(x, state, mask=mask, context=context, context_mask=context_mask)
        return project_logits(self.to_logits, x), state

    def read(self, source: Tensor, *, mask: Tensor | None = None) -> TargetDecoder:
        """Encode a source and return the decoder of its target, which has `step`. Arguments as in `encode`."""
        return TargetDecoder(self, self.encode(source, mask=mask), None, mask)

    def generate(
        self,
        source: Tensor,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Sample target tokens after each prompt (b, t), such as a start token.

        Args:
            source, mask: see `encode`.
            prompt, max_new_tokens, temperature, top_k, top_p, min_p, eos_token_id: see `attention_zoo.generate`.

        Returns:
            (b, max_new_tokens) int.
        """
        return generate(
            self.read(source, mask=mask),
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            eos_token_id=eos_token_id,
        )

    def _embed_target(self, tokens: Tensor, state: StackState | None, mask: Tensor | None, *, name: str) -> Tensor:
        x = embed_tokens(self.target_embedding, tokens, None, dim=self.decoder.dim, name=name)
        check_padding(mask, tokens, name="target_mask" if name == "target" else "mask")
        check_length(tokens, state, self.max_seq_len, name=name)
        return x
