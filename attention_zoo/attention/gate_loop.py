"""GateLoop attention: a linear recurrence with data-dependent complex gates, decoded with a state of constant size.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
Upstream: gateloop-transformer, GateLoopedAttention.
Differs: from the paper, |a| = sigmoid(|z|) >= 0.5: every token keeps at least half of the magnitude of the hidden state,
so that no token can reset it, and t tokens leave at least 2^-t of it. Heads with several features have one gate, where
the paper's table has one per channel; with the default, heads of one feature, both are the same. From upstream, a
reverse direction, padding masks, step-by-step decoding, half precision, and exactness at any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_zoo._checks import check_flag, check_int, check_positive
from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.gates import check_gate, gate_input
from attention_zoo.layers.norms import LayerNorm
from attention_zoo.layers.output_gate import make_output_gate
from attention_zoo.layers.projections import merge_heads, split_heads
from attention_zoo.layers.state import State, check_state_shape, count_tokens, register_state
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.gate_loop import (
    channel_gate_loop,
    complex_of,
    gate_loop,
    gate_loop_weights,
    unit_gate,
)
from attention_zoo.ops.masks import hide_masked


@dataclass
class GateLoopState(State):
    """Decoding state of `GateLoopAttention`. Size: 2 h e^2 elements per row, for any number of tokens.

    Attributes:
        hidden_state: (b, h, e, e, 2) in at least float32, real and imaginary part of the hidden state.
        has_valid: (b,) bool, whether a row has had a valid token.
        token_count: number of tokens so far, masked ones included; a 0-d tensor.
    """

    hidden_state: Tensor
    has_valid: Tensor
    token_count: Tensor


register_state(GateLoopState)


class GateLoopAttention(AttentionBlock):
    """h_t = a_t h_{t-1} + k_t v_t^T, y_t = q_t^T Re(h_t), a_t = sigmoid(|z_t|) e^{i arg z_t} per head, z = W_a x + b_a.

    Optionally followed by LayerNorm(y), an output gate, y * SiLU(W_g x), and an output projection. A masked token
    leaves h unchanged. |a_t| is at least 0.5, so that a layer forgets over several tokens and never at once. With
    `reverse` the recurrence is h_t = a_t h_{t+1} + k_t v_t^T, from the last token to the first.

    Time O(n d (64 + e)) for heads of e features and O(n d) for e = 1, memory O(n d). State: 2 d e elements per row.

    Args:
        dim: input and output features d.
        heads: number of heads h, each with one gate. Default: one per inner feature.
        dim_inner: features of queries, keys and values. Default: dim.
        gate: "complex"; "real" for the ablation in which only the real part of z is used, so that a is real, of either
            sign; None for the ablation without gates, a = 1.
        output_gate, output_gate_per: see `SelfAttention`. A layer without an output gate has an output projection only
            if `dim_inner` is not `dim`.
        sub_norm: whether a LayerNorm follows the recurrence, whose output has no fixed scale.
        gradient_fraction: fraction of the gradient that is passed on to z.
        reverse: whether the recurrence runs from the last token to the first. Such a layer is not causal and has no
            `step`. A stack with causal=False takes layers of both directions.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `heads` does not divide `dim_inner`, `gate`, `output_gate` or `output_gate_per` is unknown, or
            `gradient_fraction` is outside [0, 1].
    """

    no_attn_mask = "whose recurrence has no attention scores"

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        dim_inner: int | None = None,
        gate: str | None = "complex",
        output_gate: str | None = "silu",
        output_gate_per: str = "feature",
        sub_norm: bool = False,
        gradient_fraction: float = 0.9,
        reverse: bool = False,
    ) -> None:
        check_int(1, dim=dim)
        check_positive(heads=heads, dim_inner=dim_inner)
        inner = dim if dim_inner is None else dim_inner
        heads = inner if heads is None else heads
        if inner % heads:
            raise ValueError(f"heads must divide dim_inner, got {heads=}, dim_inner={inner}")
        check_gate(gate, gradient_fraction)
        check_flag(sub_norm=sub_norm, reverse=reverse)
        super().__init__(dim, heads=heads, dim_head=inner // heads, causal=not reverse)
        self.reverse = reverse
        self.gate = gate
        self.gradient_fraction = gradient_fraction
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_a = nn.Linear(dim, 2 * heads) if gate is not None else None  # features (h c), c = (re, im)
        self.norm = LayerNorm(inner) if sub_norm else None
        self.to_gate = make_output_gate(
            dim, heads=heads, dim_head=inner // heads, activation=output_gate, per=output_gate_per
        )
        self.to_out = nn.Linear(inner, dim, bias=False) if self.to_gate is not None or inner != dim else None

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> Tensor:
        documents = self.check_inputs(x, mask, attn_mask, document_ids)
        x, mask, documents = self.reading_order(hide_masked(x, mask), mask, documents)
        out, _ = self.recur(*self.project(x), mask, documents=documents)
        has_valid = None
        if mask is not None:
            count = mask.cumsum(1)
            has_valid = (count if documents is None else documents.restart(count)) > 0
        out = self.merge(out, x, has_valid)
        return out.flip(1) if self.reverse else out

    def step(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if self.reverse:
            raise ValueError("step needs reverse=False, got reverse=True, which reads later tokens first")
        self.check_step(x, state, mask, GateLoopState, attn_mask)
        x = hide_masked(x, mask)
        has_valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.cumsum(1) > 0
        hidden, count = None, None
        if isinstance(state, GateLoopState):
            shape = (x.shape[0], self.heads, self.dim_head, self.dim_head, 2)
            check_state_shape(state.hidden_state, "(b, heads, dim_head, dim_head, 2)", shape)
            hidden, count = torch.view_as_complex(state.hidden_state), state.token_count
            has_valid = has_valid | state.has_valid[:, None]
        out, hidden = self.recur(*self.project(x), mask, hidden)
        new = GateLoopState(
            torch.view_as_real(hidden).clone(), has_valid[:, -1].clone(), count_tokens(count, x.shape[1], x.device)
        )
        return self.merge(out, x, has_valid), new

    def reading_order(
        self, x: Tensor, mask: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor | None, Documents | None]:
        """The tokens, their mask and their documents in the order in which the recurrence reads them."""
        if not self.reverse:
            return x, mask, documents
        documents = None if documents is None else Documents(documents.ids.flip(1))
        return x.flip(1), None if mask is None else mask.flip(1), documents

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values (b, n, h e), and z (b, n, h, 2); None without gates."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.to_a is None:
            return q, k, v, None
        z = self.to_a(x).view(*x.shape[:2], self.heads, 2)
        return q, k, v, gate_input(z, self.gate, self.gradient_fraction)

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor | None,
        mask: Tensor | None,
        state: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The recurrence: outputs (b, n, h e) and the hidden state (b, h, e, e) after the last token."""
        if self.norm is not None and q.dtype == torch.float16:  # the outputs may overflow before the norm
            q, k, v, z = q.float(), k.float(), v.float(), None if z is None else z.float()
        if self.dim_head == 1 and z is not None:
            state = None if state is None else state[..., 0, 0]
            out, state = channel_gate_loop(q, k, v, z, mask=mask, state=state, document_ids=documents)
            return out, state[:, :, None, None]
        out, state = gate_loop(*self.split(q, k, v, z, mask), state=state, document_ids=documents)
        return merge_heads(out), state

    def split(
        self, q: Tensor, k: Tensor, v: Tensor, z: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, n, e) and gates (b, h, n); a masked token has key 0 and gate 1."""
        gate = torch.ones(*q.shape[:2], self.heads, dtype=complex_of(q.dtype), device=q.device)
        if z is not None:
            gate = unit_gate(z) if mask is None else torch.where(mask[:, :, None], unit_gate(z), gate)
        if mask is not None:
            k = k.masked_fill(~mask[:, :, None], 0.0)
        q, k, v = (split_heads(part, self.dim_head) for part in (q, k, v))
        return q, k, v, gate.transpose(1, 2)

    def merge(self, out: Tensor, x: Tensor, has_valid: Tensor | None) -> Tensor:
        """Norm, output gate and output projection of (b, n, h e).

        Args:
            has_valid: (b, n) bool, whether there was a valid token up to each position; None: everywhere.
        """
        gate = None if self.to_gate is None else self.to_gate(x)
        if torch.is_grad_enabled() and (self.norm is not None or gate is not None):
            # Norm, activation and product are recomputed in backward: they cost little and would triple what is saved.
            arguments = out, gate, has_valid, x.dtype
            return checkpoint(self._merge, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._merge(out, gate, has_valid, x.dtype)

    def _merge(self, out: Tensor, gate: Tensor | None, has_valid: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.norm is not None:
            out = self.norm(out).to(dtype)
            if has_valid is not None:  # before the first valid token the output is 0, not the bias of the norm
                out = out.masked_fill(~has_valid[..., None], 0.0)
        if self.to_gate is not None and gate is not None:
            out = self.to_gate.multiply(out, gate)
        return out if self.to_out is None else self.to_out(out)

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> Tensor:
        documents = self.check_inputs(x, mask, attn_mask, document_ids)
        x, mask, documents = self.reading_order(hide_masked(x, mask), mask, documents)
        q, k, _, gate = self.split(*self.project(x), mask)
        weights = gate_loop_weights(q, k, gate, document_ids=documents)
        return weights.flip(-1, -2) if self.reverse else weights

    def values_and_output(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> ValuesAndOutput:
        documents = self.check_inputs(x, mask, attn_mask, document_ids)
        x, mask, documents = self.reading_order(hide_masked(x, mask), mask, documents)
        q, k, v, z = self.project(x)
        out, _ = self.recur(q, k, v, z, mask, documents=documents)
        v, out = (split_heads(part.flip(1) if self.reverse else part, self.dim_head) for part in (v, out))
        return ValuesAndOutput(v, out)
