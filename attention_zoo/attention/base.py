"""The contract that every block of the zoo keeps, and the cached self-attention that most of them are."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_features, check_fraction, check_padding, check_positive
from attention_zoo.layers.positions import RelativeBias, RotaryEmbedding
from attention_zoo.layers.projections import Projections
from attention_zoo.layers.state import KeyValueState, State
from attention_zoo.ops.softmax import DistanceBias, repeat_heads
from attention_zoo.ops.sparse import Pattern, pattern_attention, pattern_weights


class ValuesAndOutput(NamedTuple):
    """What the operation inside a block reads and returns: `attention_map(x) @ values` equals `output`.

    values: (b, h, j, e), what the weights multiply.
    output: (b, h, i, e), the output of the operation, before any gate, norm or projection.
    """

    values: Tensor
    output: Tensor


class AttentionBlock(nn.Module):
    """What a block is: features in, features out, masked, and decoded step by step where it is causal.

    The law: in eval mode `forward(x)` equals the concatenation of `step` over any split of x, with padding too.
    `attention_zoo.testing.check_block` proves it and the rest of the contract for any block.

    Args:
        dim: features d of input and output.
        heads: heads h.
        dim_head: features e of each head.
        causal: hide the future from every token. A leak has to be asked for.
        dropout: probability with which an attention weight is dropped in training.

    Attributes:
        compiles: whether torch.compile(fullgraph=True) traces the block; a class that cannot be traced says False.
    """

    compiles: ClassVar[bool] = True

    def __init__(
        self, dim: int, *, heads: int = 8, dim_head: int = 64, causal: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads, dim_head=dim_head)
        check_fraction(dropout=dropout)
        self.dim = dim
        self.heads = heads
        self.dim_head = dim_head
        self.causal = causal
        self.dropout = dropout

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attend over a whole sequence.

        Args:
            x: (b, n, d).
            mask: (b, n) bool, True = a real token. Outputs at masked tokens are finite and mean nothing.

        Returns:
            (b, n, d).
        """
        raise TypeError(f"{type(self).__name__} must define forward")

    def step(self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Attend from new tokens to themselves and all that came before.

        Args:
            x: (b, t, d), any number t >= 1 of new tokens.
            state: what the step before returned; None at the start. It keeps its meaning.
            mask: (b, t) bool over the new tokens; the state remembers the earlier ones.

        Returns:
            (b, t, d) and the new state.

        Raises:
            ValueError: the block is not causal.
        """
        raise TypeError(f"{type(self).__name__} must define step")

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The effective weights (b, h, i, j) that multiply the values, before any gate, norm or projection."""
        raise TypeError(f"{type(self).__name__} must define attention_map")

    def values_and_output(self, x: Tensor, *, mask: Tensor | None = None) -> ValuesAndOutput:
        """The values and what the op makes of them, so that attention_map can be held against the op itself."""
        raise TypeError(f"{type(self).__name__} must define mix")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, dim_head={self.dim_head}, causal={self.causal}"

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        check_features(x, self.dim)
        check_padding(mask, x)

    def _check_step(self, x: Tensor, state: State | None, mask: Tensor | None, kind: type[State]) -> None:
        self._check(x, mask)
        if not self.causal:
            raise ValueError(f"step needs a block built with causal=True, got causal={self.causal}")
        if state is None:
            return
        if not isinstance(state, kind):
            raise TypeError(f"state must be a {kind.__name__} of an earlier step, got {type(state).__name__}")

    @property
    def _drop(self) -> float:
        return self.dropout if self.training else 0.0


class SelfAttention(AttentionBlock):
    """A block whose tokens attend to each other's keys and values, which `step` caches.

    A subclass says how a query attends, in `attend` and `weights`, for queries that stand at the end of the keys; it
    may prepare queries and keys in `prepare`, once per token. One matrix product makes queries, keys and values, since
    in decoding every call of one costs more than its share of the arithmetic.

    Args:
        dim, heads, dim_head, causal, dropout: see `AttentionBlock`.
        kv_heads: heads of keys and values, each shared by heads / kv_heads query heads. None: as many as heads.
        rotary: turns queries and keys by their position.
        bias: adds to the scores by the distance of key and query.
        rotate_values: `rotary` turns the values too.
        qkv_bias, out_bias: give the projections to queries, keys and values, and the one to the output, biases.

    Raises:
        ValueError: kv_heads does not divide heads, the bias has another number of heads, rotate_values without rotary.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        bias: RelativeBias | None = None,
        rotate_values: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, causal=causal, dropout=dropout)
        check_positive(kv_heads=kv_heads)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {kv_heads=}, {heads=}")
        if rotary is not None:
            rotary.prepare(dim_head)
        if bias is not None:
            bias.check_heads(heads)
        if rotate_values and rotary is None:
            raise ValueError(f"rotary must be given with {rotate_values=}, got rotary=None")
        self.rotary = rotary
        self.rotate_values = rotate_values
        self.bias = bias
        inner, kv_inner = heads * dim_head, self.kv_heads * dim_head
        self.to_qkv = Projections(dim, q=inner, k=kv_inner, v=kv_inner, bias=qkv_bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=out_bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(b, h, i, e) queries at the end of (b, kv_h, j, e) keys, mask (b, j) over the keys -> (b, h, i, e)."""
        raise TypeError(f"{type(self).__name__} must define attend")

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The weights (b, h, i, j) with which `attend` sums the values."""
        raise TypeError(f"{type(self).__name__} must define weights")

    def prepare(self, qk: Tensor, start: int) -> Tensor:
        """Queries or keys, or both along the heads: those of tokens at start, start + 1, ... as `attend` wants them."""
        return qk if self.rotary is None else self.rotary(qk, start)

    def score_bias(self, q: Tensor, k: Tensor) -> DistanceBias | None:
        """What `bias` adds to the scores of these queries, which stand at the end of these keys."""
        return None if self.bias is None else self.bias(q.shape[-2], k.shape[-2], q.device)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        q, k, v = self._project(x, start=0)
        return self._merge(self.attend(q, k, v, mask), x)

    def step(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValueState]:
        self._check_step(x, state, mask, KeyValueState)
        q, k, v = self._project(x, start=0 if state is None else state.length)
        if isinstance(state, KeyValueState):
            self._check_cache(state, k)
            state = state.append(k, v, mask)
        else:
            state = KeyValueState(k, v, mask)
        return self._merge(self.attend(q, state.keys, state.values, state.mask), x), state

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        q, k, _ = self._project(x, start=0)
        return self.weights(q, k, mask)

    def values_and_output(self, x: Tensor, *, mask: Tensor | None = None) -> ValuesAndOutput:
        self._check(x, mask)
        q, k, v = self._project(x, start=0)
        return ValuesAndOutput(repeat_heads(v, self.heads), self.attend(q, k, v, mask))

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        count = self.heads + 2 * self.kv_heads
        heads = self.to_qkv(x).view(*x.shape[:2], count, self.dim_head).transpose(1, 2)  # (b, h + 2 kv_h, n, e)
        qk, v = heads[:, : -self.kv_heads], heads[:, -self.kv_heads :]
        if self.rotate_values and self.rotary is not None:
            v = self.rotary(v, start)
        if torch.compiler.is_compiling():
            # torch 2.13 keeps parts of what was computed with the strides of the first length, for all lengths
            return self.prepare(qk[:, : self.heads], start), self.prepare(qk[:, self.heads :], start), v
        qk = self.prepare(qk, start)
        return qk[:, : self.heads], qk[:, self.heads :], v

    def _merge(self, out: Tensor, x: Tensor) -> Tensor:
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected

    def _check_cache(self, state: KeyValueState, k: Tensor) -> None:
        want = (k.shape[0], self.kv_heads, state.length, self.dim_head)
        if state.keys.shape != want:
            raise ValueError(
                f"state must come from this block and batch: (b, kv_heads, n, dim_head) = {want}, "
                f"got keys of shape {tuple(state.keys.shape)}"
            )


class PatternAttention(SelfAttention):
    """Self-attention under a fixed pattern of what sees what; a subclass says under which.

    Args:
        dim, heads, dim_head, causal, dropout: see `AttentionBlock`.
        rotary, rotate_values, out_bias: see `SelfAttention`.
    """

    def pattern(self) -> Pattern:
        """What sees what."""
        raise TypeError(f"{type(self).__name__} must define pattern")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        pattern = self.pattern()
        pattern.check(k.shape[2], name="x")
        return pattern_attention(pattern, q, k, v, mask=mask, dropout=self._drop)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        pattern = self.pattern()
        pattern.check(k.shape[2], name="x")
        return pattern_weights(pattern, q, k, mask=mask)
