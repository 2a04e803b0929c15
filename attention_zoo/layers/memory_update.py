"""Memformer's memory update: each slot attends to itself and to the tokens of a segment, and a GRU updates it.

Paper: Memformer, https://arxiv.org/abs/2010.06891
Upstream: memformer, the memory update of `Memformer`.
Differs: from the paper, a GRU in place of attention with biased memory normalisation, as upstream; from upstream, a row
whose segment is all padding keeps its memory, and the GRU runs in at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_features, check_has_data, check_int, check_padding
from attention_zoo.layers.feedforward import FeedForward
from attention_zoo.layers.norms import LayerNorm
from attention_zoo.layers.projections import merge_heads, split_heads
from attention_zoo.ops.masks import hide_masked, key_mask
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import softmax_attention


class MemoryUpdate(nn.Module):
    """`updates` times: u_i = attn(m_i, [m_i; tokens]); m <- GRU(u, m); m <- m + FF(LN m).

    A slot attends to itself, to no other slot, and to all valid tokens. There is no norm before the attention.
    Time O(m (m + n) d) for m slots and n tokens, memory O((n + m) d + m (m + n)).

    Args:
        dim: features d of slots and tokens.
        heads: number of heads h, of d / h features each.
        updates: number of updates per segment.
        ff_mult: hidden features of the feedforward as a multiple of dim.

    Raises:
        TypeError: a size is not an int.
        ValueError: `heads` does not divide `dim`, or a size is below 1.
    """

    def __init__(self, dim: int, *, heads: int = 8, updates: int = 1, ff_mult: float = 4) -> None:
        super().__init__()
        check_int(1, dim=dim, heads=heads, updates=updates)
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads=}, {dim=}")
        self.dim = dim
        self.heads = heads
        self.updates = updates
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.norm = LayerNorm(dim)
        self.feedforward = FeedForward(dim, mult=ff_mult, bias=True)

    def forward(self, memory: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The memory after a segment.

        Args:
            memory: (b, m, d).
            x: (b, n, d), the features of the segment.
            mask: (b, n) bool, True = a valid token.

        Returns:
            (b, m, d) in the dtype of `memory`.

        Raises:
            TypeError: `memory` or `x` is not floating point, or `mask` is not boolean.
            ValueError: a shape or the batch size does not fit.
        """
        check_features(memory, self.dim, name="memory")
        check_features(x, self.dim)
        check_padding(mask, x)
        check_has_data(self, x)
        if memory.shape[0] != x.shape[0]:
            raise ValueError(f"memory must have the batch size of x, got {memory.shape[0]} and {x.shape[0]}")
        new = self.write(memory, hide_masked(x, mask), mask)
        return new if mask is None else torch.where(mask.any(dim=1)[:, None, None], new, memory)

    def write(self, memory: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The memory after a segment. In rows without valid tokens each slot attends to itself only."""
        keys, values = self._split(self.to_k(x)), self._split(self.to_v(x))
        allowed = self._allowed(memory, x, mask)
        for _ in range(self.updates):
            q, k, v = (self._split(to(memory)) for to in (self.to_q, self.to_k, self.to_v))
            out = softmax_attention(q, torch.cat((k, keys), dim=2), torch.cat((v, values), dim=2), mask=allowed)
            new = self._gru(self.to_out(merge_heads(out)), memory)
            memory = (new + self.feedforward(self.norm(new))).to(memory.dtype)
        return memory

    def _gru(self, update: Tensor, memory: Tensor) -> Tensor:
        cell = self.gru
        with no_autocast(memory):
            hidden = at_least_float32(memory).flatten(0, 1)
            weights = (w.to(hidden.dtype) for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
            new = torch.gru_cell(update.to(hidden.dtype).flatten(0, 1), hidden, *weights)
            return new.view_as(memory).to(memory.dtype)

    def _allowed(self, memory: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """(1 or b, 1, m, m + n) bool: each slot itself, and the valid tokens."""
        m, n = memory.shape[1], x.shape[1]
        own = torch.eye(m, dtype=torch.bool, device=x.device)[None, None]
        if mask is None:
            return torch.cat((own, own.new_ones(1, 1, m, n)), dim=-1)
        b = x.shape[0]
        return torch.cat((own.expand(b, -1, -1, -1), key_mask(mask).expand(-1, -1, m, -1)), dim=-1)

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.dim // self.heads)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, updates={self.updates}"


class InitialMemory(nn.Module):
    """The memory before the first segment: one learned vector per slot.

    Args:
        slots: number of slots m.
        dim: features d.
    """

    def __init__(self, slots: int, dim: int) -> None:
        super().__init__()
        check_int(1, memory_slots=slots, dim=dim)
        self.weight = nn.Parameter(torch.randn(slots, dim))

    def forward(self, batch: int) -> Tensor:
        """(batch, m, d)."""
        check_int(1, batch=batch)
        return self.weight.expand(batch, -1, -1)

    def check(self, memory: Tensor, batch: int) -> None:
        """Check the shape and dtype of a memory.

        Raises:
            TypeError: `memory` is not a floating point tensor.
            ValueError: `memory` is not (batch, m, d).
        """
        check_features(memory, self.weight.shape[1], name="memory")
        want = (batch, *self.weight.shape)
        if memory.shape != want:
            raise ValueError(f"memory must be (b, memory_slots, dim) = {want}, got shape {tuple(memory.shape)}")
