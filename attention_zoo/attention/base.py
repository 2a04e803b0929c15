"""The interface of every attention layer, and multi-head self-attention with a key/value cache."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from attention_zoo._arguments import RecordsArguments
from attention_zoo._checks import (
    check_attn_mask,
    check_features,
    check_flag,
    check_fraction,
    check_has_data,
    check_instance,
    check_int,
    check_number,
    check_padding,
    check_positive,
    check_positive_number,
)
from attention_zoo.layers.norms import make_qk_norms
from attention_zoo.layers.output_gate import make_output_gate
from attention_zoo.layers.patterns import make_pattern
from attention_zoo.layers.positions import RelativeBias, RotaryArgument, make_rotary
from attention_zoo.layers.projections import Projections, map_queries_and_keys, merge_heads, split_heads
from attention_zoo.layers.state import KeyValueState, State, check_state, check_state_shape, own_mask
from attention_zoo.ops.documents import Documents, as_documents
from attention_zoo.ops.masks import combine_masks, hide_masked
from attention_zoo.ops.softmax import DistanceBias, repeat_heads, softmax_attention, softmax_attention_weights
from attention_zoo.ops.sparse import Pattern, pattern_attention, pattern_weights


class ValuesAndOutput(NamedTuple):
    """Input and output of the operation inside a layer: `attention_map(x) @ values` equals `output`.

    Attributes:
        values: (b, h, j, e), the values that the weights multiply.
        output: (b, h, i, e), the output of the operation, before any gate, norm or projection.
    """

    values: Tensor
    output: Tensor


class AttentionBlock(RecordsArguments, nn.Module):
    """Base class of attention layers: (b, n, d) in, (b, n, d) out.

    In eval mode a causal layer satisfies `forward(x) == cat(step over any split of x)`, with padding too.
    `attention_zoo.testing.check_block` checks this and the rest of the contract.

    Args:
        dim: input and output features d.
        heads: number of heads h.
        dim_head: features e of each head.
        causal: causal masking.
        dropout: dropout probability of the attention weights.

    Attributes:
        compiles: whether torch.compile(fullgraph=True) can trace the layer.
        no_attn_mask: why the layer takes no `attn_mask`, a relative clause of the error message; None if it takes one.
        no_documents: likewise for `document_ids`.

    Raises:
        TypeError: a size is not an int, `causal` is not a bool, or `dropout` is not a number.
        ValueError: a size is below 1, or `dropout` is outside [0, 1).
    """

    compiles: ClassVar[bool] = True
    no_attn_mask: ClassVar[str | None] = None
    no_documents: str | None = None

    def __init__(
        self, dim: int, *, heads: int = 8, dim_head: int = 64, causal: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_int(1, dim=dim, heads=heads, dim_head=dim_head)
        check_flag(causal=causal)
        check_number(dropout=dropout)
        check_fraction(dropout=dropout)
        self.dim = dim
        self.heads = heads
        self.dim_head = dim_head
        self.causal = causal
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> Tensor:
        """Attend over a whole sequence.

        Args:
            x: (b, n, d).
            mask: (b, n) bool, True = a valid token. Outputs at masked tokens are finite and meaningless, and what a
                masked token holds reaches no other output, NaN included. NaN in a later token that is not masked
                reaches earlier outputs in all layers but recurrences with a gate per channel.
            attn_mask: (i, j), (b, i, j) or (b, h, i, j), where b and h may be 1: boolean, True = query i may attend to
                key j, or floating point, added to the scores, where -inf masks a pair. It is combined with causal
                masking and `mask`. A query that may attend to no key gets 0 from the operation.
            document_ids: (b, n) int, for packed rows: a document is a maximal run of equal ids, and every document gets
                what it would get alone. Models pass `Documents`, which they compute once.

        Returns:
            (b, n, d).

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: a tensor has the wrong shape or device, or the layer takes no `attn_mask` or `document_ids`.
        """
        raise NotImplementedError

    def step(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Decode: attend from new tokens to themselves and to all tokens of earlier steps.

        Args:
            x: (b, t, d), t >= 1 new tokens.
            state: the state returned by the previous step; None for the first. It is not modified.
            mask: (b, t) bool, True = a valid token. The state holds the mask of the earlier tokens.
            attn_mask: the rows of `attn_mask` of `forward` for the new tokens: (t, j), (b, t, j) or (b, h, t, j) with
                j = all tokens so far, the new ones included.

        Returns:
            (b, t, d) and the new state.

        Raises:
            TypeError: `state` is of another kind of layer.
            ValueError: the layer is not causal, or `state` comes from another layer or batch size.
        """
        raise NotImplementedError

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> Tensor:
        """Effective weights (b, h, i, j) on the values, before any gate, norm or projection. Args: see `forward`."""
        raise NotImplementedError

    def values_and_output(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> ValuesAndOutput:
        """Values and output of the operation inside the layer, for checks of `attention_map`. Args: see `forward`."""
        raise NotImplementedError

    @property
    def dropout_now(self) -> float:
        """The dropout probability in the current mode: 0 in eval mode."""
        return self.dropout if self.training else 0.0

    @property
    def num_maps(self) -> int:
        """Number of attention maps h."""
        return self.heads

    def check_inputs(
        self,
        x: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        *,
        earlier: int = 0,
    ) -> Documents | None:
        """Check the arguments of `forward`, or of `step` after `earlier` tokens. Returns `document_ids` as documents.

        Errors as in `forward`.
        """
        check_features(x, self.dim)
        check_padding(mask, x)
        check_has_data(self, x)
        if attn_mask is not None:
            self.check_attn_mask(attn_mask, x, earlier + x.shape[1])
        if document_ids is not None and self.no_documents is not None:
            raise ValueError(f"document_ids must be None for {type(self).__name__}, {self.no_documents}")
        return as_documents(document_ids, x)

    def check_attn_mask(self, attn_mask: Tensor | None, x: Tensor, keys: int) -> None:
        """Check an attention mask over `keys` keys.

        Raises:
            TypeError: `attn_mask` is neither a boolean nor a floating point tensor.
            ValueError: it has the wrong shape or device, or the layer takes none.
        """
        if attn_mask is not None and self.no_attn_mask is not None:
            raise ValueError(f"attn_mask must be None for {type(self).__name__}, {self.no_attn_mask}")
        check_attn_mask(attn_mask, x, self.num_maps, keys)

    def check_step(
        self,
        x: Tensor,
        state: State | None,
        mask: Tensor | None,
        kind: type[State],
        attn_mask: Tensor | None = None,
    ) -> None:
        """Check the arguments of `step`; `kind` is the class of the layer's states. Errors as in `step`."""
        check_state(state, kind)
        if attn_mask is None:
            self.check_inputs(x, mask)
        else:
            self.check_inputs(x, mask, attn_mask, earlier=0 if state is None else state.length)
        if not self.causal:
            raise ValueError(f"step needs causal=True, got causal={self.causal}")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, dim_head={self.dim_head}, causal={self.causal}"


class SelfAttention(AttentionBlock):
    """Multi-head softmax self-attention: project, apply positions, attend, merge the heads.

    Subclasses override `prepare` (positions and norms of queries and keys), `attend` and `weights` (the operation), or
    `project` and `merge`. `step` caches keys and values as `prepare` returns them; a subclass with another state
    overrides `state_class` and `attend_cached`.

    Args:
        dim, heads, dim_head, causal, dropout: see `AttentionBlock`.
        kv_heads: number of key/value heads (grouped-query attention); divides `heads`. Default: `heads`.
        scale: scale of the scores. Default: dim_head^-0.5.
        rotary: rotary position embedding of queries and keys; True for `Rotary()`. A RotaryEmbedding of
            rotary-embedding-torch is converted, see `make_rotary`.
        qk_norm: norm of the queries and keys of each head, before `rotary`: "rms", RMSNorm with one learned weight
            (dim_head,) for all query heads and one for all key heads, as in Qwen3; or "l2", unit length, and a learned
            scale per query head takes the place of `scale`, which is its initial value, by default dim_head^0.5. At
            that value both kinds give the same scores. Default: no norm.
        qk_norm_eps: added to the mean square ("rms"), or the smallest norm to divide by ("l2").
        bias: relative position bias, added to the scores.
        pattern: sparse pattern (`attention_zoo.ops.sparse`), or an (N, N) bool tensor, True where query i (row) may
            attend to key j (column), for sequences of up to N tokens.
        qkv_bias, out_bias: whether the QKV projection and the output projection have a bias.
        output_gate: activation of an output gate, "sigmoid" or "silu": the merged heads are multiplied by
            activation(W x + b) before the output projection. Default: no gate.
        output_gate_per: one output gate per "head", or per "feature" and then without b.

    Raises:
        ValueError: `kv_heads` does not divide `heads`, `bias` has another number of heads, `scale` is not positive or
            is given with `pattern`, `pattern` is not square, `output_gate` or `qk_norm` is unknown, `qk_norm_eps` is
            not positive, or `rotary` cannot be converted.
        TypeError: an argument has another type, or `pattern` is a tensor that is not boolean.
    """

    state_class: ClassVar[type[State]] = KeyValueState

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
        rotary: RotaryArgument = None,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        bias: RelativeBias | None = None,
        pattern: Pattern | Tensor | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        output_gate: str | None = None,
        output_gate_per: str = "feature",
    ) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, causal=causal, dropout=dropout)
        check_positive(kv_heads=kv_heads)
        check_positive_number(scale=scale)
        check_flag(qkv_bias=qkv_bias, out_bias=out_bias)
        check_instance(RelativeBias, type(None), bias=bias)
        check_instance(Pattern, Tensor, type(None), pattern=pattern)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {kv_heads=}, {heads=}")
        if bias is not None:
            bias.check_heads(heads)
        if pattern is not None and scale is not None:
            raise ValueError(f"scale must be None with a pattern, got {scale=}")
        self.scale = None if qk_norm == "l2" else scale
        self.q_norm, self.k_norm = make_qk_norms(qk_norm, heads=heads, dim_head=dim_head, scale=scale, eps=qk_norm_eps)
        self.rotary = make_rotary(rotary, dim_head)
        self.bias = bias
        self.pattern = None if pattern is None else make_pattern(pattern, causal=causal)
        if pattern is not None:
            self.no_documents = "whose pattern is tied to the positions in the row"
        inner, kv_inner = heads * dim_head, self.kv_heads * dim_head
        self.to_qkv = Projections(dim, q=inner, k=kv_inner, v=kv_inner, bias=qkv_bias)
        self.to_out = nn.Linear(inner, dim, bias=out_bias)
        self.to_gate = make_output_gate(
            dim, heads=heads, dim_head=dim_head, activation=output_gate, per=output_gate_per
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> Tensor:
        documents = self.check_inputs(x, mask, attn_mask, document_ids)
        x = hide_masked(x, mask)
        q, k, v = self.project(x, start=0 if documents is None else documents.positions)
        return self.merge(self.attend_rows(q, k, v, mask, attn_mask, documents), x)

    def step(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self.check_step(x, state, mask, self.state_class, attn_mask)
        x = hide_masked(x, mask)
        q, k, v = self.project(x, start=0 if state is None else state.length)
        out, state = self.attend_cached(q, k, v, state, mask, attn_mask)
        return self.merge(out, x), state

    def attend_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """`attend` over whole rows, or over each of their documents; the masks are those of `forward`."""
        if documents is None:
            return self.attend(q, k, v, combine_masks(mask, attn_mask))
        return documents.apply(self.attend, q, k, v, mask=mask, attn_mask=attn_mask, causal=self.causal)

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        """`attend` over the new tokens and those of the state, and the new state; arguments as in `step`."""
        if isinstance(state, KeyValueState):
            check_state_shape(state.keys, "(b, kv_heads, n, dim_head)", (*k.shape[:2], state.length, self.dim_head))
            state = state.append(k, v, mask)
        else:
            state = KeyValueState(k, v, own_mask(mask))
        return self.attend(q, state.keys, state.values, combine_masks(state.mask, attn_mask)), state

    def project(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, h, n, e), keys and values (b, kv_h, n, e) of tokens at the positions start, start + 1, ...

        `start` may also be the positions themselves, (b, n) int.
        """
        heads = split_heads(self.to_qkv(x), self.dim_head)  # (..., h + 2 kv_h, n, e), from one matrix product
        qk, v = heads[..., : -self.kv_heads, :, :], heads[..., -self.kv_heads :, :, :]
        if self.q_norm is None or self.k_norm is None:
            q, k = map_queries_and_keys(lambda qk: self.prepare(qk, start), qk, self.heads)
        else:
            q = self.prepare(self.q_norm(qk[..., : self.heads, :, :]), start)
            k = self.prepare(self.k_norm(qk[..., self.heads :, :, :]), start)
        return q, k, v

    def prepare(self, qk: Tensor, start: int | Tensor) -> Tensor:
        """Queries or keys (..., n, e), or both concatenated along the heads, with their positions applied."""
        return qk if self.rotary is None else self.rotary(qk, start)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The attention operation. The queries are the last i of the j tokens.

        Args:
            q: (b, h, i, e).
            k, v: (b, kv_h, j, e).
            mask: (b, j) bool, True = a valid token; with an attention mask, both combined in four axes that broadcast
                to (b, h, i, j), boolean or additive.

        Returns:
            (b, h, i, e).
        """
        bias = self.score_bias(q, k)
        if self.pattern is not None:
            pattern = self.pattern()
            pattern.check(k.shape[-2], name="x")
            return pattern_attention(pattern, q, k, v, mask=mask, bias=bias, dropout=self.dropout_now)
        return softmax_attention(
            q, k, v, mask=mask, causal=self.causal, bias=bias, scale=self.scale, dropout=self.dropout_now
        )

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The weights (b, h, i, j) by which `attend` multiplies the values."""
        bias = self.score_bias(q, k)
        if self.pattern is not None:
            pattern = self.pattern()
            pattern.check(k.shape[-2], name="x")
            return pattern_weights(pattern, q, k, mask=mask, bias=bias)
        return softmax_attention_weights(q, k, mask=mask, causal=self.causal, bias=bias, scale=self.scale)

    def score_bias(self, q: Tensor, k: Tensor) -> DistanceBias | None:
        """The relative position bias of these queries and keys."""
        return None if self.bias is None else self.bias(q.shape[-2], k.shape[-2], q.device)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """Merge the heads (b, h, n, e) and project to (b, n, d).

        `x` is the input of the layer, from which the output gate is computed.
        """
        out = merge_heads(out)
        return self.to_out(out if self.to_gate is None else self.to_gate.multiply(out, self.to_gate(x)))

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> Tensor:
        q, k, _, pairs = self.project_rows(x, mask, attn_mask, document_ids)
        return self.weights(q, k, pairs)

    def values_and_output(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> ValuesAndOutput:
        q, k, v, pairs = self.project_rows(x, mask, attn_mask, document_ids)
        return ValuesAndOutput(repeat_heads(v, q.shape[1]), self.attend(q, k, v, pairs))

    def project_rows(
        self,
        x: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None,
        document_ids: Tensor | Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and the mask of `attend` and `weights` over whole rows. Arguments as in `forward`."""
        documents = self.check_inputs(x, mask, attn_mask, document_ids)
        x = hide_masked(x, mask)
        q, k, v = self.project(x, start=0 if documents is None else documents.positions)
        return q, k, v, self.mask_rows(k, mask, attn_mask, documents)

    def mask_rows(
        self, k: Tensor, mask: Tensor | None, attn_mask: Tensor | None, documents: Documents | None
    ) -> Tensor | None:
        """The masks of `forward` as the mask of `attend` and `weights` over whole rows with keys (b, kv_h, n, e)."""
        return combine_masks(mask, attn_mask) if documents is None else documents.mask_pairs(mask, attn_mask)
