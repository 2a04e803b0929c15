"""Softmax attention with data-dependent relative positions: products of gates between every key and query.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
Upstream: gateloop-transformer, CausalFullAttention.
Differs: gates are multiplied along the sequence, as in the paper; upstream multiplies them over the features, which
encodes no positions and reaches 1e10. The default is softmax attention; upstream's default with data-dependent relative
positions is without softmax, softmax=False here. Padding masks and step-by-step decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_flag
from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput, first_position
from attention_zoo.layers.gates import check_gate, gate_input
from attention_zoo.layers.output_gate import make_output_gate
from attention_zoo.layers.positions import RotaryArgument, make_rotary
from attention_zoo.layers.projections import merge_heads, split_heads
from attention_zoo.layers.state import (
    KeyValueState,
    State,
    check_state_dtype,
    check_state_shape,
    concat_masks,
    own_mask,
    register_state,
)
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.gate_loop import complex_of, unit_gate
from attention_zoo.ops.masks import hide_masked
from attention_zoo.ops.relative_gate import (
    CHUNK,
    DecayedKeys,
    cached_relative_gate_attention,
    extend,
    no_keys,
    relative_gate_attention,
    relative_gate_weights,
)


@dataclass
class RelativeGateState(State):
    """Keys and values of all tokens so far. Size: 3 n h e elements per row, and n h e / 20 for the gates.

    Attributes:
        chunks: keys, multiplied by the gates after them up to a common token, and values of full chunks of 20 tokens,
            (b, 1, N, h c 2e) and (b, 1, N, h c e).
        recent_keys, recent_values: those of the tokens after the last full chunk, (b, h, r, 2e), multiplied by all
            gates after them, and (b, h, r, e).
        gates: product of the gates after the common token of each chunk, (b, h, N, e / 2, 2), real and imaginary part.
        mask: (b, n) bool, True = a valid token; None if no step had a mask.
    """

    chunks: KeyValueState
    recent_keys: Tensor
    recent_values: Tensor
    gates: Tensor
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        return CHUNK * self.chunks.length + self.recent_keys.shape[2]

    @property
    def cache(self) -> DecayedKeys:
        """The tensors as the operation takes them."""
        b, h, _, f = self.recent_keys.shape
        keys, values = (
            stored.view(b, self.chunks.length, h, CHUNK, size)
            for stored, size in ((self.chunks.keys, f), (self.chunks.values, self.recent_values.shape[3]))
        )
        return DecayedKeys(keys, values, self.recent_keys, self.recent_values, torch.view_as_complex(self.gates))


register_state(RelativeGateState)


class RelativeGateAttention(AttentionBlock):
    """out_i = sum_j softmax_j(sim_ij) v_j over j <= i, times an output gate, SiLU(W_g x), and an output projection.

    sim_ij = e^-0.5 sum_p (q_{i,2p} k_{j,2p} + q_{i,2p+1} k_{j,2p+1}) Re(a_{j+1,p} ... a_{i,p}), with one gate
    a = sigmoid(|z|) e^{i arg z}, z = W_a x, for each head, token and pair of features. Masked tokens have gate 1.

    Time O(n^2 d), memory O(n d). State: keys, multiplied by gates, and values of all tokens. A step reads them once.

    Args:
        dim: input and output features d.
        heads: number of heads h.
        dim_head: features e of each head, even.
        dropout: dropout probability of the attention weights.
        rotary: rotary position embedding of queries and keys, in addition to the gates, see `SelfAttention`.
        softmax: False for the scores themselves as weights, whose sum is not bounded.
        gate: "complex"; "real" for the ablation in which only the real part of z is used, so that a is real, of either
            sign; None for no gates, a = 1, where positions come from `rotary` alone.
        output_gate, output_gate_per: see `SelfAttention`.
        gradient_fraction: fraction of the gradient that is passed on to z.
        out_bias: whether the output projection has a bias.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `dim_head` is odd, `gate`, `output_gate` or `output_gate_per` is unknown, `rotary` cannot be
            converted or has pairing="half", or `gradient_fraction` is outside [0, 1].
    """

    no_attn_mask = "whose operation takes no masks of pairs"

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        rotary: RotaryArgument = None,
        softmax: bool = True,
        gate: str | None = "complex",
        output_gate: str | None = "silu",
        output_gate_per: str = "feature",
        gradient_fraction: float = 0.9,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, dropout=dropout)
        if dim_head % 2:
            raise ValueError(f"dim_head must be even, features are gated in pairs, got {dim_head=}")
        check_gate(gate, gradient_fraction)
        check_flag(softmax=softmax, out_bias=out_bias)
        self.rotary = make_rotary(rotary, dim_head)
        if self.rotary is not None and self.rotary.pairing != "interleaved":
            # With another gate for each of a pair, the scores depend on the absolute positions.
            raise ValueError(
                f"rotary.pairing must be 'interleaved', the pairs of the gates, got {self.rotary.pairing!r}"
            )
        self.softmax = softmax
        self.gate = gate
        self.gradient_fraction = gradient_fraction
        inner = heads * dim_head
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_a = nn.Linear(dim, inner, bias=False) if gate is not None else None  # features (h p c), c = (re, im)
        self.to_gate = make_output_gate(
            dim, heads=heads, dim_head=dim_head, activation=output_gate, per=output_gate_per
        )
        self.to_out = nn.Linear(inner, dim, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        documents = self.check_inputs(x, mask, attn_mask, document_ids, position_ids)
        x = hide_masked(x, mask)
        return self.merge(
            self.attend(*self.project(x, mask, first_position(documents, position_ids)), mask, documents), x
        )

    def step(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        self.check_step(x, state, mask, RelativeGateState, attn_mask, position_ids)
        x = hide_masked(x, mask)
        if isinstance(state, RelativeGateState):
            shape = (x.shape[0], self.heads, state.recent_keys.shape[2], self.dim_head)
            check_state_shape(state.recent_values, "(b, heads, n, dim_head)", shape)
            q, k, v, gate = self.project(x, mask, state.length if position_ids is None else position_ids)
            check_state_dtype(state.recent_values, v)
            cache = state.cache
            mask = concat_masks(state.mask, mask, x.shape[0], state.length, x.shape[1], x.device)
            out = cached_relative_gate_attention(q, k, v, gate, cache, mask, self.softmax, self.dropout_now)
        else:
            q, k, v, gate = self.project(x, mask, first_position(None, position_ids))
            cache, mask = no_keys(k, v, gate), own_mask(mask)
            out = self.attend(q, k, v, gate, mask)
        new = extend(cache, k, v, gate)
        keys, values = (part.flatten(2).unsqueeze(1) for part in (new.keys, new.values))  # (b, 1, N, h c f)
        chunks = KeyValueState(keys, values)
        if isinstance(state, RelativeGateState):
            chunks = state.chunks.append(keys, values, None) if new.keys.shape[1] else state.chunks
        gates = torch.view_as_real(new.since)
        return self.merge(out, x), RelativeGateState(chunks, new.recent_keys, new.recent_values, gates, mask)

    def project(self, x: Tensor, mask: Tensor | None, start: int | Tensor = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, n, e) and gates (b, h, n, e / 2), 1 at masked tokens."""
        q, k, v = (split_heads(to(x), self.dim_head) for to in (self.to_q, self.to_k, self.to_v))
        if self.rotary is not None:
            q, k = self.rotary.decay(self.rotary(q, start), self.rotary(k, start), start)
        shape = (*x.shape[:2], self.heads, self.dim_head // 2)
        if self.to_a is None:
            gate = torch.ones(shape, dtype=complex_of(x.dtype), device=x.device)
        else:
            gate = unit_gate(gate_input(self.to_a(x).view(*shape, 2), self.gate, self.gradient_fraction))
        if mask is not None:
            gate = torch.where(mask[:, :, None, None], gate, torch.ones_like(gate))
        return q, k, v, gate.transpose(1, 2)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        mask: Tensor | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The attention operation over a whole sequence, (b, h, n, e)."""
        return relative_gate_attention(
            q, k, v, gate, mask=mask, softmax=self.softmax, dropout=self.dropout_now, document_ids=documents
        )

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """Merge the heads, apply the output gate and project to (b, n, d)."""
        out = merge_heads(out)
        return self.to_out(out if self.to_gate is None else self.to_gate.multiply(out, self.to_gate(x)))

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        documents = self.check_inputs(x, mask, attn_mask, document_ids, position_ids)
        x = hide_masked(x, mask)
        q, k, _, gate = self.project(x, mask, first_position(documents, position_ids))
        return relative_gate_weights(q, k, gate, mask=mask, softmax=self.softmax, document_ids=documents)

    def values_and_output(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> ValuesAndOutput:
        documents = self.check_inputs(x, mask, attn_mask, document_ids, position_ids)
        x = hide_masked(x, mask)
        q, k, v, gate = self.project(x, mask, first_position(documents, position_ids))
        return ValuesAndOutput(v, self.attend(q, k, v, gate, mask, documents))
