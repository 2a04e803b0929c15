"""Memory updates: each slot of a memory attends to itself and to the tokens of a segment.

Paper: Memformer, https://arxiv.org/abs/2010.06891
Upstream: memformer, the memory update of `Memformer`.
Differs: `MemoryUpdate`, from the paper: a GRU and a feedforward in place of raw values and biased memory normalisation,
as upstream; from upstream: a row whose segment is all padding keeps its memory, and the GRU runs in at least float32.
`BiasedMemoryUpdate`, from upstream: no GRU, as described in the paper. Heads, the scale e^-0.5 besides the temperature,
projections without bias and several updates per segment are choices of this package. A row whose segment is all padding
keeps its memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_features, check_has_data, check_in, check_int, check_padding
from attention_zoo.layers.feedforward import FeedForward
from attention_zoo.layers.norms import LayerNorm
from attention_zoo.layers.projections import merge_heads, split_heads
from attention_zoo.ops.cosine_sim import l2_normalize
from attention_zoo.ops.masks import hide_masked, key_mask
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import softmax_attention


class SlotUpdate(nn.Module):
    """Base class of memory updates: `updates` times, every slot is replaced by what `write_once` returns.

    Args:
        dim: features d of slots and tokens.
        heads: number of heads h, of d / h features each.
        updates: number of updates per segment.
        bias: whether the projections have a bias.

    Raises:
        TypeError: a size is not an int.
        ValueError: `heads` does not divide `dim`, or a size is below 1.
    """

    def __init__(self, dim: int, *, heads: int, updates: int, bias: bool) -> None:
        super().__init__()
        check_int(1, dim=dim, heads=heads, updates=updates)
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads=}, {dim=}")
        self.dim = dim
        self.heads = heads
        self.updates = updates
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)

    def forward(self, memory: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The memory after a segment.

        Args:
            memory: (b, m, d).
            x: (b, n, d), the features of the segment.
            mask: (b, n) bool, True = a valid token. A row without valid tokens keeps its memory.

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
        for _ in range(self.updates):
            memory = self.write_once(memory, keys, values, mask)
        return memory

    def write_once(self, memory: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The memory (b, m, d) after one update; `keys` and `values` of the tokens are (b, h, n, e)."""
        raise NotImplementedError

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.dim // self.heads)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, updates={self.updates}"


class MemoryUpdate(SlotUpdate):
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
        super().__init__(dim, heads=heads, updates=updates, bias=True)
        self.to_out = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.norm = LayerNorm(dim)
        self.feedforward = FeedForward(dim, mult=ff_mult, bias=True)

    def write_once(self, memory: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self._split(to(memory)) for to in (self.to_q, self.to_k, self.to_v))
        allowed = self._allowed(memory.shape[1], keys, mask)
        out = softmax_attention(q, torch.cat((k, keys), dim=2), torch.cat((v, values), dim=2), mask=allowed)
        new = self._gru(self.to_out(merge_heads(out)), memory)
        return (new + self.feedforward(self.norm(new))).to(memory.dtype)

    def _gru(self, update: Tensor, memory: Tensor) -> Tensor:
        cell = self.gru
        with no_autocast(memory):
            hidden = at_least_float32(memory).flatten(0, 1)
            weights = (w.to(hidden.dtype) for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
            new = torch.gru_cell(update.to(hidden.dtype).flatten(0, 1), hidden, *weights)
            return new.view_as(memory).to(memory.dtype)

    def _allowed(self, m: int, keys: Tensor, mask: Tensor | None) -> Tensor:
        """(1 or b, 1, m, m + n) bool: each slot itself, and the valid tokens."""
        b, _, n, _ = keys.shape
        own = torch.eye(m, dtype=torch.bool, device=keys.device)[None, None]
        if mask is None:
            return torch.cat((own, own.new_ones(1, 1, m, n)), dim=-1)
        return torch.cat((own.expand(b, -1, -1, -1), key_mask(mask).expand(-1, -1, m, -1)), dim=-1)


class BiasedMemoryUpdate(SlotUpdate):
    """`updates` times, as described in the paper: slot attention, then forgetting by biased memory normalisation.

    m'_i = softmax(W_q m_i [W_k m_i; W_k x]^T e^-0.5 / temperature) [m_i; W_v x]
    m_i <- (m'_i + v_i) / ||m'_i + v_i||, and m_i = v_i / ||v_i|| before the first segment

    with a learned vector v_i per slot, v_bias in the paper. A slot attends to itself, to no other slot, and to all
    valid tokens. Its own value is the slot itself, without a projection, so that a slot that attends to itself alone is
    kept; v_i then turns it towards its initial state, faster the longer v_i is. With several heads, each has its slice
    of the features of m_i. Slots have length 1.

    Time O((m + n) d^2 + m n d) for m slots and n tokens, memory O((m + n) d + h m n).

    Args:
        dim: features d of slots and tokens.
        memory_slots: number of slots m.
        heads: number of heads h, of e = d / h features each.
        updates: number of updates per segment.
        temperature: divisor of the scores; below 1, slots attend to fewer tokens.

    Raises:
        TypeError: a size is not an int, or `temperature` is not a number.
        ValueError: `heads` does not divide `dim`, a size is below 1, or `temperature` is not positive and finite.
    """

    def __init__(
        self, dim: int, *, memory_slots: int, heads: int = 8, updates: int = 1, temperature: float = 0.25
    ) -> None:
        super().__init__(dim, heads=heads, updates=updates, bias=False)
        check_in("(0, inf)", temperature=temperature)
        self.temperature = temperature
        self.initial = BiasedMemory(memory_slots, dim)

    def write(self, memory: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        self.initial.check(memory, x.shape[0])
        return super().write(memory, x, mask)

    def write_once(self, memory: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        q, own = self._split(self.to_q(memory)), self._split(self.to_k(memory))
        with no_autocast(memory):
            q, own, slot, keys, values = map(at_least_float32, (q, own, self._split(memory), keys, values))
            scores = torch.cat(((q * own).sum(dim=-1, keepdim=True), q @ keys.transpose(-1, -2)), dim=-1)
            scores = scores * (q.shape[-1] ** -0.5 / self.temperature)
            if mask is not None:
                scores = torch.cat((scores[..., :1], scores[..., 1:].masked_fill(~key_mask(mask), -math.inf)), dim=-1)
            weights = scores.softmax(dim=-1)
            attended = weights[..., :1] * slot + weights[..., 1:] @ values
            return self.initial.forget(merge_heads(attended)).to(memory.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


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


class BiasedMemory(InitialMemory):
    """The vectors v of `BiasedMemoryUpdate`, one per slot. The memory before the first segment is v / ||v||.

    Args:
        slots: number of slots m.
        dim: features d.
    """

    def __init__(self, slots: int, dim: int) -> None:
        super().__init__(slots, dim)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, batch: int) -> Tensor:
        """(batch, m, d), of length 1."""
        check_int(1, batch=batch)
        return l2_normalize(self.weight).expand(batch, -1, -1)

    def forget(self, memory: Tensor) -> Tensor:
        """(memory + v) / ||memory + v||, (b, m, d)."""
        return l2_normalize(memory + self.weight)
