"""The gate loop in chunks of 64 tokens, as matrix products, with a backward written by hand.

With the cumulative log-magnitude L and phase phi of the gates, the features are folded into
    q'_i = [q_i cos phi_i, q_i sin phi_i],  k'_j = [k_j cos phi_j, k_j sin phi_j],
and the gate loop is linear attention with a real decay:
    out_i = sum_{j <= i} exp(L_i - L_j) (q'_i . k'_j) v_j
Inside a chunk this is ((q k^T) * D) v with D_ij = exp(L_i - L_j) cos(phi_i - phi_j). Between chunks the state is
rotated by -phi, so that it only decays, and kept as its real part stacked on its negative imaginary part. Only the
inputs are saved for backward, which recomputes D and the states.

On the CPU ("chunked") chunks are computed in groups, states one after the other, and decays as exponentials of sums of
logarithms in float64. On other devices ("batched") all chunks are computed at once, all states in one matrix product
with the triangle of the decays between chunks, and decays as products of gates, in the precision of the inputs.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.gate_loop.gates import gate_products, log_and_phase, magnitude, size_and_direction

CHUNK = 64  # tokens whose weights form one square matrix
GROUP = 16  # chunks that are computed at a time on the CPU


class ChunkedInputs(NamedTuple):
    """Inputs of the operator, of one real dtype, at least float32.

    q, k, v: (b, h, n, e), (b, h, n, e), (b, h, n, e_v).
    gate: (b, h, n, 2), real and imaginary part.
    state: initial state, (b, h, 2e, e_v), real part stacked on the negative imaginary part.
    impl: "chunked" or "batched".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    state: Tensor
    impl: str


def chunked_gate_loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, e_v) and final state; arguments as in `gate_loop`, in at least float32 and complex64."""
    re, im = torch.view_as_real(state).unbind(-1)
    out, last = _operator(ChunkedInputs(q, k, v, torch.view_as_real(gate), torch.cat((re, -im), dim=-2), impl))
    return out, torch.complex(*last.chunk(2, dim=-2))


def decay(gate: Tensor, impl: str) -> Tensor:
    """Re(a_{j+1} ... a_i), (..., c, c), 0 for j > i, of gates (..., c, 2)."""
    if impl == "batched":
        return gate_products(torch.view_as_complex(gate)).real
    log, phase = (part.cumsum(-1) for part in log_and_phase(gate))
    return _decay(log, gate.dtype) * (phase[..., :, None] - phase[..., None, :]).cos().to(gate.dtype)


def _decay(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(L_i - L_j), (..., c, c), 0 for j > i."""
    return magnitude(log[..., :, None] - log[..., None, :], dtype).tril()


def _chunk_decay(decay: Tensor, dtype: torch.dtype) -> Tensor:
    """`_Chunks.decay` of a group of chunks as the decays between all pairs of tokens, (M, 1 + c, 1 + c)."""
    return _decay(decay, dtype) if decay.ndim == 2 else decay


class _Chunks(NamedTuple):
    """Chunks of tokens (B, N, c, ...) with B = b h.

    q, k, v: (B, N, c, e), (B, N, c, e), (B, N, c, e_v).
    waves: cosine and sine of the cumulative phase, (B, N, c, 2).
    decay: log-magnitude of the gates from the start of the chunk to each token, after a 0, (B, N, 1 + c); or the decays
        between all pairs, with the state before the chunk as token 0, (B, N, 1 + c, 1 + c).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    waves: Tensor
    decay: Tensor

    @property
    def from_start(self) -> Tensor:
        """Decay from the state before the chunk to each token, (B, N, c, 1)."""
        if self.decay.ndim == 4:
            return self.decay[..., 1:, :1]
        return magnitude(self.decay[..., 1:, None], self.q.dtype)

    @property
    def to_end(self) -> Tensor:
        """Decay from the state before the chunk, and from each token, to the end of the chunk, (B, N, 1 + c, 1)."""
        if self.decay.ndim == 4:
            return self.decay[..., -1, :, None]
        return magnitude(self.decay[..., -1:] - self.decay, self.q.dtype)[..., None]


def _split(x: Tensor) -> Tensor:
    """(b, h, n, f) as chunks (b h, N, c, f), the last one padded."""
    b, h, n, f = x.shape
    size = min(CHUNK, n)
    x = F.pad(x, (0, 0, 0, -n % size)) if n % size else x
    return x.reshape(b * h, x.shape[2] // size, size, f)


def _join(groups: Iterable[Tensor], like: Tensor) -> Tensor:
    """Groups of chunks as (b, h, n, f), without padding."""
    b, h, n, _ = like.shape
    x = torch.cat(list(groups))
    return x.view(b, h, n + -n % min(CHUNK, n), x.shape[-1])[:, :, :n].contiguous()


def _groups(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Groups of chunks (M, c, ...), of all heads; on the CPU small ones that stay in its caches."""
    size = GROUP if tensors[0].device.type == "cpu" else tensors[0].shape[:2].numel()
    return zip(*(torch.split(x.flatten(0, 1), size) for x in tensors), strict=True)


