"""Cross-attention: tokens attend to a context, which is another sequence or a memory.

Papers: Attention Is All You Need, https://arxiv.org/abs/1706.03762; attention to a memory: Memformer,
    https://arxiv.org/abs/2010.06891
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attention_zoo._checks import check_features, check_flag, check_padding, check_positive
from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.projections import merge_heads, split_heads
from attention_zoo.layers.state import (
    State,
    check_state_dtype,
    check_state_shape,
    count_tokens,
    own_mask,
    register_state,
)
from attention_zoo.ops.documents import Documents, as_documents
from attention_zoo.ops.masks import combine_masks, hide_keys, hide_masked, restrict
from attention_zoo.ops.softmax import softmax_attention, softmax_attention_weights


@dataclass
class CrossAttentionState(State):
    """Keys and values of the context. Size: 2 j h dim_head elements per row for a context of j tokens.

    Attributes:
        keys, values: (b, h, j, e).
        token_count: number of tokens that have attended to the context so far, a 0-d tensor.
        mask: (b, j) bool, True = a valid token of the context, or None.
    """

    keys: Tensor
    values: Tensor
    token_count: Tensor
    mask: Tensor | None = None


register_state(CrossAttentionState)


class CrossAttention(AttentionBlock):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j with queries of x, keys and values of the context.

    A token attends to the whole context and to no other token of x, so the layer is causal in x.
    Time O(n j d), memory O((n + j) d). State: keys and values of the context, computed once.

    Args:
        dim, heads, dim_head, dropout: see `AttentionBlock`.
        context_dim: features of the context. Default: `dim`.
        qkv_bias, out_bias: whether the QKV projections and the output projection have a bias.
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
        check_flag(qkv_bias=qkv_bias, out_bias=out_bias)
        self.context_dim = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, heads * dim_head, bias=qkv_bias)
        self.to_k = nn.Linear(self.context_dim, heads * dim_head, bias=qkv_bias)
        self.to_v = nn.Linear(self.context_dim, heads * dim_head, bias=qkv_bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=out_bias)

    def forward(  # type: ignore[override]  # a context in addition to the arguments of every layer
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        context_document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend to a context.

        Args:
            x: (b, n, d).
            context: (b, j, context_dim).
            mask: (b, n) bool, True = a valid token. Outputs at masked tokens are finite and meaningless.
            context_mask: (b, j) bool, True = a valid token of the context. A row without any gives 0.
            attn_mask: (n, j), (b, n, j) or (b, h, n, j), over queries of x and keys of the context; see
                `AttentionBlock.forward`.
            document_ids, context_document_ids: (b, n) and (b, j) int, both or neither: a token attends to the part of
                the context with its own id.
            position_ids: None; the layer has no positions.

        Returns:
            (b, n, d).
        """
        documents = document_ids, context_document_ids
        return self.merge(
            self.attend(*self.project(x, context, mask, context_mask, attn_mask, documents, position_ids))
        )

    def step(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, CrossAttentionState]:
        """Attend from new tokens (b, t, d) to the context, which is given to the first step only.

        Args:
            x, state, mask: see `AttentionBlock.step`.
            context, context_mask: see `forward`; only in the first step.
            attn_mask: (t, j), (b, t, j) or (b, h, t, j), over the new tokens and the keys of the context.

        Returns:
            (b, t, d) and the new state.

        Raises:
            TypeError: `state` is of another kind of layer or of another dtype.
            ValueError: `context` is missing in the first step, `context` or `context_mask` is given in a later one, or
                `state` comes from another layer or batch size.
        """
        self.check_step(x, state, mask, CrossAttentionState, position_ids=position_ids)
        x = hide_masked(x, mask)
        if isinstance(state, CrossAttentionState):
            if context is not None or context_mask is not None:
                name = "context_mask" if context is None else "context"
                raise ValueError(f"{name} must be given with the first step only, got a {name} and a state")
            shape = (x.shape[0], self.heads, state.keys.shape[2], self.dim_head)
            check_state_shape(state.keys, "(b, heads, j, dim_head)", shape)
            k, v, context_mask, count = state.keys, state.values, state.mask, state.token_count
        else:
            if context is None:
                raise ValueError("context must be given with the first step, got None")
            k, v = self.project_context(context, context_mask, x)
            count, context_mask = None, own_mask(context_mask)
        q = self.project_queries(x)
        check_state_dtype(k, q)
        out = self.merge(self.attend(q, k, v, self.masked(x, k, context_mask, attn_mask)))
        return out, CrossAttentionState(k, v, count_tokens(count, x.shape[1], x.device), context_mask)

    def project(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None,
        context_mask: Tensor | None,
        attn_mask: Tensor | None,
        documents: tuple[Tensor | Documents | None, Tensor | Documents | None],
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and the mask of the operation; `documents` are the ids of x and of the context."""
        self.check_inputs(x, mask, position_ids=position_ids)
        x = hide_masked(x, mask)
        k, v = self.project_context(context, context_mask, x)
        pairs = self.masked(x, k, context_mask, attn_mask)
        if (documents[0] is None) != (documents[1] is None):
            missing = "context_document_ids" if documents[1] is None else "document_ids"
            raise ValueError(f"document_ids and context_document_ids must be given together, got {missing}=None")
        own = as_documents(documents[0], x)
        theirs = as_documents(documents[1], context, name="context_document_ids")
        if own is not None and theirs is not None:
            allowed = hide_keys(own.ids[:, :, None] == theirs.ids[:, None, :], context_mask)
            pairs = allowed if attn_mask is None else restrict(attn_mask, allowed)
        return self.project_queries(x), k, v, pairs

    def project_queries(self, x: Tensor) -> Tensor:
        """Queries (b, h, n, e)."""
        return split_heads(self.to_q(x), self.dim_head)

    def project_context(self, context: Tensor, context_mask: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, j, e)."""
        check_features(context, self.context_dim, name="context")
        check_padding(context_mask, context, name="context_mask")
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context must have the batch size of x, got {context.shape[0]} and {x.shape[0]}")
        context = hide_masked(context, context_mask)
        return split_heads(self.to_k(context), self.dim_head), split_heads(self.to_v(context), self.dim_head)

    def masked(self, x: Tensor, k: Tensor, context_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """The mask of the operation: `context_mask`, or both masks combined in four axes."""
        self.check_attn_mask(attn_mask, x, k.shape[2])
        return combine_masks(context_mask, attn_mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The attention operation: q (b, h, n, e), k and v (b, h, j, e), mask over the context -> (b, h, n, e)."""
        return softmax_attention(q, k, v, mask=mask, dropout=self.dropout_now)

    def merge(self, out: Tensor) -> Tensor:
        """Merge the heads (b, h, n, e) and project to (b, n, d)."""
        return self.to_out(merge_heads(out))

    def attention_map(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        context_document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The weights (b, h, n, j) on the values of the context."""
        documents = document_ids, context_document_ids
        q, k, _, pairs = self.project(x, context, mask, context_mask, attn_mask, documents, position_ids)
        return softmax_attention_weights(q, k, mask=pairs)

    def values_and_output(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        context_document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> ValuesAndOutput:
        documents = document_ids, context_document_ids
        q, k, v, pairs = self.project(x, context, mask, context_mask, attn_mask, documents, position_ids)
        return ValuesAndOutput(v, self.attend(q, k, v, pairs))
