"""Simple gate loop: a gated linear recurrence with one real gate and one number of state per channel.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
Upstream: gateloop-transformer, SimpleGateLoopLayer.
Differs: from the paper, gates are real; from upstream, padding masks, step-by-step decoding and half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attention_zoo._checks import check_flag
from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.norms import LayerNorm, RMSNorm
from attention_zoo.layers.state import State, check_state_shape, count_tokens, register_state
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.gate_loop import linear_recurrence
from attention_zoo.ops.masks import hide_masked
from attention_zoo.ops.precision import at_least_float32, no_autocast


@dataclass
class SimpleGateLoopState(State):
    """Decoding state of `SimpleGateLoop`. Size: d elements per row, for any number of tokens.

    Attributes:
        hidden_state: (b, d) in at least float32.
        token_count: number of tokens so far, masked ones included; a 0-d tensor.
    """

    hidden_state: Tensor
    token_count: Tensor


register_state(SimpleGateLoopState)


class SimpleGateLoop(AttentionBlock):
    """h_t = sigmoid(a_t) h_{t-1} + kv_t, y_t = q_t h_t per channel, [q | kv | a] = W RMSNorm(x); then LayerNorm(y).

    A masked token leaves h unchanged. Time and memory O(n d). State: d elements per row.

    Args:
        dim: input and output features d; each is a head.
        norm: whether an RMSNorm precedes the projection, as upstream, where the layer has no norm around it.
        post_norm: whether a LayerNorm follows the recurrence.
        reverse: whether the recurrence runs from the last token to the first. Such a layer is not causal and has no
            `step`. A stack with causal=False takes layers of both directions.

    Raises:
        TypeError: a flag is not a bool.
    """

    no_attn_mask = "whose recurrence has no attention scores"

    def __init__(self, dim: int, *, norm: bool = True, post_norm: bool = False, reverse: bool = False) -> None:
        check_flag(norm=norm, post_norm=post_norm, reverse=reverse)
        super().__init__(dim, heads=dim, dim_head=1, causal=not reverse)
        self.reverse = reverse
        self.norm = RMSNorm(dim) if norm else None
        self.to_qkva = nn.Linear(dim, 3 * dim, bias=False)
        self.post_norm = LayerNorm(dim) if post_norm else None

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
        out = self.recur(*self.project(x, mask, documents))
        return out if self.post_norm is None else self.post_norm(out)

    def step(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if self.reverse:
            raise ValueError("step needs reverse=False, got reverse=True, which reads later tokens first")
        self.check_step(x, state, mask, SimpleGateLoopState, attn_mask)
        x = hide_masked(x, mask)
        q, kv, gate = self.project(x, mask)
        hidden, count = None, None
        if isinstance(state, SimpleGateLoopState):
            check_state_shape(state.hidden_state, "(b, dim)", (x.shape[0], self.dim))
            hidden, count = state.hidden_state, state.token_count
        h, hidden = linear_recurrence(gate, kv, state=hidden)
        out = (q * h).to(q.dtype)
        new = SimpleGateLoopState(hidden.clone(), count_tokens(count, x.shape[1], x.device))
        return out if self.post_norm is None else self.post_norm(out), new

    def project(
        self, x: Tensor, mask: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, and kv and the gate in at least float32, (b, n, d) each; a masked token has kv 0 and gate 1.

        The gate of the token that the recurrence reads first in a document is 0.
        """
        q, kv, a = self.to_qkva(x if self.norm is None else self.norm(x)).chunk(3, dim=-1)
        gate = at_least_float32(a).sigmoid()
        if mask is not None:
            kv = kv.masked_fill(~mask[..., None], 0.0)
            gate = gate.masked_fill(~mask[..., None], 1.0)
        if documents is not None:
            gate = gate.masked_fill((documents.ends if self.reverse else documents.starts)[..., None], 0.0)
        return q, at_least_float32(kv), gate

    def recur(self, q: Tensor, kv: Tensor, gate: Tensor) -> Tensor:
        """The recurrence over a whole sequence, in the direction of the layer: y (b, n, d)."""
        if self.reverse:
            kv, gate = kv.flip(1), gate.flip(1)
        h = linear_recurrence(gate, kv).out
        return (q * (h.flip(1) if self.reverse else h)).to(q.dtype)

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> Tensor:
        documents = self.check_inputs(x, mask, attn_mask, document_ids)
        x = hide_masked(x, mask)
        q, _, gate = self.project(x, mask, documents)
        with no_autocast(x):
            if self.reverse:
                q, gate = q.flip(1), gate.flip(1)
            log = gate.double().clamp(min=1e-300).log().masked_fill(gate == 0, -2000.0)  # whose exponential is 0
            log = log.cumsum(1).transpose(1, 2)  # (b, h, n)
            decay = (log[..., :, None] - log[..., None, :]).exp().tril().to(at_least_float32(q).dtype)
            weights = q.transpose(1, 2)[..., None] * decay
        if mask is not None:
            weights = weights.masked_fill(~(mask.flip(1) if self.reverse else mask)[:, None, None], 0.0)
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
        x = hide_masked(x, mask)
        q, kv, gate = self.project(x, mask, documents)
        out = self.recur(q, kv, gate)
        return ValuesAndOutput(kv.transpose(1, 2)[..., None], out.transpose(1, 2)[..., None])
