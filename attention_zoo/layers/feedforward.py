"""Feedforward layers, plain and gated.

Papers: GELU, https://arxiv.org/abs/1606.08415; GLU variants, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import check_flag, check_fraction, check_has_data, check_int, check_number, check_positive


class FeedForward(nn.Module):
    """W2 gelu(W1 x).

    Args:
        dim: input and output features d.
        mult: hidden features as a multiple of dim.
        dim_inner: hidden features. Default: dim * mult, rounded down.
        dropout: dropout probability of the hidden features.
        bias: whether W1 and W2 have a bias.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `dim` or `dim_inner` is below 1, `mult` gives no hidden feature, or `dropout` is outside [0, 1).
    """

    activation: Callable[[Tensor], Tensor] = staticmethod(F.gelu)
    gated = False

    def __init__(
        self,
        dim: int,
        *,
        mult: float = 4,
        dim_inner: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_int(1, dim=dim)
        check_positive(dim_inner=dim_inner)
        check_number(mult=mult, dropout=dropout)
        check_fraction(dropout=dropout)
        check_flag(bias=bias)
        hidden = int(dim * mult) if dim_inner is None else dim_inner
        if hidden < 1:
            raise ValueError(f"mult must give at least one hidden feature, got {mult=} with {dim=}")
        self.dropout = dropout
        self.to_hidden = nn.Linear(dim, hidden, bias=bias)
        if self.gated:
            self.to_gate = nn.Linear(dim, hidden, bias=bias)
        self.to_out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        check_has_data(self, x)
        if self.gated:
            hidden = self.to_hidden(x) * self.activation(self.to_gate(x))
        else:
            hidden = self.activation(self.to_hidden(x))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return self.to_out(hidden)


class GEGLU(FeedForward):
    """W2 (W1 x * gelu(Wg x)). Args: see `FeedForward`."""

    gated = True


class SwiGLU(FeedForward):
    """W2 (W1 x * silu(Wg x)). Args: see `FeedForward`."""

    activation = staticmethod(F.silu)
    gated = True


FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {"gelu": FeedForward, "geglu": GEGLU, "swiglu": SwiGLU}
