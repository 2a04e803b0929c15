"""The gate loop by `chunk_simple_gla` of flash-linear-attention, with the phase folded into queries and keys.

    q'_i = [q_i cos phi_i, q_i sin phi_i],  k'_j = [k_j cos phi_j, k_j sin phi_j]
    out_i = sum_{j <= i} |a_{j+1} ... a_i| (q'_i . k'_j) v_j
Opt-in: the tests replace the kernel by the recurrence that it computes, and it has not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops.gate_loop.gates import products_up_to, size_and_direction

LEAST = -100.0  # log-magnitude of gates of 0, whose exponential is 0 in float32 up to the smallest denormal numbers


def simple_gla_gate_loop(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, e_v) and final state; arguments as in `gate_loop`, in at least float32 and complex64.

    Args:
        dtype: dtype of queries, keys and values in the kernel, which accumulates in float32.

    Raises:
        ImportError: flash-linear-attention is not installed.
    """
    kernel, waves = load_kernel(), _waves(gate)
    out, last = kernel(**simple_gla_arguments(q, k, v, gate, waves, state, dtype))
    re, im = last.to(state.real.dtype).chunk(2, dim=-2)  # of the rotated state, the imaginary part negative
    return out.transpose(1, 2), torch.complex(re, -im) * waves[:, :, -1, None, None]


def simple_gla_arguments(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, waves: Tensor, state: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """The keyword arguments of `chunk_simple_gla`: (b, n, h, ...) tensors, log-decays, and the initial state.

    Args:
        waves: e^{i phi}, (b, h, n) complex.
    """
    size = size_and_direction(torch.view_as_real(gate))[0]
    smallest = size < 1e-43
    log = torch.where(smallest, 1.0, size).log().masked_fill(smallest, LEAST)
    cos, sin = waves.real[..., None], waves.imag[..., None]
    folded = {"q": torch.cat((q * cos, q * sin), dim=-1), "k": torch.cat((k * cos, k * sin), dim=-1), "v": v}
    tokens = {name: x.to(dtype).transpose(1, 2) for name, x in folded.items()}
    initial = torch.cat((state.real, -state.imag), dim=-2)
    return {**tokens, "g": log.transpose(1, 2), "scale": 1.0, "initial_state": initial, "output_final_state": True}


def load_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """`chunk_simple_gla`.

    Raises:
        ImportError: flash-linear-attention is not installed.
    """
    try:
        from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("impl='fla' needs flash-linear-attention: pip install flash-linear-attention") from error
    kernel: Callable[..., tuple[Tensor, Tensor]] = chunk_simple_gla
    return kernel


def _waves(gate: Tensor) -> Tensor:
    """e^{i phi} with the cumulative phase phi of gates (b, h, n); a gate of 0 has the phase 0."""
    waves = products_up_to(size_and_direction(torch.view_as_real(gate))[1])
    return waves / waves.abs()
