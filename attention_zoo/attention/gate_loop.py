"""GateLoop attention: a linear recurrence whose complex gates depend on the data, decoded with a state of fixed size.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
Upstream: gateloop-transformer, GateLoopedAttention.
Differs: takes padding masks and decodes step by step; runs in half precision; stays exact at any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attention_zoo._checks import check_positive
from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.norms import LayerNorm
from attention_zoo.layers.state import State, count_tokens, register_state
from attention_zoo.ops.gate_loop import channel_gate_loop, gate_loop, gate_loop_weights
from attention_zoo.ops.gate_loop.gates import complex_of, scale_gradient, unit_gate


@dataclass
class GateLoopState(State):
    """The memory after all tokens so far. Size: 2 * b * h * e * e numbers, however many tokens it has seen.

    Attributes:
        memory: (b, h, e, e, 2) in at least float32, real and imaginary part.
        real: (b,) bool, whether a row has seen a real token.
        seen: tokens so far, masked ones included; a tensor without axes.
    """

    memory: Tensor
    real: Tensor
    seen: Tensor

    @property
    def length(self) -> int:
        return int(self.seen)


register_state(GateLoopState)


class GateLoopAttention(AttentionBlock):
    """h_t = a_t h_{t-1} + k_t v_t^T, y_t = q_t^T Re(h_t), a_t = sigma(|z_t|) e^{i arg z_t} per head, z = W_a x + b_a.

    Then, where asked for, LayerNorm(y), y * SiLU(W_g x), and an output projection. A masked token leaves h unchanged.

    Time O(n d (64 + e)) for heads of e features and O(n d) for e = 1, memory O(n d). State: 2 d e numbers.

    Args:
        dim: features d of input and output.
        heads: heads h, each with one gate. None: one per inner feature.
        dim_inner: features of queries, keys and values. None: dim.
        swish_gate: multiply the output by SiLU(W_g x).
        sub_norm: LayerNorm after the recurrence, whose output has no fixed size.
        gradient_fraction: the part of the gradient that reaches z.
        real_gate: ablation, z is its real part, so that a is real, of either sign.
        transition: False for the ablation without gates, a = 1.

    Raises:
        ValueError: heads does not divide dim_inner, or gradient_fraction lies outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        dim_inner: int | None = None,
        swish_gate: bool = True,
        sub_norm: bool = False,
        gradient_fraction: float = 0.9,
        real_gate: bool = False,
        transition: bool = True,
    ) -> None:
        check_positive(dim=dim, heads=heads, dim_inner=dim_inner)
        inner = dim if dim_inner is None else dim_inner
        heads = inner if heads is None else heads
        if inner % heads:
            raise ValueError(f"heads must divide dim_inner, got {heads=}, dim_inner={inner}")
        if not 0.0 <= gradient_fraction <= 1.0:
            raise ValueError(f"gradient_fraction must lie in [0, 1], got {gradient_fraction=}")
        super().__init__(dim, heads=heads, dim_head=inner // heads)
        self.gradient_fraction = gradient_fraction
        self.real_gate = real_gate
        self.transition = transition
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_a = nn.Linear(dim, 2 * heads) if transition else None  # features (h c), c = (re, im)
        self.norm = LayerNorm(inner) if sub_norm else None
        self.to_gate = nn.Linear(dim, inner, bias=False) if swish_gate else None
        self.to_out = nn.Linear(inner, dim, bias=False) if swish_gate or inner != dim else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        out, _ = self._loop(*self._project(x), mask, None)
        return self._finish(out, x, None if mask is None else mask.cumsum(1) > 0)

    def step(self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        self._check_step(x, state, mask, GateLoopState)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.cumsum(1) > 0
        memory = None
        if isinstance(state, GateLoopState):
            self._check_memory(state, x)
            memory = torch.view_as_complex(state.memory)
            real = real | state.real[:, None]
        out, memory = self._loop(*self._project(x), mask, memory)
        seen = count_tokens(state.seen if isinstance(state, GateLoopState) else None, x.shape[1])
        return self._finish(out, x, real), GateLoopState(torch.view_as_real(memory).clone(), real[:, -1].clone(), seen)

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        q, k, _, gate = self._by_heads(*self._project(x), mask)
        return gate_loop_weights(q, k, gate)

    def values_and_output(self, x: Tensor, *, mask: Tensor | None = None) -> ValuesAndOutput:
        self._check(x, mask)
        q, k, v, z = self._project(x)
        out, _ = self._loop(q, k, v, z, mask, None)
        return ValuesAndOutput(self._split(v), self._split(out))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values (b, n, h e), and z (b, n, h, 2); None without transition."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.to_a is None:
            return q, k, v, None
        z = scale_gradient(self.to_a(x).view(*x.shape[:2], self.heads, 2), self.gradient_fraction)
        if self.real_gate:
            z = torch.stack((z[..., 0], torch.zeros_like(z[..., 0])), dim=-1)
        return q, k, v, z

    def _loop(
        self, q: Tensor, k: Tensor, v: Tensor, z: Tensor | None, mask: Tensor | None, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The outputs (b, n, h e) and the memory (b, h, e, e) after the last token."""
        if self.dim_head == 1 and z is not None:
            start = None if memory is None else memory[:, :, 0, 0]
            out, memory = channel_gate_loop(q, k, v, z, mask=mask, state=start)
            return out, memory[:, :, None, None]
        out, memory = gate_loop(*self._by_heads(q, k, v, z, mask), state=memory)
        return out.transpose(1, 2).flatten(2), memory

    def _by_heads(
        self, q: Tensor, k: Tensor, v: Tensor, z: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, n, e) and gates (b, h, n); a masked token has key 0 and gate 1."""
        gate = torch.ones(*q.shape[:2], self.heads, dtype=complex_of(q.dtype), device=q.device)
        if z is not None:
            gate = unit_gate(z) if mask is None else torch.where(mask[:, :, None], unit_gate(z), gate)
        if mask is not None:
            k = k.masked_fill(~mask[:, :, None], 0.0)
        return self._split(q), self._split(k), self._split(v), gate.transpose(1, 2)

    def _split(self, x: Tensor) -> Tensor:
        """(b, n, h e) as (b, h, n, e)."""
        return x.view(*x.shape[:2], self.heads, self.dim_head).transpose(1, 2)

    def _finish(self, out: Tensor, x: Tensor, real: Tensor | None) -> Tensor:
        """What stands after the recurrence; norm, SiLU and product are computed again in backward, not kept."""
        gate = None if self.to_gate is None else self.to_gate(x)
        if torch.is_grad_enabled() and (self.norm is not None or gate is not None):
            finished: Tensor = checkpoint(
                self._norm_and_gate, out, gate, real, use_reentrant=False, preserve_rng_state=False
            )
            return finished
        return self._norm_and_gate(out, gate, real)

    def _norm_and_gate(self, out: Tensor, gate: Tensor | None, real: Tensor | None) -> Tensor:
        if self.norm is not None:
            out = self.norm(out)
            if real is not None:  # the norm's bias is no sign of a token
                out = out.masked_fill(~real[..., None], 0.0)
        if gate is not None:
            out = out * F.silu(gate)
        return out if self.to_out is None else self.to_out(out)

    def _check_memory(self, state: GateLoopState, x: Tensor) -> None:
        want = (x.shape[0], self.heads, self.dim_head, self.dim_head, 2)
        if state.memory.shape != want:
            raise ValueError(
                f"state must come from this block and batch: (b, heads, dim_head, dim_head, 2) = {want}, "
                f"got a memory of shape {tuple(state.memory.shape)}"
            )
