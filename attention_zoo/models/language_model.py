"""A causal language model: token embedding, stack of layers, logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import check_flag, check_int, check_padding, check_position_ids, check_positive, check_tokens
from attention_zoo.generation import decoding
from attention_zoo.layers.projections import project_logits
from attention_zoo.layers.residual import Norm
from attention_zoo.layers.state import State, check_state, register_state
from attention_zoo.models.composed_model import ComposedModel
from attention_zoo.models.layer_specs import AttentionSpec, FeedForwardSpec
from attention_zoo.models.positions import (
    PositionSpec,
    check_length,
    count_valid_tokens,
    embed_tokens,
    learned_positions,
    parse_positions,
    position_parts,
)
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops.documents import Documents, as_documents
from attention_zoo.ops.losses import LossTerm, count_next_tokens, next_token_loss, total_loss


@dataclass
class LanguageModelState(State):
    """Decoding state of a language model.

    Attributes:
        stack: the state of the stack.
        valid_count: (b,) int, number of valid tokens so far; None without learned positions.
    """

    stack: StackState
    valid_count: Tensor | None = None

    @property
    def length(self) -> int:
        return self.stack.length


register_state(LanguageModelState)


class LanguageModel(ComposedModel):
    """p(token | all tokens before it), with any causal blocks.

    Args:
        num_tokens: size of the vocabulary.
        dim: features d.
        depth: number of layers.
        attention, heads, dim_head, feedforward, ff_mult, norm, residual: see `Stack`.
        attn_dropout, ff_dropout, checkpoint_layers: see `Stack`.
        stack: a causal stack, in place of `dim`, `depth` and all arguments of `Stack`. It has its own positions, so
            that `positions` is then "auto", which adds none, "learned" or None.
        max_seq_len: the longest sequence that the model accepts, in tokens. None: no limit; learned positions need one.
        positions: "rotary", "t5" (relative position bias), "alibi" (`ALiBi`) or "learned" (a table). "auto": rotary
            for the blocks that take it, nothing for the others. None: no positions. `(name, options)` gives "rotary"
            and "auto" the arguments of `Rotary`, and "t5" `buckets` and `max_distance`, as in
            `("rotary", {"theta": 5e5})`.
        tie_embeddings: whether the logits use the weights of the token embedding.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.

    Example:
        >>> model = LanguageModel(num_tokens=256, dim=512, depth=6, attention=["full", "cosine_sim"])
        >>> loss = model.loss(tokens)
    """

    generate = decoding.generate

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int | None = None,
        depth: int | None = None,
        attention: AttentionSpec = "full",
        heads: int | None = None,
        dim_head: int | None = None,
        max_seq_len: int | None = None,
        positions: PositionSpec = "auto",
        feedforward: FeedForwardSpec = "gelu",
        ff_mult: float = 4,
        norm: Norm = "layer",
        residual: str = "pre",
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        tie_embeddings: bool = False,
        checkpoint_layers: bool = False,
        stack: Stack | None = None,
    ) -> None:
        super().__init__()
        check_int(1, num_tokens=num_tokens)
        check_flag(tie_embeddings=tie_embeddings, checkpoint_layers=checkpoint_layers)
        check_positive(dim=dim, depth=depth, max_seq_len=max_seq_len)
        if stack is None:
            if dim is None or depth is None:
                raise ValueError(f"dim and depth must be given without a stack, got {dim=}, {depth=}")
            stack = Stack(
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
                **position_parts(positions, heads, known=("auto", "rotary", "learned", "t5", "alibi")),
            )
        else:
            _check_stack(stack, self.arguments)
        if stack.takes_context:
            raise ValueError(f"attention must not read a context in a LanguageModel, which has none, got {attention!r}")
        dim = stack.dim
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.token_embedding = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positions = learned_positions(positions, max_seq_len, dim)
        self.stack = stack
        self.to_logits = None if tie_embeddings else nn.Linear(dim, num_tokens, bias=False)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each token.

        Args:
            tokens: (b, n) int.
            mask: (b, n) bool, True = a valid token. Logits at masked tokens are meaningless.
            attn_mask: which tokens each token may attend to, besides causality and padding; see `SelfAttention`.
            document_ids: (b, n) int, for packed rows: a document is a maximal run of equal ids, and gets the logits
                that it would get alone.
            position_ids: (b, n) int, the positions of the tokens, in place of 0, ..., n - 1, for the blocks with a
                rotary position embedding (see `Stack.forward`) and for learned positions.
            inputs_embeds: (b, n, d), embeddings of the tokens, in place of `tokens`.

        Returns:
            (b, n, num_tokens).

        Raises:
            TypeError: `tokens` is not an integer tensor, or `mask` is not boolean.
            ValueError: an id is out of range, there are more than max_seq_len tokens, a mask or `document_ids` has
                another shape or is not taken by a block, neither a block nor learned positions take `position_ids`,
                or not exactly one of `tokens` and `inputs_embeds` is given.
        """
        x, _, documents = self._embed(tokens, inputs_embeds, None, mask, document_ids, position_ids)
        position_ids = self._ids_of_stack(position_ids)
        x = self.stack(x, mask=mask, attn_mask=attn_mask, document_ids=documents, position_ids=position_ids)
        return self._logits(x)

    def attention_maps(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """The attention map (b, h, i, j) of every layer. Arguments as in `forward`.

        Raises:
            TypeError: a block has no `attention_map`.
        """
        x, _, documents = self._embed(tokens, None, None, mask, document_ids, position_ids)
        position_ids = self._ids_of_stack(position_ids)
        return self.stack.attention_maps(x, mask=mask, document_ids=documents, position_ids=position_ids)

    def loss(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy, in nats, of every valid token given the valid tokens before it in its document.

        Args:
            tokens: (b, n) int with n >= 2.
            mask: (b, n) bool, True = a valid token.
            document_ids: (b, n) int, for packed rows; see `forward`. The first token of a document is not predicted.
            position_ids: (b, n) int; see `forward`.
        """
        return total_loss(self.loss_terms(tokens, mask=mask, document_ids=document_ids, position_ids=position_ids))

    def loss_terms(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> list[LossTerm]:
        """The loss as a mean and its count of targets. Arguments as in `loss`."""
        check_tokens(tokens, self.num_tokens, minimum=2)
        check_padding(mask, tokens)
        as_documents(document_ids, tokens)  # checks them
        if position_ids is not None:
            check_position_ids(position_ids, tokens)
        given, ids, places = (None if part is None else part[:, :-1] for part in (mask, document_ids, position_ids))
        logits = self(tokens[:, :-1], mask=given, document_ids=ids, position_ids=places)
        mean = next_token_loss(logits, tokens, mask, document_ids)
        return [LossTerm(mean, count_next_tokens(tokens, mask, document_ids))]

    def step(
        self,
        tokens: Tensor | None = None,
        state: LanguageModelState | None = None,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, LanguageModelState]:
        """Logits after each new token, given all tokens before it.

        Args:
            tokens: (b, t) int, any t >= 1.
            state: the state returned by the previous step; None for the first. It is not modified.
            mask: (b, t) bool, True = a valid token.
            attn_mask: the rows of the new tokens, with a column for every token so far.
            position_ids: (b, t) int, the positions of the new tokens; see `forward`.
            inputs_embeds: (b, t, d), embeddings of the new tokens, in place of `tokens`.

        Returns:
            (b, t, num_tokens) and the new state.

        Raises:
            TypeError: `state` is not a LanguageModelState.
            ValueError: there are more than max_seq_len tokens, or `state` comes from another model or batch.
        """
        check_state(state, LanguageModelState)
        x, valid_count, _ = self._embed(tokens, inputs_embeds, state, mask, None, position_ids)
        x, stack = self.stack.step(
            x,
            None if state is None else state.stack,
            mask=mask,
            attn_mask=attn_mask,
            position_ids=self._ids_of_stack(position_ids),
        )
        return self._logits(x), LanguageModelState(stack, valid_count)

    def _embed(
        self,
        tokens: Tensor | None,
        inputs_embeds: Tensor | None,
        state: LanguageModelState | None,
        mask: Tensor | None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Documents | None]:
        """Features (b, n, d), with learned positions the valid tokens so far (b,), and the documents."""
        x = embed_tokens(self.token_embedding, tokens, inputs_embeds, dim=self.stack.dim)
        check_padding(mask, x)
        check_length(x, state, self.max_seq_len)
        documents = as_documents(document_ids, x)
        if self.positions is None:
            return x, None, documents
        before = None if state is None else state.valid_count
        if state is not None and (before is None or before.shape != x.shape[:1]):
            got = "none" if before is None else f"counts of shape {tuple(before.shape)}"
            raise ValueError(
                f"state must come from this model and batch: counts of valid tokens of shape "
                f"{tuple(x.shape[:1])}, got {got}"
            )
        count = count_valid_tokens(x, mask, before, documents)
        if position_ids is None:
            return x + self.positions(count), count[:, -1], documents
        check_position_ids(position_ids, x)
        check_tokens(position_ids, self.positions.weight.shape[0], name="position_ids", limit="max_seq_len")
        return x + self.positions(position_ids.long() + 1), count[:, -1], documents

    def _ids_of_stack(self, position_ids: Tensor | None) -> Tensor | None:
        """Those for the blocks. With learned positions there need be no block that takes them."""
        return None if self.positions is not None and not self.stack.takes_position_ids else position_ids

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.token_embedding.weight) if self.to_logits is None else project_logits(self.to_logits, x)


def _check_stack(stack: Any, arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a model with its own stack.

    Raises:
        TypeError: `stack` is no Stack.
        ValueError: the stack is not causal, or an argument that the stack replaces is given.
    """
    if not isinstance(stack, Stack):
        raise TypeError(f"stack must be a Stack, got {type(stack).__name__}")
    if stack.causal is not True:
        raise ValueError(f"stack must be causal in a LanguageModel, got causal={stack.causal}")
    parameters = inspect.signature(LanguageModel).parameters
    of_model = ("num_tokens", "max_seq_len", "positions", "tie_embeddings", "stack")
    for name, parameter in parameters.items():
        if name not in of_model and arguments[name] != parameter.default:
            raise ValueError(f"{name} must be given to the stack, not beside it, got {name}={arguments[name]!r}")
    if arguments["positions"] not in ("auto", None) and parse_positions(arguments["positions"])[0] != "learned":
        raise ValueError(f"positions must be given to the stack, not beside it, got {arguments['positions']!r}")
