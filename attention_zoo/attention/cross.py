"""Cross attention: tokens read a context, another sequence or a memory, each on its own.

Paper: Attention Is All You Need, https://arxiv.org/abs/1706.03762; reading a memory: https://arxiv.org/abs/2010.06891
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attention_zoo._checks import check_features, check_padding, check_positive
from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.state import State, count_tokens, register_state
from attention_zoo.ops.softmax import softmax_attention, softmax_attention_weights


@dataclass
class CrossAttentionState(State):
    """The context as `CrossAttention.step` reads it. Size: 2 * b * h * context length * dim_head numbers.

    Attributes:
        keys, values: (b, h, j, e) of the context.
        mask: (b, j) bool over the context, or None.
        seen: tokens that have read it so far, a tensor without axes.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        return int(self.seen)


register_state(CrossAttentionState)


class CrossAttention(AttentionBlock):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j, queries from x, keys and values from the context.

    A token sees the whole context and no other token of x, so the block is causal in x whatever surrounds it.
    Time O(n j d), memory O((n + j) d). State: keys and values of the context, computed once.

    Args:
        dim: features d of input and output.
        context_dim: features of the context. None: dim.
        heads: heads h.
        dim_head: features e of each head.
        dropout: probability with which an attention weight is dropped in training.
        qkv_bias, out_bias: give the projections to queries, keys and values, and the one to the output, biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, dropout=dropout)
        check_positive(context_dim=context_dim)
        self.context_dim = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, heads * dim_head, bias=qkv_bias)
        self.to_k = nn.Linear(self.context_dim, heads * dim_head, bias=qkv_bias)
        self.to_v = nn.Linear(self.context_dim, heads * dim_head, bias=qkv_bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=out_bias)

    def forward(  # type: ignore[override]  # beside what every block takes, a context
        self, x: Tensor, context: Tensor, *, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Read the context.

        Args:
            x: (b, n, d).
            context: (b, j, context_dim).
            mask: (b, n) bool; outputs at masked tokens mean nothing.
            context_mask: (b, j) bool, True = may be read. A row without any reads 0.

        Returns:
            (b, n, d).
        """
        self._check(x, mask)
        keys, values = self._read(context, context_mask, x)
        return self._attend(x, keys, values, context_mask)

    def step(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, CrossAttentionState]:
        """Read the context for new tokens: the first step needs it, later ones have it in their state.

        Args:
            x: (b, t, d).
            state: what the step before returned.
            mask: (b, t) bool over the new tokens.
            context, context_mask: as in `forward`; only with the first step.
        """
        self._check_step(x, state, mask, CrossAttentionState)
        if isinstance(state, CrossAttentionState):
            if context is not None:
                raise ValueError("context must be given with the first step alone, got one beside a state")
            if state.keys.shape[:2] != (x.shape[0], self.heads) or state.keys.shape[-1] != self.dim_head:
                want = (x.shape[0], self.heads, "j", self.dim_head)
                raise ValueError(f"state must hold keys of shape {want}, got {tuple(state.keys.shape)}")
            keys, values, context_mask, seen = state.keys, state.values, state.mask, state.seen
        else:
            if context is None:
                raise ValueError("context must be given with the first step, got None")
            keys, values = self._read(context, context_mask, x)
            seen = None
        out = self._attend(x, keys, values, context_mask)
        return out, CrossAttentionState(keys, values, count_tokens(seen, x.shape[1]), context_mask)

    def attention_map(  # type: ignore[override]
        self, x: Tensor, context: Tensor, *, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """The weights (b, h, n, j) with which the values of the context are summed."""
        self._check(x, mask)
        keys, _ = self._read(context, context_mask, x)
        return softmax_attention_weights(self._heads(self.to_q(x)), keys, mask=context_mask)

    def values_and_output(  # type: ignore[override]
        self, x: Tensor, context: Tensor, *, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> ValuesAndOutput:
        self._check(x, mask)
        keys, values = self._read(context, context_mask, x)
        return ValuesAndOutput(values, softmax_attention(self._heads(self.to_q(x)), keys, values, mask=context_mask))

    def _read(self, context: Tensor, context_mask: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        check_features(context, self.context_dim, name="context")
        check_padding(context_mask, context, name="context_mask")
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context must have the batch of x, got {context.shape[0]} and {x.shape[0]}")
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor, context_mask: Tensor | None) -> Tensor:
        out = softmax_attention(self._heads(self.to_q(x)), keys, values, mask=context_mask, dropout=self._drop)
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.dim_head).transpose(1, 2)  # (b, h, n, e)
