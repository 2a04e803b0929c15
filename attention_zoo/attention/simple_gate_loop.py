"""The simple gate loop: one real gate per channel, one multiplication to read.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
Upstream: gateloop-transformer, SimpleGateLoopLayer.
Differs: takes padding masks and decodes step by step; runs in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.norms import LayerNorm, RMSNorm
from attention_zoo.layers.state import State, count_tokens, register_state
from attention_zoo.ops.gate_loop import linear_recurrence
from attention_zoo.ops.precision import at_least_float32, no_autocast


@dataclass
class SimpleGateLoopState(State):
    """The memory after all tokens so far. Size: b * d numbers, however many tokens it has seen.

    Attributes:
        memory: (b, d) in at least float32.
        seen: tokens so far, masked ones included; a tensor without axes.
    """

    memory: Tensor
    seen: Tensor

    @property
    def length(self) -> int:
        return int(self.seen)


register_state(SimpleGateLoopState)


class SimpleGateLoop(AttentionBlock):
    """h_t = sigma(a_t) h_{t-1} + kv_t, y_t = q_t h_t for every channel, [q | kv | a] = W RMSNorm(x); then LayerNorm(y).

    A masked token leaves h unchanged. Time and memory O(n d). State: d numbers.

    Args:
        dim: features d of input and output; each is a head of its own.
        norm: RMSNorm before the projection: upstream's layer stood without one of its own around it.
        post_norm: LayerNorm after the recurrence.
        reverse: run from the last token to the first. Such a block is not causal and has no step.
    """

    def __init__(self, dim: int, *, norm: bool = True, post_norm: bool = False, reverse: bool = False) -> None:
        super().__init__(dim, heads=dim, dim_head=1, causal=not reverse)
        self.reverse = reverse
        self.norm = RMSNorm(dim) if norm else None
        self.to_qkva = nn.Linear(dim, 3 * dim, bias=False)
        self.post_norm = LayerNorm(dim) if post_norm else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        q, written, gate = self._project(x, mask)
        return self._finish(self._run(q, written, gate))

    def step(self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        if self.reverse:
            raise ValueError("step needs a block built with reverse=False, got reverse=True: it reads the future first")
        self._check_step(x, state, mask, SimpleGateLoopState)
        q, written, gate = self._project(x, mask)
        before = state if isinstance(state, SimpleGateLoopState) else None
        if before is not None and before.memory.shape != (x.shape[0], self.dim):
            want = (x.shape[0], self.dim)
            raise ValueError(
                f"state must come from this block and batch: (b, dim) = {want}, "
                f"got a memory of shape {tuple(before.memory.shape)}"
            )
        out, memory = linear_recurrence(gate, written, state=None if before is None else before.memory)
        seen = count_tokens(None if before is None else before.seen, x.shape[1])
        return self._finish((q * out).to(q.dtype)), SimpleGateLoopState(memory.clone(), seen)

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        q, _, gate = self._project(x, mask)
        with no_autocast(x):
            if self.reverse:
                q, gate = q.flip(1), gate.flip(1)
            log = gate.double().clamp(min=1e-300).log().cumsum(1).transpose(1, 2)  # (b, h, n)
            sizes = (log[..., :, None] - log[..., None, :]).exp().tril().to(at_least_float32(q).dtype)
            weights = q.transpose(1, 2)[..., None] * sizes
        if mask is not None:
            weights = weights.masked_fill(~(mask.flip(1) if self.reverse else mask)[:, None, None], 0.0)
        return weights.flip(-1, -2) if self.reverse else weights

    def values_and_output(self, x: Tensor, *, mask: Tensor | None = None) -> ValuesAndOutput:
        self._check(x, mask)
        q, written, gate = self._project(x, mask)
        return ValuesAndOutput(
            written.transpose(1, 2)[..., None], self._run(q, written, gate).transpose(1, 2)[..., None]
        )

    def _project(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, kv and the gate in at least float32, (b, n, d) each; a masked token has kv 0 and gate 1."""
        q, written, a = self.to_qkva(x if self.norm is None else self.norm(x)).chunk(3, dim=-1)
        gate = at_least_float32(a).sigmoid()
        if mask is not None:
            written = written.masked_fill(~mask[..., None], 0.0)
            gate = gate.masked_fill(~mask[..., None], 1.0)
        return q, at_least_float32(written), gate

    def _run(self, q: Tensor, written: Tensor, gate: Tensor) -> Tensor:
        if self.reverse:
            written, gate = written.flip(1), gate.flip(1)
        out = linear_recurrence(gate, written).out
        return (q * (out.flip(1) if self.reverse else out)).to(q.dtype)

    def _finish(self, out: Tensor) -> Tensor:
        return out if self.post_norm is None else self.post_norm(out)
