"""A language model that reads text segment by segment and carries a memory from one to the next.

Paper: Memformer, https://arxiv.org/abs/2010.06891, without its encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_padding, check_positive, check_tokens
from attention_zoo.layers.memory_update import InitialMemory, MemoryUpdate
from attention_zoo.layers.positions import RelativeBias, Rotary
from attention_zoo.layers.residual import Norm
from attention_zoo.layers.state import State, register_state
from attention_zoo.models.layer_specs import FeedForwardSpec, LayerSpec, parse_layers, takes_part
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.saving.saved_model import SavedModel

POSITIONS = ("auto", "rotary", "t5")


class MemoryOutput(NamedTuple):
    """What one segment gives.

    Attributes:
        logits: (b, n, num_tokens) of the token after each token.
        memory: (b, m, d), for the next segment.
    """

    logits: Tensor
    memory: Tensor


@dataclass
class MemoryState(State):
    """What a `MemoryLanguageModel` remembers between steps. Bounded: one segment and the memory.

    Attributes:
        memory: (b, m, d), written by the segments that are full.
        seen: tokens so far, a tensor without axes.
        stack: the blocks' states within the segment that is not full; None at its start.
        features: (b, t, d) of that segment, which the memory will be written from.
        mask: (b, t) bool over it, or None where all tokens are real.
    """

    memory: Tensor
    seen: Tensor
    stack: StackState | None = None
    features: Tensor | None = None
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        return int(self.seen)


register_state(MemoryState)


class MemoryLanguageModel(SavedModel):
    """p(token | its segment so far, the memory), from any causal blocks; every layer reads the memory after them.

    The law: `step` over any split of a text equals `forward` over its consecutive segments of `segment_len` tokens.
    Time per token and state do not grow with the text.

    Args:
        num_tokens: size of the vocabulary.
        dim: features d.
        depth: layers.
        memory_slots: slots m of the memory.
        segment_len: tokens of a segment.
        attention: a block, or a list of blocks cycled over the layers; see `Stack`.
        heads, dim_head: passed to the blocks that have them; None leaves each its own default.
        positions: within a segment. "auto" is rotary for the blocks that take it and nothing for the others; "rotary"
            or "t5" (relative bias) by name; None for none.
        memory_updates, memory_heads: how many times a segment is written to the memory, and with how many heads.
        feedforward, ff_mult, norm, residual, attn_dropout, ff_dropout: see `Stack`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        memory_slots: int,
        segment_len: int,
        attention: LayerSpec | Sequence[LayerSpec] = "full",
        heads: int | None = None,
        dim_head: int | None = None,
        positions: str | None = "auto",
        memory_updates: int = 1,
        memory_heads: int = 8,
        feedforward: FeedForwardSpec = "gelu",
        ff_mult: float = 4,
        norm: Norm = "layer",
        residual: str = "pre",
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.remember(locals())
        check_positive(num_tokens=num_tokens, segment_len=segment_len)
        if positions is not None:
            check_choice("positions", positions, POSITIONS)
        shared: dict[str, Any] = {}
        if positions == "rotary" or (positions == "auto" and takes_part(attention, "rotary")):
            shared["rotary"] = Rotary()
        elif positions == "t5":
            shared["bias"] = RelativeBias(8 if heads is None else heads)
        self.num_tokens = num_tokens
        self.segment_len = segment_len
        self.memory = InitialMemory(memory_slots, dim)
        self.token_embedding = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.stack = Stack(
            dim,
            depth,
            attention=[[*layer, "cross"] for layer in parse_layers(attention)],
            feedforward=feedforward,
            norm=norm,
            residual=residual,
            heads=heads,
            dim_head=dim_head,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
            **shared,
        )
        self.update = MemoryUpdate(dim, heads=memory_heads, updates=memory_updates, ff_mult=ff_mult)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def initial_memory(self, batch: int) -> Tensor:
        """The learned memory before the first segment, (batch, m, d)."""
        return cast(Tensor, self.memory(batch))

    def forward(self, segment: Tensor, *, memory: Tensor | None = None, mask: Tensor | None = None) -> MemoryOutput:
        """Logits over one segment, and the memory after it.

        Args:
            segment: (b, n) int, n <= segment_len.
            memory: (b, m, d), what the segment before gave; None for the initial one.
            mask: (b, n) bool, True = a real token.

        Raises:
            ValueError, TypeError: an argument does not fit, or the text is longer than a segment.
        """
        check_tokens(segment, self.num_tokens, name="segment")
        check_padding(mask, segment)
        if segment.shape[1] > self.segment_len:
            raise ValueError(f"segment must hold at most segment_len={self.segment_len} tokens, got {segment.shape[1]}")
        memory = self._memory(memory, segment.shape[0])
        x = self.stack(self.token_embedding(segment), mask=mask, context=memory)
        return MemoryOutput(self.to_logits(x), self.update(memory, x, mask=mask))

    def step(
        self, tokens: Tensor, state: MemoryState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Logits after each of some new tokens; they may end one segment and begin others.

        Args:
            tokens: (b, t) int, any t >= 1.
            state: what the step before returned; None at the start. It keeps its meaning.
            mask: (b, t) bool over the new tokens.

        Returns:
            (b, t, num_tokens) and the new state.
        """
        check_tokens(tokens, self.num_tokens)
        check_padding(mask, tokens)
        if state is not None and not isinstance(state, MemoryState):
            raise TypeError(f"state must be a MemoryState, got {type(state).__name__}")
        if state is None:
            state = MemoryState(self.initial_memory(tokens.shape[0]), torch.tensor(0))
        self.memory.check(state.memory, tokens.shape[0])
        logits, start = [], 0
        while start < tokens.shape[1]:
            used = 0 if state.features is None else state.features.shape[1]
            stop = min(tokens.shape[1], start + self.segment_len - used)
            part = None if mask is None else mask[:, start:stop]
            out, state = self._advance(tokens[:, start:stop], state, part)
            logits.append(out)
            start = stop
        return torch.cat(logits, dim=1), state

    def _advance(self, tokens: Tensor, state: MemoryState, mask: Tensor | None) -> tuple[Tensor, MemoryState]:
        """`step` for tokens that fit into the segment; the memory is written when they fill it."""
        context = state.memory if state.stack is None else None
        x, stack = self.stack.step(self.token_embedding(tokens), state.stack, mask=mask, context=context)
        logits, seen = self.to_logits(x), state.seen + tokens.shape[1]
        mask = _join_masks(state, x, mask)
        features = x if state.features is None else torch.cat((state.features, x), dim=1)
        if features.shape[1] < self.segment_len:
            return logits, MemoryState(state.memory, seen, stack, features, mask)
        return logits, MemoryState(self.update(state.memory, features, mask=mask), seen)

    def _memory(self, memory: Tensor | None, batch: int) -> Tensor:
        memory = self.initial_memory(batch) if memory is None else memory
        self.memory.check(memory, batch)
        return memory


def _join_masks(state: MemoryState, x: Tensor, mask: Tensor | None) -> Tensor | None:
    if state.features is None or (state.mask is None and mask is None):
        return mask
    old = state.features.new_ones(state.features.shape[:2], dtype=torch.bool) if state.mask is None else state.mask
    new = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return torch.cat((old, new), dim=1)
