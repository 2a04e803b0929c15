"""The gate loop in chunks of 64 tokens, as matrix products, its backward written by hand.

Inside a chunk ((q k^T) * D) v with D_ij = Re(a_{j+1} ... a_i), between chunks the complex memory as real matrices.
Backward computes D and the memories again, so that only the inputs are kept.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.gate_loop.gates import magnitude
from attention_zoo.ops.precision import no_autocast

CHUNK = 64  # tokens whose weights are held as one square
GROUP = 16  # chunks that are computed side by side on the CPU
SMALLEST = 1e-300  # magnitude that stands for a gate of 0 in the logarithm: whatever it multiplies is 0 in float32


def decay(gate: Tensor) -> Tensor:
    """Re(a_{j+1} ... a_i), (..., c, c), 0 for j > i, of gates (..., c, 2)."""
    return _real(*_log_and_phase(gate))


def _log_and_phase(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gates (..., c, 2) multiplied up: log-magnitude in float64, cosine and sine of the phase, (..., c) each.

    float64, because 64 small gates reach logarithms whose differences float32 would round.
    """
    re, im = gate.double().unbind(-1)
    log = torch.hypot(re, im).clamp(min=SMALLEST).log().cumsum(-1)
    phase = torch.atan2(im, re).cumsum(-1)
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
    """Chunks side by side, (b h, N, c, ...), and the products of gates that tie them to the memories between them.

    q, k, v: (B, N, c, e).
    log, cos, sin: (B, N, c), the gates of a chunk multiplied up.
    first: (B, N, c, 2), the product of the gates of a chunk up to and with each token.
    last: (B, N, c, 2), the product of those after each token.
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
        """Those of all chunks of a head, what fills up the last one included."""
        return self.q.shape[1] * self.q.shape[2]

    @property
    def whole(self) -> Tensor:
        """(B, N, 2), the product of all gates of a chunk."""
        return self.first[:, :, -1]

    def read(self) -> Tensor:
        """(..., c, 2e), what reads a memory stacked as real over imaginary part."""
        return torch.cat((self.q * self.first[..., :1], self.q * -self.first[..., 1:]), dim=-1)

    def write(self) -> Tensor:
        """(..., c, 2e), what writes values into the memory after the chunk."""
        return torch.cat((self.k * self.last[..., :1], self.k * self.last[..., 1:]), dim=-1)


def _fold(tensor: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """(b, h, n, f) as chunks (b h, N, size, f), the last one filled up."""
    missing = -tensor.shape[2] % size
    if missing:
        pad = tensor.new_full((*tensor.shape[:2], missing, tensor.shape[3]), fill)
        tensor = torch.cat((tensor, pad), dim=2)
    b, h, n, f = tensor.shape
    return tensor.reshape(b * h, n // size, size, f)


def _cut(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> _Chunks:
    size = min(CHUNK, q.shape[2])
    missing = -q.shape[2] % size
    if missing:  # gates of 1: the last memory stays as the last token left it
        one = torch.tensor([1.0, 0.0], dtype=gate.dtype, device=gate.device).expand(*gate.shape[:2], missing, 2)
        gate = torch.cat((gate, one), dim=2)
    log, cos, sin = _log_and_phase(_fold(gate, size))
    grown = magnitude(log, cos.dtype)
    rest = magnitude(log[..., -1:] - log, cos.dtype)
    c, s = cos[..., -1:], sin[..., -1:]
    last = torch.stack((rest * (c * cos + s * sin), rest * (s * cos - c * sin)), dim=-1)
    first = torch.stack((grown * cos, grown * sin), dim=-1)
    return _Chunks(_fold(q, size), _fold(k, size), _fold(v, size), log, cos, sin, first, last)


def _turn(gate: Tensor, memory: Tensor) -> Tensor:
    """The product of complex numbers (B, 2) and memories (B, 2e, e_v)."""
    re, im = memory.chunk(2, dim=1)
    return gate[:, :1, None] * memory + gate[:, 1:, None] * torch.cat((-im, re), dim=1)


def _memories(chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """The memory before every chunk, (B, N, 2e, e_v), and after the last, (B, 2e, e_v)."""
    written = chunks.write().transpose(-1, -2) @ chunks.v
    for index in range(written.shape[1]):
        after = written[:, index] + _turn(chunks.whole[:, index], state)
        written[:, index] = state
        state = after
    return written, state


@torch.library.custom_op("attention_zoo::gate_loop", mutates_args=())
def chunked_gate_loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs (b, h, n, e_v) and the last memory.

    Args:
        q, k, v: (b, h, n, e), (b, h, n, e), (b, h, n, e_v), of one dtype, at least float32.
        gate: (b, h, n, 2), real and imaginary part.
        state: (b, h, 2e, e_v), the memory before the first token, real over imaginary part.
    """
    b, h, n, _ = q.shape
    chunks = _cut(q, k, v, gate)
    before, after = _memories(chunks, state.flatten(0, 1))
    flat, before = _flat(chunks), before.flatten(0, 1)
    out = flat.v.new_empty(flat.v.shape)
    for part in _groups(flat):
        given = _Chunks(*(tensor[part] for tensor in flat))
        scores = (given.q @ given.k.transpose(-1, -2)).mul_(_real(given.log, given.cos, given.sin))
        out[part] = (scores @ given.v).add_(given.read() @ before[part])
    return out.view(b, h, chunks.tokens, v.shape[3])[:, :, :n].clone(), after.reshape(state.shape).clone()


