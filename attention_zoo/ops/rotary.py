"""Rotary position embedding: pairs of features are rotated by an angle proportional to the position.

Paper: RoFormer, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops.precision import no_autocast


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ... of the first r features of `x`; the others are unchanged.

    Args:
        x: (..., n, e).
        cos: (..., n, r), r <= e; the value of a pair is repeated for both of its features.
        sin: (..., n, r), likewise, negated for the first feature: (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).

    Returns:
        (..., n, e) in the dtype of `x`.
    """
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    with no_autocast(x):
        swapped = rotated.reshape(*rotated.shape[:-1], width // 2, 2).flip(-1).view(rotated.shape)
        rotated = torch.addcmul(rotated * cos, swapped, sin).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)
