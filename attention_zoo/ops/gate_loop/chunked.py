"""The gate loop in chunks of 64 tokens, as matrix products, with a backward written by hand.

Inside a chunk the output is ((q k^T) * D) v with D_ij = Re(a_{j+1} ... a_i); between chunks the complex state is kept
as a real matrix. Only the inputs are saved for backward, which recomputes D and the states.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.gate_loop.gates import log_and_phase, magnitude

CHUNK = 64  # tokens whose weights form one square matrix
GROUP = 16  # chunks that are computed at a time on the CPU


class ChunkedInputs(NamedTuple):
    """Inputs of the operator, of one real dtype, at least float32.

    q, k, v: (b, h, n, e), (b, h, n, e), (b, h, n, e_v).
    gate: (b, h, n, 2), real and imaginary part.
    state: initial state, (b, h, 2e, e_v), real part stacked on imaginary part.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    state: Tensor


def chunked_gate_loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, e_v) and final state; arguments as in `gate_loop`, in at least float32 and complex64."""
    pairs = torch.view_as_real(state)
    stacked = torch.cat((pairs[..., 0], pairs[..., 1]), dim=-2)
    out, stacked = _operator(ChunkedInputs(q, k, v, torch.view_as_real(gate), stacked))
    return out, torch.complex(*stacked.chunk(2, dim=-2))


def decay(gate: Tensor) -> Tensor:
    """Re(a_{j+1} ... a_i), (..., c, c), 0 for j > i, of gates (..., c, 2)."""
    return _real(*_cumulative(gate))


def _cumulative(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative product of gates (..., c, 2): log-magnitude in float64, cosine and sine of the phase, (..., c)."""
    log, phase = (part.cumsum(-1) for part in log_and_phase(gate))
    return log, phase.cos().to(gate.dtype), phase.sin().to(gate.dtype)


def _sizes(log: Tensor, dtype: torch.dtype) -> Tensor:
    """|D_ij| of D_ij = a_{j+1} ... a_i, (..., c, c), 0 for j > i."""
    return magnitude(log[..., :, None] - log[..., None, :], dtype).tril()


