"""Several projections of one input as one matrix product."""

from __future__ import annotations

from torch import Tensor, nn


class Projections(nn.Linear):
    """Named projections whose outputs lie side by side: their weights are consecutive rows of one matrix.

    Args:
        dim: features d of the input.
        bias: give the projections biases.
        sizes: output features of each projection, by its name.

    Example:
        >>> to_qkv = Projections(512, q=512, k=128, v=128)
        >>> to_qkv.part("k").shape
        torch.Size([128, 512])
    """

    def __init__(self, dim: int, *, bias: bool = False, **sizes: int) -> None:
        super().__init__(dim, sum(sizes.values()), bias=bias)
        self.sizes = sizes

    def part(self, name: str, kind: str = "weight") -> Tensor:
        """The rows of `weight`, or of `bias`, that belong to one projection: a view."""
        names = list(self.sizes)
        start = sum(self.sizes[other] for other in names[: names.index(name)])
        rows: Tensor = getattr(self, kind).data
        return rows[start : start + self.sizes[name]]
