"""Rotary position embedding: pairs of features are rotated by an angle proportional to the position.

Paper: RoFormer, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo._checks import check_choice
from attention_zoo.ops.precision import no_autocast

PAIRINGS = ("interleaved", "half")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, pairing: str = "interleaved") -> Tensor:
    """Rotate pairs (u, v) of the first r features of `x` to (u cos - v sin, v cos + u sin); the others are unchanged.

    Args:
        x: (..., n, e).
        cos: (..., n, r), r <= e; the value of a pair is repeated for both of its features.
        sin: (..., n, r), likewise, negated for the first feature of a pair.
        pairing: "interleaved" for the pairs (x0, x1), (x2, x3), ..., or "half" for (x0, x_{r/2}), (x1, x_{r/2+1}), ...

    Returns:
        (..., n, e) in the dtype of `x`.

    Raises:
        ValueError: `pairing` is unknown.
    """
    check_choice("pairing", pairing, PAIRINGS)
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    with no_autocast(x):
        if pairing == "half":
            swapped = rotated.roll(width // 2, -1)
        else:
            swapped = rotated.reshape(*rotated.shape[:-1], width // 2, 2).flip(-1).view(rotated.shape)
        rotated = torch.addcmul(rotated * cos, swapped, sin).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)


def spread_over_pairs(x: Tensor, second: Tensor, *, pairing: str) -> Tensor:
    """Values (..., r / 2) of the first and of the second features of pairs as (..., r), in the order of `rotate`."""
    return torch.cat((x, second), dim=-1) if pairing == "half" else torch.stack((x, second), dim=-1).flatten(-2)
