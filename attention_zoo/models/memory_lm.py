"""A language model over consecutive segments that passes a memory from one segment to the next.

Paper: Memformer, https://arxiv.org/abs/2010.06891
Differs: no encoder; every layer of one causal stack attends to the memory; any attention layers;
    by default upstream's memory update, with memory_update="paper" that of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_int, check_padding, check_tokens
from attention_zoo.generation import decoding
from attention_zoo.layers.projections import project_logits
from attention_zoo.layers.residual import Norm
from attention_zoo.layers.state import State, check_state, concat_masks, count_tokens, own_mask, register_state
from attention_zoo.models.composed_model import ComposedModel
from attention_zoo.models.layer_specs import AttentionSpec, FeedForwardSpec, parse_layers
from attention_zoo.models.memory import MemoryMixin, MemoryUpdateSpec, make_initial_memory, make_memory_update
from attention_zoo.models.positions import PositionSpec, embed_tokens, position_parts
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops.losses import LossTerm, count_next_tokens, next_token_loss, total_loss


class MemoryOutput(NamedTuple):
    """Output of one segment.

    Attributes:
        logits: (b, n, num_tokens) of the token after each token.
        memory: (b, m, d), for the next segment.
    """

    logits: Tensor
    memory: Tensor


@dataclass
class MemoryState(State):
    """Decoding state of a `MemoryLanguageModel`: the memory and at most one segment.

    Attributes:
        memory: (b, m, d), the memory after the last complete segment.
        token_count: number of tokens so far, a 0-d tensor.
        stack: the state of the stack within the incomplete segment; None at its start.
        features: (b, t, d) of the incomplete segment, for the next update of the memory.
        mask: (b, t) bool, True = a valid token of the incomplete segment. None: all are valid.
    """

    memory: Tensor
    token_count: Tensor
    stack: StackState | None = None
    features: Tensor | None = None
    mask: Tensor | None = None


register_state(MemoryState)


class MemoryLanguageModel(MemoryMixin, ComposedModel):
    """p(token | its segment so far, the memory). Every layer also cross-attends to the memory.

    `step` over any split of a text equals `forward` over its consecutive segments of `segment_len` tokens. Time per
    token and the size of the state do not grow with the text.

    Args:
        num_tokens, dim, depth: see `LanguageModel`.
        memory_slots: slots m of the memory.
        segment_len: tokens of a segment.
        attention, heads, dim_head, feedforward, ff_mult, norm, residual, attn_dropout, ff_dropout: see `Stack`.
        positions: "auto", "rotary", "t5", "alibi" or None, within a segment; see `LanguageModel`.
        memory_update: "gru", upstream's `MemoryUpdate`; "paper", slot attention with biased memory normalisation, see
            `BiasedMemoryUpdate`; or (name, options), such as ("paper", {"temperature": 0.5}).
        memory_updates: number of memory updates per segment.
        memory_heads: number of heads of the memory update.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.
    """

    generate = decoding.generate

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        memory_slots: int,
        segment_len: int,
        attention: AttentionSpec = "full",
        heads: int | None = None,
        dim_head: int | None = None,
        positions: PositionSpec = "auto",
        memory_update: MemoryUpdateSpec = "gru",
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
        check_int(1, num_tokens=num_tokens, segment_len=segment_len)
        layers = parse_layers(attention)
        self.num_tokens = num_tokens
        self.segment_len = segment_len
        self.memory = make_initial_memory(memory_update, memory_slots, dim)
        self.token_embedding = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.stack = Stack(
            dim,
            depth,
            attention=[[*layer, "cross"] for layer in layers],
            feedforward=feedforward,
            norm=norm,
            residual=residual,
            heads=heads,
            dim_head=dim_head,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
            **position_parts(positions, heads, known=("auto", "rotary", "t5", "alibi")),
        )
        self.stack.fixed_blocks = 1  # the cross-attention to the memory
        self.update = make_memory_update(
            memory_update,
            dim,
            memory_slots=memory_slots,
            heads=memory_heads,
            updates=memory_updates,
            ff_mult=ff_mult,
        )
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(self, segment: Tensor, *, memory: Tensor | None = None, mask: Tensor | None = None) -> MemoryOutput:
        """Logits over one segment, and the memory after it.

        Args:
            segment: (b, n) int, n <= segment_len.
            memory: (b, m, d), the memory after the previous segment. None: the initial memory.
            mask: (b, n) bool, True = a valid token.

        Raises:
            TypeError, ValueError: an argument is invalid, or there are more than segment_len tokens.
        """
        x = embed_tokens(self.token_embedding, segment, None, dim=self.stack.dim, name="segment")
        check_padding(mask, segment)
        if segment.shape[1] > self.segment_len:
            raise ValueError(f"segment must hold at most segment_len={self.segment_len} tokens, got {segment.shape[1]}")
        memory = self.initial_memory(segment.shape[0]) if memory is None else memory
        self._start.check(memory, segment.shape[0])
        x = self.stack(x, mask=mask, context=memory)
        return MemoryOutput(project_logits(self.to_logits, x), self.update(memory, x, mask=mask))

    def loss(self, tokens: Tensor, *, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Mean cross entropy, in nats, of every valid token given the valid tokens before it.

        The text is processed in consecutive segments of `segment_len` tokens, through which gradients flow.

        Args:
            tokens: (b, n) int, any n >= 2.
            memory: (b, m, d), the memory before the text; None for the initial one.
            mask: (b, n) bool, True = a valid token.
        """
        return total_loss(self.loss_terms(tokens, memory=memory, mask=mask))

    def loss_terms(self, tokens: Tensor, *, memory: Tensor | None = None, mask: Tensor | None = None) -> list[LossTerm]:
        """The loss as a mean and its count of targets. Arguments as in `loss`."""
        check_tokens(tokens, self.num_tokens, minimum=2)
        check_padding(mask, tokens)
        logits = []
        for part in _segments(0, tokens.shape[1] - 1, self.segment_len):
            out = self(tokens[:, part], memory=memory, mask=None if mask is None else mask[:, part])
            logits.append(out.logits)
            memory = out.memory
        mean = next_token_loss(torch.cat(logits, dim=1), tokens, mask)
        return [LossTerm(mean, count_next_tokens(tokens, mask))]

    def step(
        self, tokens: Tensor, state: MemoryState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Logits after each new token. The new tokens may complete a segment and begin others.

        Args:
            tokens: (b, t) int, any t >= 1.
            state: the state returned by the previous step; None for the first. It is not modified.
            mask: (b, t) bool, True = a valid token.

        Returns:
            (b, t, num_tokens) and the new state.

        Raises:
            TypeError: `state` is not a MemoryState.
            ValueError: an id is out of range, or `state` comes from another batch.
        """
        check_tokens(tokens, self.num_tokens)
        check_padding(mask, tokens)
        check_state(state, MemoryState)
        if state is None:
            state = MemoryState(self.initial_memory(tokens.shape[0]), count_tokens(None, 0, tokens.device))
        elif state.memory.shape[0] != tokens.shape[0]:
            got = state.memory.shape[0]
            raise ValueError(f"state must have the batch size of tokens, {tokens.shape[0]}, got {got}")
        self._start.check(state.memory, tokens.shape[0])
        used = 0 if state.features is None else state.features.shape[1]
        logits = []
        for part in _segments(used, tokens.shape[1], self.segment_len):
            out, state = self._step_in_segment(tokens[:, part], state, None if mask is None else mask[:, part])
            logits.append(out)
        return torch.cat(logits, dim=1), state

    def _step_in_segment(self, tokens: Tensor, state: MemoryState, mask: Tensor | None) -> tuple[Tensor, MemoryState]:
        """`step` for tokens of one segment. The memory is updated when they complete it."""
        context = state.memory if state.stack is None else None
        x = embed_tokens(self.token_embedding, tokens, None, dim=self.stack.dim)
        x, stack = self.stack.step(x, state.stack, mask=mask, context=context)
        logits = project_logits(self.to_logits, x)
        token_count = count_tokens(state.token_count, x.shape[1], x.device)
        if state.features is not None:
            mask = concat_masks(state.mask, mask, x.shape[0], state.features.shape[1], x.shape[1], x.device)
            x = torch.cat((state.features, x), dim=1)
        if x.shape[1] < self.segment_len:
            return logits, MemoryState(state.memory, token_count, stack, x, own_mask(mask))
        return logits, MemoryState(self.update(state.memory, x, mask=mask), token_count)


def _segments(used: int, new: int, segment_len: int) -> Iterator[slice]:
    """Slices of `new` tokens that end where segments do, after `used` tokens of the first segment."""
    start = 0
    while start < new:
        stop = min(new, start + segment_len - used)
        yield slice(start, stop)
        start, used = stop, 0