def _real(log: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Re D_ij, (..., c, c)."""
    return _sizes(log, cos.dtype) * (torch.stack((cos, sin), -1) @ torch.stack((cos, sin), -2))


def _imaginary(log: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Im D_ij, (..., c, c)."""
    return _sizes(log, cos.dtype) * (torch.stack((sin, -cos), -1) @ torch.stack((cos, sin), -2))


class _Chunks(NamedTuple):
    """Chunks of tokens (B, N, c, ...) with B = b h, and the products of gates between tokens and chunk boundaries.

    q, k, v: (B, N, c, e).
    log, cos, sin: (B, N, c), cumulative product of the gates of a chunk.
    first: (B, N, c, 2), product of the gates of a chunk up to and including each token.
    last: (B, N, c, 2), product of the gates after each token.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log: Tensor
    cos: Tensor
    sin: Tensor
    first: Tensor
    last: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens of a head, including the padding of the last chunk."""
        return self.q.shape[1] * self.q.shape[2]

    @property
    def whole(self) -> Tensor:
        """Product of all gates of a chunk, (B, N, 2)."""
        return self.first[:, :, -1]

    def read(self) -> Tensor:
        """Queries of a state before the chunk, (..., c, 2e), for its stacked real and imaginary parts."""
        return torch.cat((self.q * self.first[..., :1], self.q * -self.first[..., 1:]), dim=-1)

    def write(self) -> Tensor:
        """Keys of the state after the chunk, (..., c, 2e)."""
        return torch.cat((self.k * self.last[..., :1], self.k * self.last[..., 1:]), dim=-1)


def _fold(tensor: Tensor, size: int) -> Tensor:
    """(b, h, n, f) as chunks (b h, N, size, f), the last one padded."""
    missing = -tensor.shape[2] % size
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, missing))
    b, h, n, f = tensor.shape
    return tensor.reshape(b * h, n // size, size, f)


def _cut(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> _Chunks:
    size = min(CHUNK, q.shape[2])
    missing = -q.shape[2] % size
    if missing:  # gates of 1: padding leaves the state unchanged
        one = torch.tensor([1.0, 0.0], dtype=gate.dtype, device=gate.device).expand(*gate.shape[:2], missing, 2)
        gate = torch.cat((gate, one), dim=2)
    log, cos, sin = _cumulative(_fold(gate, size))
    grown = magnitude(log, cos.dtype)
    rest = magnitude(log[..., -1:] - log, cos.dtype)
    c, s = cos[..., -1:], sin[..., -1:]
    last = torch.stack((rest * (c * cos + s * sin), rest * (s * cos - c * sin)), dim=-1)
    first = torch.stack((grown * cos, grown * sin), dim=-1)
    return _Chunks(_fold(q, size), _fold(k, size), _fold(v, size), log, cos, sin, first, last)


def _multiply(gate: Tensor, state: Tensor) -> Tensor:
    """Complex product of gates (B, 2) and stacked states (B, 2e, e_v)."""
    re, im = state.chunk(2, dim=1)
    return gate[:, :1, None] * state + gate[:, 1:, None] * torch.cat((-im, re), dim=1)


def _states(chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, (B, N, 2e, e_v), and after the last, (B, 2e, e_v)."""
    written = chunks.write().transpose(-1, -2) @ chunks.v
    for index in range(written.shape[1]):
        after = written[:, index] + _multiply(chunks.whole[:, index], state)
        written[:, index] = state
        state = after
    return written, state


def _forward(inputs: ChunkedInputs) -> tuple[Tensor, Tensor]:
    q, k, v, gate, state = inputs
    b, h, n, _ = q.shape
    chunks = _cut(q, k, v, gate)
    before, after = _states(chunks, state.flatten(0, 1))
    flat, before = _flat(chunks), before.flatten(0, 1)
    out = flat.v.new_empty(flat.v.shape)
    for part in _groups(flat):
        group = _Chunks(*(tensor[part] for tensor in flat))
        scores = (group.q @ group.k.transpose(-1, -2)).mul_(_real(group.log, group.cos, group.sin))
        out[part] = (scores @ group.v).add_(group.read() @ before[part])
    return out.view(b, h, chunks.tokens, v.shape[3])[:, :, :n].clone(), after.reshape(state.shape).clone()


def _backward(inputs: ChunkedInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    q, k, v, gate, state = inputs
    grad_out, grad_state = gradients
    chunks = _cut(q, k, v, gate)
    before, _ = _states(chunks, state.flatten(0, 1))
    grad_out = _fold(grad_out, chunks.q.shape[2])
    grad_after = chunks.read().transpose(-1, -2) @ grad_out  # the loop turns it into that of the state after each chunk
    later = grad_state.flatten(0, 1)
    back = chunks.whole * torch.tensor([1.0, -1.0], dtype=gate.dtype, device=gate.device)
    for index in reversed(range(grad_after.shape[1])):
        earlier = grad_after[:, index] + _multiply(back[:, index], later)
        grad_after[:, index] = later
        later = earlier

    flat, around = _flat(chunks), [tensor.flatten(0, 1) for tensor in (grad_out, before, grad_after)]
    grads = [tensor.new_empty(tensor.shape) for tensor in (flat.q, flat.k, flat.v, flat.first)]
    for part in _groups(flat):
        group = _Chunks(*(tensor[part] for tensor in flat))
        for whole, piece in zip(grads, _chunk_gradients(group, *(t[part] for t in around)), strict=True):
            whole[part] = piece
    grads = [tensor.view(*q.shape[:2], chunks.tokens, tensor.shape[-1])[:, :, : q.shape[2]].clone() for tensor in grads]
    return [*grads, later.reshape(state.shape).clone()]


def _flat(chunks: _Chunks) -> _Chunks:
    """The chunks of all heads along one axis, (b h N, c, ...)."""
    return _Chunks(*(tensor.flatten(0, 1) for tensor in chunks))


def _groups(chunks: _Chunks) -> list[slice]:
    """Groups of chunks; on the CPU small ones that stay in its caches."""
    total = chunks.q.shape[0]
    size = GROUP if chunks.q.device.type == "cpu" else total
    return [slice(start, start + size) for start in range(0, total, size)]


def _chunk_gradients(chunks: _Chunks, grad: Tensor, before: Tensor, grad_after: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the gates (..., c, 2), from those of the outputs and of the states after the chunks."""
    real = _real(chunks.log, chunks.cos, chunks.sin)
    imaginary = _imaginary(chunks.log, chunks.cos, chunks.sin)
    scores = chunks.q @ chunks.k.transpose(-1, -2)
    pairs = grad @ chunks.v.transpose(-1, -2)
    from_state = grad @ before.transpose(-1, -2)  # (..., c, 2e)
    into_state = chunks.v @ grad_after.transpose(-1, -2)
    grad_v = ((scores * real).transpose(-1, -2) @ grad).add_(chunks.write() @ grad_after)
    weighted = pairs * real
    first, last = chunks.first, chunks.last
    read, write = from_state.chunk(2, dim=-1), into_state.chunk(2, dim=-1)
    grad_q = weighted @ chunks.k + (read[0] * first[..., :1] - read[1] * first[..., 1:])
    grad_k = weighted.transpose(-1, -2) @ chunks.q + (write[0] * last[..., :1] + write[1] * last[..., 1:])
    reads = torch.stack([(chunks.q * part).sum(-1) for part in read], dim=-1)
    writes = torch.complex((chunks.k * write[0]).sum(-1), -(chunks.k * write[1]).sum(-1))
    whole = _inner(grad_after, before)
    return grad_q, grad_k, grad_v, _gate_gradient(chunks, scores.mul_(pairs), real, imaginary, reads, writes, whole)


def _inner(grad: Tensor, state: Tensor) -> Tensor:
    """sum conj(grad) state over the features of stacked states, (...) complex."""
    (a, b), (c, d) = grad.chunk(2, dim=-2), state.chunk(2, dim=-2)
    return torch.complex((a * c + b * d).sum((-1, -2)), (a * d - b * c).sum((-1, -2)))


def _gate_gradient(
    chunks: _Chunks, pairs: Tensor, real: Tensor, imaginary: Tensor, reads: Tensor, writes: Tensor, whole: Tensor
) -> Tensor:
    """Gradient of each gate, (..., c, 2), without division, so that it is exact for gates of 0.

    The loss is Re of sum_ij pairs_ij D_ij + sum_i reads_i first_i + sum_j writes_j last_j + whole * (all gates). Each
    product that contains a_t is (product after t) a_t (product before t); the gradient is the conjugate of the rest.
    """
    start = torch.tensor([1.0, 0.0], dtype=real.dtype, device=real.device).expand_as(chunks.first[..., :1, :])
    first = torch.cat((start, chunks.first[..., :-1, :]), dim=-2)  # the product up to t - 1
    zero = torch.zeros_like(real[..., :1, :])
    before = [torch.cat((zero, part[..., :-1, :]), dim=-2) for part in (real, imaginary)]  # D_{t-1, j}
    left = torch.cat((pairs, reads), dim=-1)  # (i, j + 2)
    inner = left @ torch.cat((before[0], first[..., :1], -first[..., 1:]), dim=-1).transpose(-1, -2)  # (i, t)
    turned = left @ torch.cat((before[1], first.flip(-1)), dim=-1).transpose(-1, -2)
    near_real = (real * inner).sub_(imaginary * turned).sum(-2)
    near_imaginary = turned.mul_(real).add_(inner.mul_(imaginary)).sum(-2)

    columns = torch.view_as_real(writes)
    through = torch.complex(before[0] @ columns[..., :1], before[0] @ columns[..., 1:])
    through = through + 1j * torch.complex(before[1] @ columns[..., :1], before[1] @ columns[..., 1:])
    outer = through.squeeze(-1) + whole[..., None] * torch.view_as_complex(first)
    rest = torch.complex(near_real, near_imaginary) + torch.view_as_complex(chunks.last) * outer
    return torch.view_as_real(rest.conj().resolve_conj())


def _fake(inputs: ChunkedInputs) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (inputs.v, inputs.state)]


_operator = register_operator(
    "gate_loop", ChunkedInputs, _forward, _backward, _fake, differentiable_outputs=2, save_outputs=False
)