@torch.library.custom_op("attention_zoo::gate_loop_backward", mutates_args=())
def _chunked_backward(
    to_out: Tensor, to_state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = _cut(q, k, v, gate)
    before, _ = _memories(chunks, state.flatten(0, 1))
    grad = _fold(to_out, chunks.q.shape[2])
    to_after = chunks.read().transpose(-1, -2) @ grad  # below: the gradient to the memory after every chunk
    later = to_state.flatten(0, 1)
    back = chunks.whole * torch.tensor([1.0, -1.0], dtype=gate.dtype, device=gate.device)
    for index in reversed(range(to_after.shape[1])):
        earlier = to_after[:, index] + _turn(back[:, index], later)
        to_after[:, index] = later
        later = earlier

    flat, around = _flat(chunks), [tensor.flatten(0, 1) for tensor in (grad, before, to_after)]
    grads = [tensor.new_empty(tensor.shape) for tensor in (flat.q, flat.k, flat.v, flat.first)]
    for part in _groups(flat):
        given = _Chunks(*(tensor[part] for tensor in flat))
        for whole, piece in zip(grads, _chunk_gradients(given, *(t[part] for t in around)), strict=True):
            whole[part] = piece
    to_q, to_k, to_v, to_gate = (
        tensor.view(*q.shape[:2], chunks.tokens, tensor.shape[-1])[:, :, : q.shape[2]].clone() for tensor in grads
    )
    return to_q, to_k, to_v, to_gate, later.reshape(state.shape).clone()


def _flat(chunks: _Chunks) -> _Chunks:
    """The chunks of all heads in a row, (b h N, c, ...)."""
    return _Chunks(*(tensor.flatten(0, 1) for tensor in chunks))


def _groups(chunks: _Chunks) -> list[slice]:
    """All chunks in groups: on the CPU few enough at a time for its caches."""
    total = chunks.q.shape[0]
    size = GROUP if chunks.q.device.type == "cpu" else total
    return [slice(start, start + size) for start in range(0, total, size)]


def _chunk_gradients(chunks: _Chunks, grad: Tensor, before: Tensor, to_after: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and the gates (..., c, 2) of chunks between known memories and their gradients."""
    real = _real(chunks.log, chunks.cos, chunks.sin)
    imaginary = _imaginary(chunks.log, chunks.cos, chunks.sin)
    scores = chunks.q @ chunks.k.transpose(-1, -2)
    pairs = grad @ chunks.v.transpose(-1, -2)
    from_memory = grad @ before.transpose(-1, -2)  # (..., c, 2e)
    into_memory = chunks.v @ to_after.transpose(-1, -2)
    to_v = ((scores * real).transpose(-1, -2) @ grad).add_(chunks.write() @ to_after)
    weighted = pairs * real
    first, last = chunks.first, chunks.last
    read, write = from_memory.chunk(2, dim=-1), into_memory.chunk(2, dim=-1)
    to_q = weighted @ chunks.k + (read[0] * first[..., :1] - read[1] * first[..., 1:])
    to_k = weighted.transpose(-1, -2) @ chunks.q + (write[0] * last[..., :1] + write[1] * last[..., 1:])
    reads = torch.stack([(chunks.q * part).sum(-1) for part in read], dim=-1)
    writes = torch.complex((chunks.k * write[0]).sum(-1), -(chunks.k * write[1]).sum(-1))
    whole = _inner(to_after, before)
    return to_q, to_k, to_v, _gate_gradient(chunks, scores.mul_(pairs), real, imaginary, reads, writes, whole)


def _inner(grad: Tensor, memory: Tensor) -> Tensor:
    """sum conj(grad) memory over the features of stacked memories: (...) complex."""
    (a, b), (c, d) = grad.chunk(2, dim=-2), memory.chunk(2, dim=-2)
    return torch.complex((a * c + b * d).sum((-1, -2)), (a * d - b * c).sum((-1, -2)))


def _gate_gradient(
    chunks: _Chunks, pairs: Tensor, real: Tensor, imaginary: Tensor, reads: Tensor, writes: Tensor, whole: Tensor
) -> Tensor:
    """The gradient to every gate, (..., c, 2), with no division, so that a gate of 0 has its true one.

    The loss is Re of sum_ij pairs_ij D_ij + sum_i reads_i first_i + sum_j writes_j last_j + whole * (all gates). Each
    product that holds a_t is (product after t) a_t (product before t), and the gradient is the conjugate of the rest.
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


@chunked_gate_loop.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@_chunked_backward.register_fake
def _(
    to_out: Tensor, to_state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        gate.new_empty(gate.shape),
        state.new_empty(state.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, to_out: Tensor, to_state: Tensor) -> tuple[Tensor, ...]:
    with no_autocast(to_out):
        grads: tuple[Tensor, ...] = _chunked_backward(to_out, to_state, *ctx.saved_tensors)
    return grads


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the chunked gate loop has no second derivative: compute it inside `with attention_zoo.reference():`"
    )


chunked_gate_loop.register_autograd(_backward, setup_context=_save)
_chunked_backward.register_autograd(_refuse)
