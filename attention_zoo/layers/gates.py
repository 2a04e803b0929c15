"""The arguments `gate` and `gradient_fraction` of layers with data-dependent gates a = sigmoid(|z|) e^{i arg z}."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo._checks import check_choice, check_number
from attention_zoo.ops.gate_loop import scale_gradient


def check_gate(gate: str | None, gradient_fraction: float) -> None:
    """Check the arguments of a layer.

    Raises:
        TypeError: `gradient_fraction` is not a number.
        ValueError: `gate` is not "complex", "real" or None, or `gradient_fraction` is outside [0, 1].
    """
    if gate is not None:
        check_choice("gate", gate, ("complex", "real"))
    check_number(gradient_fraction=gradient_fraction)
    if not 0.0 <= gradient_fraction <= 1.0:
        raise ValueError(f"gradient_fraction must lie in [0, 1], got {gradient_fraction=}")


def gate_input(z: Tensor, gate: str | None, gradient_fraction: float) -> Tensor:
    """z (..., 2), real and imaginary part, with its gradient scaled, and with gate="real" its imaginary part 0."""
    z = scale_gradient(z, gradient_fraction)
    return torch.stack((z[..., 0], torch.zeros_like(z[..., 0])), dim=-1) if gate == "real" else z