def _fold(x: Tensor, waves: Tensor) -> Tensor:
    """[x cos phi, x sin phi], (..., 2e)."""
    return torch.cat((x * waves[..., :1], x * waves[..., 1:]), dim=-1)


def _unfold(grad: Tensor, waves: Tensor) -> Tensor:
    """Gradient of x from that of `_fold(x, waves)`."""
    cos, sin = grad.chunk(2, dim=-1)
    return (cos * waves[..., :1]).addcmul_(sin, waves[..., 1:])


def _rotate(state: Tensor, waves: Tensor) -> Tensor:
    """Rotated state (B, 2e, e_v) to the state, by waves (B, 2); also the gradient of the state to the rotated one."""
    (re, im), (cos, sin) = state.chunk(2, dim=1), waves[:, :, None, None].unbind(1)
    return torch.cat((re * cos + im * sin, re * sin - im * cos), dim=1)


def _by_phase(x: Tensor, y: Tensor) -> Tensor:
    """x . y over folded features, and its derivative by the phase of x, (2, ...)."""
    return torch.stack(((x * y).sum(-1), (_turn(x) * y).sum(-1)))


def _turn(x: Tensor) -> Tensor:
    """Derivative of folded features, or of waves, by the phase."""
    cos, sin = x.chunk(2, dim=-1)
    return torch.cat((-sin, cos), dim=-1)


def _chunks(inputs: ChunkedInputs) -> tuple[_Chunks, Tensor, Tensor]:
    """The chunks, the rotated states before each, (B, N, 2e, e_v), and after the last, (B, 2e, e_v)."""
    q, k, v = _split(inputs.q), _split(inputs.k), _split(inputs.v)
    missing = q.shape[1] * q.shape[2] - inputs.q.shape[2]  # padding neither decays nor rotates the state
    if inputs.impl == "batched":
        size, direction = size_and_direction(inputs.gate)
        size = F.pad(size, (0, missing), value=1.0).view(q.shape[:3])
        padding = direction.new_ones(*direction.shape[:2], missing)
        wave = torch.cat((direction, padding), dim=2).cumprod(-1).view(q.shape[:3])
        waves = torch.view_as_real(wave / wave.abs())
        decay = gate_products(F.pad(size, (1, 0), value=1.0))
    else:
        log, phase = (F.pad(part, (0, missing)).flatten(0, 1) for part in log_and_phase(inputs.gate))
        decay = F.pad(log.view(q.shape[:3]).cumsum(-1), (1, 0))
        phase = phase.cumsum(-1).view(q.shape[:3])
        waves = torch.stack((phase.cos(), phase.sin()), dim=-1).to(q.dtype)
    chunks = _Chunks(q, k, v, waves, decay)
    last = chunks.to_end
    writes = [_fold(k * d, w).transpose(-1, -2) @ v for k, v, w, d in _groups(k, v, waves, last[:, :, 1:])]
    states = torch.cat(writes).view(*q.shape[:2], *inputs.state.shape[2:])
    return chunks, *_states(states, last[:, :, :1], inputs.state.flatten(0, 1), inputs.impl)


