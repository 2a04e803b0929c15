"""A transformer of several streams of features, whose heads may talk to each other across streams.

Paper: Multi-Stream Transformers, https://arxiv.org/abs/2107.10342
Upstream: quartic-transformer, MultiStreamTransformer.
Differs: any number of streams and any block; a padding mask; causal with cached decoding; a diversity loss in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from attention_zoo._checks import check_padding, check_positive, check_tokens
from attention_zoo.attention import TalkingHeadsAttention
from attention_zoo.layers.norms import RMSNorm
from attention_zoo.layers.state import State, register_state
from attention_zoo.models.layer_specs import LayerSpec
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops.losses import next_token_loss
from attention_zoo.ops.talking_heads import stream_diversity_loss
from attention_zoo.saving.saved_model import SavedModel


@dataclass
class MultiStreamState(State):
    """What a multi-stream model remembers between steps.

    Attributes:
        stack: the state of its body, for streams folded into the batch.
        real: (b,) int, real tokens so far.
    """

    stack: StackState
    real: Tensor

    @property
    def length(self) -> int:
        return self.stack.length

    def reorder(self, index: Tensor) -> Self:
        rows = self.real.shape[0]

        def pick(leaf: Tensor) -> Tensor:
            if not leaf.ndim:
                return leaf
            by_row = leaf.reshape(rows, -1, *leaf.shape[1:])  # (b s, ...) or (b, ...)
            return by_row.index_select(0, index).flatten(0, 1)

        return type(self)(pytree.tree_map_only(Tensor, pick, self.stack), self.real.index_select(0, index))


register_state(MultiStreamState)


class OverStreams(nn.Module):
    """Talking heads across streams, as a block of folded streams: (b s, n, d) in and out.

    Args:
        block: talking heads over s streams.
    """

    causal: bool

    def __init__(self, block: TalkingHeadsAttention) -> None:
        super().__init__()
        self.block = block
        self.causal = block.causal

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b s, n, d) -> (b s, n, d)."""
        out: Tensor = self.block(self.unfold(x), mask=self.first(mask))
        return out.flatten(0, 1)

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """New tokens (b s, t, d), and a state with b rows."""
        out, state = self.block.step(self.unfold(x), state, mask=self.first(mask))
        return out.flatten(0, 1), state

    def unfold(self, x: Tensor) -> Tensor:
        """(b s, n, d) -> (b, s, n, d)."""
        return x.view(-1, self.block.streams, *x.shape[1:])

    def first(self, mask: Tensor | None) -> Tensor | None:
        """(b s, n), equal for the streams of a row -> (b, n)."""
        return None if mask is None else mask[:: self.block.streams]


