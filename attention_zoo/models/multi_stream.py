"""A transformer with several streams of features, whose heads may be mixed across streams.

Paper: Multi-Stream Transformers, https://arxiv.org/abs/2107.10342
Upstream: quartic-transformer, MultiStreamTransformer.
Differs: any number of streams and any block; a padding mask; causal with cached decoding; a diversity loss in nats.
    The streams of a layer share its weights, as upstream; weights of their own per stream, for the projections, norms
    and feedforwards of a layer, are missing: streams differ by their embeddings and by the mixing of their heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from attention_zoo._checks import check_flag, check_int, check_padding, check_tokens
from attention_zoo.generation import decoding
from attention_zoo.layers.norms import RMSNorm
from attention_zoo.layers.state import State, check_state, register_state
from attention_zoo.models.composed_model import ComposedModel
from attention_zoo.models.layer_specs import AttentionSpec, takes_part
from attention_zoo.models.over_streams import OverStreams
from attention_zoo.models.positions import check_length, count_valid_tokens
from attention_zoo.models.stack import BlockInputs, Stack, StackState
from attention_zoo.ops import stream_diversity_loss
from attention_zoo.ops.documents import Documents, as_documents
from attention_zoo.ops.losses import LossTerm, count_next_tokens, next_token_loss, total_loss


@dataclass
class MultiStreamState(State):
    """Decoding state of a multi-stream model.

    Attributes:
        stack: the state of the stack, with the streams folded into the batch.
        valid_count: (b,) int, number of valid tokens so far.
    """

    stack: StackState
    valid_count: Tensor

    @property
    def length(self) -> int:
        return self.stack.length

    def reorder(self, index: Tensor) -> Self:
        rows = self.valid_count.shape[0]

        def select(leaf: Tensor) -> Tensor:
            if not leaf.ndim:
                return leaf
            by_row = leaf.reshape(rows, -1, *leaf.shape[1:])  # (b s, ...) or (b, ...)
            return by_row.index_select(0, index).flatten(0, 1)

        return type(self)(pytree.tree_map_only(Tensor, select, self.stack), self.valid_count.index_select(0, index))


register_state(MultiStreamState)


class MultiStreamTransformer(ComposedModel):
    """Streams of features over the same tokens, each with its own embedding, summed for the logits.

    All streams of a layer have the same weights; there is no option for weights of their own per stream.

    Args:
        num_tokens, dim, depth: see `LanguageModel`.
        streams: number of streams s.
        attention: see `Stack`. Blocks with an argument `streams`, such as "talking_heads", mix the heads of all
            streams; others run on each stream separately. ("talking_heads", {"streams": g}), where g divides s, mixes
            the heads of each group of g neighbouring streams, with the same weights for all groups.
        heads, dim_head: of each stream; see `Stack`.
        max_seq_len: length of the position table, and the longest sequence accepted.
        causal: True for a language model with `loss` and `step`; False for a bidirectional model.
        cross_stream: whether heads are mixed across streams, or only within a stream.
        pre_softmax, post_softmax, scale: see `TalkingHeadsAttention`.
        separate_embeddings: whether every stream has its own token and position table. False: shared tables and one
            vector per stream.
        tie_embeddings: whether the logits use the token table; needs separate_embeddings=False.
        attn_dropout, ff_dropout, ff_mult: see `Stack`.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.
    """

    fsdp_wrap_classes: tuple[type[nn.Module], ...] = ()  # the diversity loss calls parts of layers

    generate = decoding.generate

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        streams: int = 2,
        attention: AttentionSpec = "talking_heads",
        heads: int | None = None,
        dim_head: int | None = None,
        max_seq_len: int = 2048,
        causal: bool = True,
        cross_stream: bool = True,
        pre_softmax: str | None = "linear",
        post_softmax: str | None = "linear",
        scale: float | None = None,
        separate_embeddings: bool = True,
        tie_embeddings: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        ff_mult: float = 4,
    ) -> None:
        super().__init__()
        check_int(1, num_tokens=num_tokens, dim=dim, depth=depth, streams=streams, max_seq_len=max_seq_len)
        check_flag(causal=causal, cross_stream=cross_stream, separate_embeddings=separate_embeddings)
        check_flag(tie_embeddings=tie_embeddings)
        if tie_embeddings and separate_embeddings:
            raise ValueError("tie_embeddings needs separate_embeddings=False, got separate_embeddings=True")
        self.num_tokens = num_tokens
        self.streams = streams
        self.max_seq_len = max_seq_len
        self.causal = causal

        mixing: dict[str, Any] = {"pre_softmax": pre_softmax, "post_softmax": post_softmax, "scale": scale}
        if not takes_part(attention, "streams"):
            unused = {
                name: value for name, value in mixing.items() if value != ("linear" if "softmax" in name else None)
            }
            if not cross_stream:
                unused["cross_stream"] = cross_stream
            for name, value in unused.items():
                raise ValueError(
                    f"{name} must be taken by a block, but none of {attention!r} mixes heads, got {value!r}"
                )
        if scale is None:
            del mixing["scale"]
        if cross_stream:
            mixing["streams"] = streams
        self.stack = Stack(
            dim,
            depth,
            attention=attention,
            norm="rms",
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
            defaults=mixing,
        )
        if self.stack.takes_context:
            raise ValueError(f"attention must not read a context in this model, which has none, got {attention!r}")
        self.stack.norm = nn.Identity()  # the norm follows the sum of the streams
        tables = (streams,) if separate_embeddings else ()
        self.token_embedding = nn.Parameter(torch.empty(*tables, num_tokens, dim))
        self.position_embedding = nn.Parameter(torch.empty(*tables, max_seq_len, dim))
        self.stream_embedding = None if separate_embeddings else nn.Parameter(torch.empty(streams, dim))
        for table in (self.token_embedding, self.position_embedding, self.stream_embedding):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        self.norm = RMSNorm(dim)
        self.to_logits = None if tie_embeddings else nn.Linear(dim, num_tokens, bias=False)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | Documents | None = None
    ) -> Tensor:
        """Logits at each token: of the next token if causal, of the token itself if not.

        Args:
            tokens: (b, n) int.
            mask: (b, n) bool, True = a valid token.
            document_ids: (b, n) int, for packed rows; see `LanguageModel.forward`.

        Returns:
            (b, n, num_tokens).
        """
        documents = as_documents(document_ids, tokens)
        x, _ = self._embed(tokens, mask, None, documents)
        folded = None if documents is None else documents.repeat(self.streams)
        return self._logits(self.stack(x, mask=self._fold(mask), document_ids=folded))

    def attention_maps(
        self, tokens: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> list[Tensor]:
        """The attention map of every layer: (b, s h, i, j) of a block over all streams, (b s, h, i, j) of another."""
        documents = as_documents(document_ids, tokens)
        x, _ = self._embed(tokens, mask, None, documents)
        folded = None if documents is None else documents.repeat(self.streams)
        return self.stack.attention_maps(x, mask=self._fold(mask), document_ids=folded)

    def loss(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        diversity_weight: float = 0.0,
    ) -> Tensor:
        """Mean cross entropy, in nats, of every valid token given the valid tokens before it, plus the diversity loss.

        Args:
            tokens: (b, n) int with n >= 2.
            mask: (b, n) bool, True = a valid token.
            document_ids: (b, n) int, for packed rows; see `LanguageModel.loss`. Not with a diversity loss.
            diversity_weight: factor of the diversity loss; see `diversity`.
        """
        terms = self.loss_terms(tokens, mask=mask, document_ids=document_ids, diversity_weight=diversity_weight)
        return total_loss(terms)

    def loss_terms(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        diversity_weight: float = 0.0,
    ) -> list[LossTerm]:
        """The loss as means and their counts: of targets, and of queries. Arguments as in `loss`."""
        if not self.causal:
            raise ValueError("loss needs causal=True, got causal=False; see training.masked_token_loss")
        check_tokens(tokens, self.num_tokens, minimum=2)
        inputs, valid = tokens[:, :-1], None if mask is None else mask[:, :-1]
        as_documents(document_ids, tokens)  # checks them
        targets = count_next_tokens(tokens, mask, document_ids)
        if not diversity_weight:
            logits = self(inputs, mask=valid, document_ids=None if document_ids is None else document_ids[:, :-1])
            return [LossTerm(next_token_loss(logits, tokens, mask, document_ids), targets)]
        if document_ids is not None:
            raise ValueError(f"document_ids must be None with a diversity loss, got {diversity_weight=}")
        x, diversity = self._run_with_diversity(inputs, valid)
        queries = torch.full((), inputs.numel(), device=inputs.device) if valid is None else valid.sum()
        return [
            LossTerm(next_token_loss(self._logits(x), tokens, mask), targets),
            LossTerm(diversity, queries, diversity_weight),
        ]

    def diversity(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The diversity loss summed over layers: 0 for one stream, lower the more the streams' heads differ.

        See `ops.stream_diversity_loss`. Arguments as in `forward`.
        """
        return self._run_with_diversity(tokens, mask)[1]

    def step(
        self, tokens: Tensor, state: MultiStreamState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MultiStreamState]:
        """Logits (b, t, num_tokens) after each new token (b, t), and the new state; see `LanguageModel.step`."""
        check_state(state, MultiStreamState)
        if not self.causal:
            raise ValueError("step needs causal=True, got causal=False")
        x, valid_count = self._embed(tokens, mask, state)
        x, stack = self.stack.step(x, None if state is None else state.stack, mask=self._fold(mask))
        return self._logits(x), MultiStreamState(stack, valid_count)

    def _embed(
        self, tokens: Tensor, mask: Tensor | None, state: MultiStreamState | None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (b s, n, d) and the valid tokens so far (b,)."""
        check_tokens(tokens, self.num_tokens)
        check_padding(mask, tokens)
        check_length(tokens, state, self.max_seq_len)
        if state is not None and state.valid_count.shape != tokens.shape[:1]:
            raise ValueError(
                f"state must have the batch size of tokens, {tokens.shape[0]}, got {len(state.valid_count)}"
            )
        tokens = tokens.long()
        count = count_valid_tokens(tokens, mask, None if state is None else state.valid_count, documents)
        position = (count - 1).clamp(min=0)
        if self.stream_embedding is None:
            x = self.token_embedding[:, tokens] + self.position_embedding[:, position]  # (s, b, n, d)
            x = x.transpose(0, 1)
        else:
            x = F.embedding(tokens, self.token_embedding) + F.embedding(position, self.position_embedding)
            x = x[:, None] + self.stream_embedding[:, None]  # (b, s, n, d)
        return x.flatten(0, 1), count[:, -1]

    def _fold(self, mask: Tensor | None) -> Tensor | None:
        """(b, n) -> (b s, n)."""
        return None if mask is None else mask.repeat_interleave(self.streams, dim=0)

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.streams, *x.shape[1:]).sum(1))
        return F.linear(x, self.token_embedding if self.to_logits is None else self.to_logits.weight)

    def _run_with_diversity(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The features after the last layer, and the diversity loss."""
        x, _ = self._embed(tokens, mask, None)
        inputs = BlockInputs(mask=self._fold(mask))
        total = torch.zeros((), device=x.device)
        for sublayer in self.stack.sublayers():
            if not sublayer.tokenwise and self.streams > 1:
                total = total + self._layer_diversity(sublayer.block, sublayer.residual.branch(x), mask)
            x = sublayer(x, inputs)
        return x, total

    def _layer_diversity(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if not isinstance(block, OverStreams):
            raise ValueError(
                f"diversity needs streams whose heads are mixed, got attention={self.arguments['attention']!r}, "
                f"cross_stream={self.arguments['cross_stream']}"
            )
        heads = block.block
        if heads.streams != self.streams:
            raise ValueError(f"diversity needs heads mixed across all {self.streams} streams, got {heads.streams}")
        q, k, pre_softmax = heads.queries_and_keys(block.unfold(x))
        return stream_diversity_loss(
            q, k, pre_softmax, streams=self.streams, mask=mask, causal=self.causal, scale=heads.scale
        )
