"""LayerScale: a learned factor per feature on the output of a sub-layer.

Paper: Going deeper with Image Transformers, https://arxiv.org/abs/2103.17239
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_int, check_number


class LayerScale(nn.Module):
    """x * weight.

    Args:
        dim: features d.
        start: initial value of every weight.
    """

    def __init__(self, dim: int, *, start: float = 0.1) -> None:
        super().__init__()
        check_int(1, dim=dim)
        check_number(start=start)
        self.weight = nn.Parameter(torch.full((dim,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return x * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        return str(self.weight.shape[0])


def layer_scale_start(layer: int) -> float:
    """Initial value for a layer, counted from 0: smaller in deeper layers, as in the paper."""
    if layer < 18:
        return 0.1
    return 1e-5 if layer < 24 else 1e-6
