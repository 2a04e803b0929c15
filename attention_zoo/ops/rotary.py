"""Rotary position embedding applied: pairs of features turned by an angle that grows with the position.

Paper: RoFormer, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops.precision import no_autocast


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved pairs (x0, x1), (x2, x3), ... of the first features of `x`; the rest stays.

    Args:
        x: (..., n, e).
        cos: (n, r), each value standing twice, once for either member of its pair; r <= e.
        sin: (n, r), likewise, negative for the first member: (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin).

    Returns:
        (..., n, e) in the dtype of `x`.
    """
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    with no_autocast(x):
        swapped = turned.reshape(*turned.shape[:-1], width // 2, 2).flip(-1).view(turned.shape)
        turned = torch.addcmul(turned * cos, swapped, sin).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