class MultiStreamTransformer(SavedModel):
    """Several streams over the same tokens, each with its own features, summed for the logits.

    Args:
        num_tokens: size of the vocabulary.
        dim: features d.
        depth: layers.
        streams: streams s.
        attention: "talking_heads", or any other layer that `Stack` takes, which each stream then runs by itself.
        heads, dim_head: of each stream; None leaves each block its own default.
        max_seq_len: length of the position table, and the longest sequence accepted.
        causal: a language model with `loss` and `step`; False sees both ways, for masked-token training.
        cross_stream: the heads of all streams talk; False: those of one stream alone.
        pre_softmax, post_softmax: the mixes of talking heads, "linear", "mlp" or None.
        scale: multiplies the scores of talking heads; dim_head^-0.5 where None.
        separate_embeddings: a token and a position table per stream; False: shared ones and a vector per stream.
        tie_embeddings: logits use the token table; only with shared ones.
        attn_dropout, ff_dropout, ff_mult: see `Stack`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        streams: int = 2,
        attention: LayerSpec | Sequence[LayerSpec] = "talking_heads",
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
        self.remember(locals())
        check_positive(num_tokens=num_tokens, dim=dim, depth=depth, streams=streams, max_seq_len=max_seq_len)
        if tie_embeddings and separate_embeddings:
            raise ValueError("tie_embeddings needs one token table, got tie_embeddings=True, separate_embeddings=True")
        self.num_tokens, self.streams, self.max_seq_len, self.causal = num_tokens, streams, max_seq_len, causal

        def talking_heads(
            dim: int, *, heads: int = 8, dim_head: int = 64, causal: bool = True, dropout: float = 0.0
        ) -> nn.Module:
            block = TalkingHeadsAttention(
                dim,
                heads=heads,
                dim_head=dim_head,
                streams=streams if cross_stream else 1,
                pre_softmax=pre_softmax,
                post_softmax=post_softmax,
                scale=scale,
                causal=causal,
                dropout=dropout,
            )
            return OverStreams(block) if block.streams > 1 else block

        self.stack = Stack(
            dim,
            depth,
            attention=talking_heads if attention == "talking_heads" else attention,
            norm="rms",
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
        )
        self.stack.norm = nn.Identity()  # the norm comes after the sum of the streams
        tables = (streams,) if separate_embeddings else ()
        self.token_embedding = nn.Parameter(torch.empty(*tables, num_tokens, dim))
        self.position_embedding = nn.Parameter(torch.empty(*tables, max_seq_len, dim))
        self.stream_embedding = None if separate_embeddings else nn.Parameter(torch.empty(streams, dim))
        for table in (self.token_embedding, self.position_embedding, self.stream_embedding):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        self.norm = RMSNorm(dim)
        self.to_logits = None if tie_embeddings else nn.Linear(dim, num_tokens, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits at each token: of the next one if causal, of this one if not.

        Args:
            tokens: (b, n) int.
            mask: (b, n) bool, True = a real token.

        Returns:
            (b, n, num_tokens).
        """
        x, _ = self._embed(tokens, mask, None)
        return self._logits(self.stack(x, mask=self._fold(mask)))

    def loss(self, tokens: Tensor, mask: Tensor | None = None, *, diversity_weight: float = 0.0) -> Tensor:
        """Mean cross entropy in nats of every real token given those before it, plus the weighted diversity loss."""
        if not self.causal:
            raise ValueError("loss needs causal=True, got causal=False; see training.masked_token_loss")
        if tokens.ndim == 2 and tokens.shape[1] < 2:
            raise ValueError(f"tokens must hold at least two tokens for a loss, got shape {tuple(tokens.shape)}")
        inputs, real = tokens[:, :-1], None if mask is None else mask[:, :-1]
        x, _ = self._embed(inputs, real, None)
        if not diversity_weight:
            return next_token_loss(self._logits(self.stack(x, mask=self._fold(real))), tokens, mask)
        x, diversity = self._run_with_diversity(x, real)
        return next_token_loss(self._logits(x), tokens, mask) + diversity_weight * diversity

    def diversity(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The diversity loss (`ops.diversity`), summed over layers: 0 for one stream, lower the more heads differ."""
        x, _ = self._embed(tokens, mask, None)
        return self._run_with_diversity(x, mask)[1]

    def step(
        self, tokens: Tensor, state: MultiStreamState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MultiStreamState]:
        """Logits (b, t, num_tokens) after each of some new tokens (b, t), given all before them, and the new state."""
        if state is not None and not isinstance(state, MultiStreamState):
            raise TypeError(f"state must be a MultiStreamState, got {type(state).__name__}")
        if not self.causal:
            raise ValueError(f"step needs a model built with causal=True, got causal={self.causal}")
        x, real = self._embed(tokens, mask, state)
        x, stack = self.stack.step(x, None if state is None else state.stack, mask=self._fold(mask))
        return self._logits(x), MultiStreamState(stack, real)

    def _embed(self, tokens: Tensor, mask: Tensor | None, state: MultiStreamState | None) -> tuple[Tensor, Tensor]:
        """Features (b s, n, d) and the count of real tokens (b,)."""
        check_tokens(tokens, self.num_tokens)
        check_padding(mask, tokens)
        before = state.length if state is not None and not torch.compiler.is_compiling() else 0
        if before + tokens.shape[1] > self.max_seq_len:
            total = before + tokens.shape[1]
            raise ValueError(f"tokens must fit max_seq_len={self.max_seq_len}, got a sequence of {total} tokens")
        ones = torch.ones_like(tokens, dtype=torch.int64) if mask is None else mask.long()
        count = ones.cumsum(dim=1) + (0 if state is None else state.real[:, None])
        place = (count - 1).clamp(min=0)
        if self.stream_embedding is None:
            x = self.token_embedding[:, tokens] + self.position_embedding[:, place]  # (s, b, n, d)
            x = x.transpose(0, 1)
        else:
            x = F.embedding(tokens, self.token_embedding) + F.embedding(place, self.position_embedding)
            x = x[:, None] + self.stream_embedding[:, None]  # (b, s, n, d)
        return x.flatten(0, 1), count[:, -1]

    def _fold(self, mask: Tensor | None) -> Tensor | None:
        """(b, n) -> (b s, n)."""
        return None if mask is None else mask.repeat_interleave(self.streams, dim=0)

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.streams, *x.shape[1:]).sum(1))
        weight = self.token_embedding if self.to_logits is None else self.to_logits.weight
        return F.linear(x, weight)

    def _run_with_diversity(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=x.device)
        inputs = {"mask": self._fold(mask), "context": None, "context_mask": None}
        for sub in self.stack.sublayers():
            if not sub.tokenwise:
                total = total + self._diversity_of(sub.block, sub.residual.branch(x), mask)
            x = sub(x, inputs)
        return x, total

    def _diversity_of(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(block, OverStreams):
            q, k, pre_softmax = block.block.queries_and_keys(block.unfold(x))
            scale = block.block.scale
        elif self.streams == 1:
            return torch.zeros((), device=x.device)
        else:
            raise ValueError(
                f"diversity needs streams whose heads talk, got attention={self.arguments['attention']!r}, "
                f"cross_stream={self.arguments['cross_stream']}"
            )
        return stream_diversity_loss(
            q, k, pre_softmax, streams=self.streams, mask=mask, causal=self.causal, scale=scale
        )
