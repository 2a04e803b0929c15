"""Full attention with data-dependent relative positions: the gates of GateLoop between every key and query.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
Upstream: gateloop-transformer, CausalFullAttention.
Differs: the gates are multiplied up along the sequence, as the paper has it; upstream multiplied over the features, so
its outputs held no position and reached 1e10. Takes padding masks and decodes step by step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.positions import Rotary
from attention_zoo.layers.state import KeyValueState, State, register_state
from attention_zoo.ops.gate_loop.gates import complex_of, scale_gradient, unit_gate
from attention_zoo.ops.relative_gate import relative_gate_attention, relative_gate_weights


@dataclass
class RelativeGateState(State):
    """Keys, values and gates of all tokens so far. Size: 3 * b * h * n * e numbers.

    Attributes:
        cache: keys and values, with their mask.
        gates: (b, h, n, e / 2, 2) in at least float32, real and imaginary part.
    """

    cache: KeyValueState
    gates: Tensor

    @property
    def length(self) -> int:
        return self.cache.length


register_state(RelativeGateState)


class RelativeGateAttention(AttentionBlock):
    """out_i = sum_j softmax_j(sim_ij) v_j over j <= i, then * SiLU(W_g x) where asked for, and an output projection.

    sim_ij = e^-0.5 sum_p (q_{i,2p} k_{j,2p} + q_{i,2p+1} k_{j,2p+1}) Re(a_{j+1,p} ... a_{i,p}), one gate
    a = sigma(|z|) e^{i arg z}, z = W_a x, for each head, token and pair of features. Masked tokens have gate 1.

    Time O(n^2 d), memory O(n d). State: keys, values and gates of all tokens.

    Args:
        dim: features d of input and output.
        heads: heads h.
        dim_head: features e of each head, even.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns queries and keys by their position as well.
        softmax: False for the raw scores as weights, which sum up without bound.
        swish_gate: multiply the output by SiLU(W_g x).
        gradient_fraction: the part of the gradient that reaches z.
        transition: False for no gates, a = 1: then only rotary tells positions.
        out_bias: give the output projection a bias.

    Raises:
        ValueError: dim_head is odd, or gradient_fraction lies outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        rotary: Rotary | None = None,
        softmax: bool = True,
        swish_gate: bool = True,
        gradient_fraction: float = 0.9,
        transition: bool = True,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, dropout=dropout)
        if dim_head % 2:
            raise ValueError(f"dim_head must be even, features are gated in pairs, got {dim_head=}")
        if not 0.0 <= gradient_fraction <= 1.0:
            raise ValueError(f"gradient_fraction must lie in [0, 1], got {gradient_fraction=}")
        if rotary is not None:
            rotary.prepare(dim_head)
        self.rotary = rotary
        self.softmax = softmax
        self.gradient_fraction = gradient_fraction
        inner = heads * dim_head
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_a = nn.Linear(dim, inner, bias=False) if transition else None  # features (h p c), c = (re, im)
        self.to_gate = nn.Linear(dim, inner, bias=False) if swish_gate else None
        self.to_out = nn.Linear(inner, dim, bias=out_bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self._finish(self.values_and_output(x, mask=mask).output, x)

    def step(self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        self._check_step(x, state, mask, RelativeGateState)
        if isinstance(state, RelativeGateState):
            self._check_cache(state, x)
            q, k, v, gate = self._project(x, mask, state.length)
            cache = state.cache.append(k, v, mask)
            gates = torch.cat((state.gates, torch.view_as_real(gate)), dim=2)
        else:
            q, k, v, gate = self._project(x, mask, 0)
            cache, gates = KeyValueState(k, v, mask), torch.view_as_real(gate).clone()
        gate = torch.view_as_complex(gates)
        out = relative_gate_attention(q, cache.keys, cache.values, gate, mask=cache.mask, softmax=self.softmax)
        return self._finish(out, x), RelativeGateState(cache, gates)

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        q, k, _, gate = self._project(x, mask, 0)
        return relative_gate_weights(q, k, gate, mask=mask, softmax=self.softmax)

    def values_and_output(self, x: Tensor, *, mask: Tensor | None = None) -> ValuesAndOutput:
        self._check(x, mask)
        q, k, v, gate = self._project(x, mask, 0)
        out = relative_gate_attention(q, k, v, gate, mask=mask, softmax=self.softmax, dropout=self._drop)
        return ValuesAndOutput(v, out)

    def _project(self, x: Tensor, mask: Tensor | None, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, n, e) and gates (b, h, n, e / 2), 1 at masked tokens."""
        q, k, v = (
            to(x).view(*x.shape[:2], self.heads, self.dim_head).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        gate = self._gates(x)
        if mask is not None:
            gate = torch.where(mask[:, :, None, None], gate, torch.ones_like(gate))
        return q, k, v, gate.transpose(1, 2)

    def _gates(self, x: Tensor) -> Tensor:
        """(b, n, h, e / 2) complex."""
        shape = (*x.shape[:2], self.heads, self.dim_head // 2)
        if self.to_a is None:
            return torch.ones(shape, dtype=complex_of(x.dtype), device=x.device)
        return unit_gate(scale_gradient(self.to_a(x).view(*shape, 2), self.gradient_fraction))

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        out = out.transpose(1, 2).flatten(2)
        if self.to_gate is not None:
            out = out * F.silu(self.to_gate(x))
        projected: Tensor = self.to_out(out)
        return projected

    def _check_cache(self, state: RelativeGateState, x: Tensor) -> None:
        want = (x.shape[0], self.heads, state.length, self.dim_head)
        if state.cache.keys.shape != want:
            raise ValueError(
                f"state must come from this block and batch: (b, heads, n, dim_head) = {want}, "
                f"got keys of shape {tuple(state.cache.keys.shape)}"
            )