def _states(x: Tensor, decay: Tensor, state: Tensor, impl: str, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The state before each step, (B, N, ...), and after the last of state = decay * state + x.

    Args:
        x: (B, N, 2e, e_v); its memory may be used for the result.
        decay: (B, N, 1, 1).
        state: (B, 2e, e_v).
        impl: as in `ChunkedInputs`.
        reverse: whether the steps run from the last chunk to the first.
    """
    if impl == "chunked":
        steps = list(zip(x.unbind(1), decay.unbind(1), strict=True))
        return x, _recur(reversed(steps) if reverse else steps, state)
    if reverse:
        x, decay = x.flip(1), decay.flip(1)
    triangle = gate_products(F.pad(decay[..., 0, 0], (1, 0), value=1.0))  # between the states after all chunks
    states = (triangle @ torch.cat((state[:, None], x), dim=1).flatten(2)).view(-1, x.shape[1] + 1, *x.shape[2:])
    before, after = states[:, :-1], states[:, -1]
    return before.flip(1) if reverse else before, after


def _recur(steps: Iterable[tuple[Tensor, Tensor]], state: Tensor) -> Tensor:
    """state = decay * state + x over steps (x, decay); x is replaced by the state before it, the last one returned."""
    for x, decay in steps:
        after = torch.addcmul(x, decay, state)
        x.copy_(state)
        state = after
    return state


def _forward(inputs: ChunkedInputs) -> tuple[Tensor, Tensor]:
    chunks, before, after = _chunks(inputs)
    out = []
    for q, k, v, waves, decay, state in _groups(*chunks, before):
        decays = _chunk_decay(decay, q.dtype)
        scores = (q @ k.transpose(-1, -2)).mul_(waves @ waves.transpose(-1, -2)).mul_(decays[:, 1:, 1:])
        out.append((scores @ v).addcmul_(_fold(q, waves) @ state, decays[:, 1:, :1]))
    return _join(out, inputs.v), _rotate(after, chunks.waves[:, -1, -1]).view(inputs.state.shape)


def _backward(inputs: ChunkedInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    chunks, before, _ = _chunks(inputs)
    grad_out, grad_state = _split(gradients[0]), _rotate(gradients[1].flatten(0, 1), chunks.waves[:, -1, -1])
    first = chunks.from_start
    reads = _groups(chunks.q, chunks.waves, first, grad_out)
    grad_after = torch.cat([_fold(q * d, w).transpose(-1, -2) @ grad for q, w, d, grad in reads]).view(before.shape)
    grad_after, initial = _states(grad_after, first[:, :, -1:], grad_state, inputs.impl, reverse=True)
    groups = [_chunk_gradients(*group) for group in _groups(*chunks, grad_out, before, grad_after)]
    *grads, grad_gate = (_join(parts, inputs.q) for parts in zip(*groups, strict=True))
    if inputs.impl == "batched":
        unit = size_and_direction(inputs.gate)[1]
    else:
        phase = log_and_phase(inputs.gate)[1]
        unit = torch.polar(torch.ones_like(phase), phase)
    return [*grads, torch.view_as_real(torch.view_as_complex(grad_gate) * unit), initial.reshape(inputs.state.shape)]


def _chunk_gradients(
    q: Tensor, k: Tensor, v: Tensor, waves: Tensor, decay: Tensor, grad: Tensor, before: Tensor, grad_after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the gates along and across their directions, (M, c, 2).

    With the state before the chunk as token 0 and the one after it as token c + 1, the loss is sum_ij pairs_ij E_ij,
    E_ij = exp(L_i - L_j). A gate a_t with j < t <= i enters as E_ij = E_it |a_t| E_{t-1,j}, so that the gradient of
    |a_t| is the sum of pairs_ij E_it E_{t-1,j}: without division, and exact for gates of 0. The gradient across takes
    the derivatives of the pairs by the phase instead of the pairs.
    """
    queries, keys, decays = _fold(q, waves), _fold(k, waves), _chunk_decay(decay, q.dtype)
    inside, first, last = decays[:, 1:, 1:], decays[:, 1:, :1], decays[:, -1, 1:, None]
    rotation = torch.stack((waves, _turn(waves))) @ waves.transpose(-1, -2)  # cos(phi_i - phi_j) and its derivative
    grad_scores = grad @ v.transpose(-1, -2)
    grad_read, grad_written = grad @ before.transpose(-1, -2), v @ grad_after.transpose(-1, -2)  # (M, c, 2e)

    scores = q @ k.transpose(-1, -2)
    whole = _by_phase(grad_after.transpose(-1, -2), before.transpose(-1, -2)).sum(-1, keepdim=True)
    upper = torch.cat((_by_phase(queries, grad_read)[..., None], rotation * (scores * grad_scores)), dim=-1)
    lower = torch.cat((whole, _by_phase(grad_written, keys)), dim=-1)[..., None, :]
    earlier = torch.cat((upper, lower), dim=-2)[..., :-1] @ decays[:, :-1, :-1].transpose(-1, -2)
    grad_gate = earlier.mul_(torch.cat((inside, decays[:, -1:, 1:]), dim=-2)).sum(-2)

    weights = rotation[0].mul_(inside)  # Re(a_{j+1} ... a_i)
    grad_scores, scores = grad_scores.mul_(weights), scores.mul_(weights)
    grad_q = (grad_scores @ k).add_(_unfold(grad_read.mul_(first), waves))
    grad_k = (grad_scores.transpose(-1, -2) @ q).add_(_unfold(grad_written.mul_(last), waves))
    grad_v = (scores.transpose(-1, -2) @ grad).addcmul_(keys @ grad_after, last)
    return grad_q, grad_k, grad_v, grad_gate.movedim(0, -1)


def _fake(inputs: ChunkedInputs) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (inputs.v, inputs.state)]


_operator = register_operator(
    "gate_loop", ChunkedInputs, _forward, _backward, _fake, differentiable_outputs=2, save_outputs=False
)
