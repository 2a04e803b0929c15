"""A language model out of any blocks: embedding, stack, logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import check_choice, check_padding, check_positive, check_tokens
from attention_zoo.layers.positions import LearnedPositions, RelativeBias, Rotary
from attention_zoo.layers.residual import Norm
from attention_zoo.layers.state import State, register_state
from attention_zoo.models.layer_specs import FeedForwardSpec, LayerSpec, takes_part
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops.losses import next_token_loss
from attention_zoo.saving.saved_model import SavedModel

POSITIONS = ("auto", "rotary", "learned", "t5")


@dataclass
class LanguageModelState(State):
    """What a language model remembers between steps.

    Attributes:
        stack: the state of its body.
        real: (b,) int, real tokens so far; None where no position table counts them.
    """

    stack: StackState
    real: Tensor | None = None

    @property
    def length(self) -> int:
        return self.stack.length


register_state(LanguageModelState)


class LanguageModel(SavedModel):
    """A causal language model: p(token | all tokens before it), from any blocks of the zoo.

    Args:
        num_tokens: size of the vocabulary.
        dim: features d.
        depth: layers.
        attention: a block, or a list of blocks cycled over the layers; see `Stack`.
        heads, dim_head: passed to the blocks that have them; None leaves each its own default.
        max_seq_len: the longest sequence that the model accepts, in tokens. None: no limit; learned positions need one.
        positions: "auto" is rotary for the blocks that take it and nothing for the others; "rotary", "t5" (relative
            bias) or "learned" by name, an error where no block takes it; None for no positions at all.
        feedforward, ff_mult, norm, residual: see `Stack`.
        attn_dropout: probability with which an attention weight is dropped in training.
        ff_dropout: probability with which a hidden feature of a feedforward is dropped in training.
        tie_embeddings: logits use the token embedding's table.
        checkpoint_layers: see `Stack`: less activation memory in training, for more time.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> model = LanguageModel(num_tokens=256, dim=512, depth=6, attention=["full", "cosine_sim"])
        >>> loss = model.loss(tokens)
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        attention: LayerSpec | Sequence[LayerSpec] = "full",
        heads: int | None = None,
        dim_head: int | None = None,
        max_seq_len: int | None = None,
        positions: str | None = "auto",
        feedforward: FeedForwardSpec = "gelu",
        ff_mult: float = 4,
        norm: Norm = "layer",
        residual: str = "pre",
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        tie_embeddings: bool = False,
        checkpoint_layers: bool = False,
    ) -> None:
        super().__init__()
        self.remember(locals())
        check_positive(num_tokens=num_tokens, dim=dim, depth=depth, max_seq_len=max_seq_len)
        if positions is not None:
            check_choice("positions", positions, POSITIONS)
        if positions == "learned" and max_seq_len is None:
            raise ValueError("max_seq_len must be given with positions='learned', got max_seq_len=None")
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.token_embedding = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positions = LearnedPositions(max_seq_len, dim) if positions == "learned" and max_seq_len else None
        self.stack = Stack(
            dim,
            depth,
            attention=attention,
            feedforward=feedforward,
            norm=norm,
            residual=residual,
            heads=heads,
            dim_head=dim_head,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
            checkpoint_layers=checkpoint_layers,
            **_shared_positions(positions, attention, heads),
        )
        self.to_logits = None if tie_embeddings else nn.Linear(dim, num_tokens, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the token after each token.

        Args:
            tokens: (b, n) int.
            mask: (b, n) bool, True = a real token. Logits at masked tokens mean nothing.

        Returns:
            (b, n, num_tokens).
        """
        self._check(tokens, mask, start=0)
        x, _ = self._embed(tokens, mask, None)
        return self._logits(self.stack(x, mask=mask))

    def loss(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross entropy, in nats, of every real token given the real ones before it.

        Args:
            tokens: (b, n) int with n >= 2.
            mask: (b, n) bool, True = a real token.
        """
        check_tokens(tokens, self.num_tokens)
        check_padding(mask, tokens)
        if tokens.shape[1] < 2:
            raise ValueError(f"tokens must hold at least two tokens for a loss, got shape {tuple(tokens.shape)}")
        logits = self(tokens[:, :-1], None if mask is None else mask[:, :-1])
        return next_token_loss(logits, tokens, mask)

    def step(
        self, tokens: Tensor, state: LanguageModelState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LanguageModelState]:
        """Logits after each of some new tokens, given all before them.

        Args:
            tokens: (b, t) int, any t >= 1.
            state: what the step before returned; None at the start. It keeps its meaning.
            mask: (b, t) bool over the new tokens.

        Returns:
            (b, t, num_tokens) and the new state.

        Raises:
            ValueError: the sequence would exceed max_seq_len.
        """
        if state is not None and not isinstance(state, LanguageModelState):
            raise TypeError(f"state must be a LanguageModelState, got {type(state).__name__}")
        # Under compile a length held in a tensor is no number to decide on.
        known = self.max_seq_len is not None and state is not None and not torch.compiler.is_compiling()
        self._check(tokens, mask, start=state.length if state is not None and known else 0)
        if state is not None and self.positions is not None:
            self._check_real(state.real, tokens)
        x, real = self._embed(tokens, mask, None if state is None else state.real)
        x, stack = self.stack.step(x, None if state is None else state.stack, mask=mask)
        return self._logits(x), LanguageModelState(stack, real)

    def _check(self, tokens: Tensor, mask: Tensor | None, *, start: int) -> None:
        check_tokens(tokens, self.num_tokens)
        check_padding(mask, tokens)
        total = start + tokens.shape[1]
        if self.max_seq_len is not None and total > self.max_seq_len:
            raise ValueError(f"tokens must fit max_seq_len={self.max_seq_len}, got a sequence of {total} tokens")

    def _check_real(self, real: Tensor | None, tokens: Tensor) -> None:
        if real is None or real.shape != tokens.shape[:1]:
            got = "none" if real is None else f"counts of shape {tuple(real.shape)}"
            raise ValueError(
                f"state must come from this model and batch: counts of real tokens, (b,) = {tuple(tokens.shape[:1])}, "
                f"got {got}"
            )

    def _embed(self, tokens: Tensor, mask: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.token_embedding(tokens)
        if self.positions is None:
            return x, None
        ones = torch.ones_like(tokens, dtype=torch.int64) if mask is None else mask.long()
        count = ones.cumsum(dim=1) + (0 if real is None else real[:, None])
        return x + self.positions(count), count[:, -1]

    def _logits(self, x: Tensor) -> Tensor:
        if self.to_logits is None:
            return F.linear(x, self.token_embedding.weight)
        return cast(Tensor, self.to_logits(x))


def _shared_positions(
    positions: str | None, attention: LayerSpec | Sequence[LayerSpec], heads: int | None
) -> dict[str, Any]:
    """The part that the blocks share for this kind of positions, by the name their constructors have for it."""
    if positions == "rotary" or (positions == "auto" and takes_part(attention, "rotary")):
        return {"rotary": Rotary()}
    if positions == "t5":
        return {"bias": RelativeBias(8 if heads is None else heads)}
    return {}
