"""Where a token stands: learned positions, rotary embedding (of images behind text too), T5's relative bias.

Papers: RoFormer, https://arxiv.org/abs/2104.09864; T5, https://arxiv.org/abs/1910.10683
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_positive
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.rotary import rotate
from attention_zoo.ops.softmax import DistanceBias
from attention_zoo.ops.sparse.image_layout import TextImageLayout


class LearnedPositions(nn.Module):
    """One learned vector per position, counted over real tokens: padding takes no position.

    Args:
        max_seq_len: positions in the table.
        dim: features d.
    """

    def __init__(self, max_seq_len: int, dim: int) -> None:
        super().__init__()
        check_positive(max_seq_len=max_seq_len, dim=dim)
        self.weight = nn.Parameter(torch.empty(max_seq_len, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, count: Tensor) -> Tensor:
        """The vectors of tokens that are the `count`-th real ones, counted from 1; padding before them has 0.

        Args:
            count: (b, n) int.

        Returns:
            (b, n, d).
        """
        return nn.functional.embedding((count - 1).clamp(min=0), self.weight)


class RotaryEmbedding(nn.Module):
    """Features turned in pairs by an angle per position; a subclass says by which.

    The table is neither parameter nor buffer: casting a model must not cast it, and meta construction must not empty
    it. It is float32, built from integer positions, kept per device, and grows by doubling.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def prepare(self, dim_head: int) -> None:
        """Get ready for heads of `dim_head` features; a block that is given this part calls it when it is built.

        Raises:
            ValueError: such heads cannot be rotated.
        """
        raise TypeError(f"{type(self).__name__} must define prepare")

    def angles(self, start: int, stop: int, dim_head: int, device: torch.device) -> Tensor:
        """By how much each pair of features of the tokens start ... stop - 1 turns: (stop - start, pairs)."""
        raise TypeError(f"{type(self).__name__} must define angles")

    def table(self, start: int, stop: int, dim_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions start ... stop - 1 as `ops.rotate` wants them, (stop - start, r) each."""
        if torch.compiler.is_compiling() or device.type == "meta":
            return self._build(start, stop, dim_head, device)
        cos, sin = self._tables.get((dim_head, device), (None, None))
        if cos is None or sin is None or cos.shape[0] < stop:
            with torch.inference_mode(False):  # the table outlives the mode it was first asked for in
                cos, sin = self._build(0, max(64, 2 * stop), dim_head, device)
            self._tables[dim_head, device] = cos, sin
        return cos[start:stop], sin[start:stop]

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate the heads' features of tokens that stand at start, start + 1, ...

        Args:
            x: (b, h, n, e).

        Returns:
            (b, h, n, e).
        """
        return rotate(x, *self.table(start, start + x.shape[-2], x.shape[-1], x.device))

    def _build(self, start: int, stop: int, dim_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angle = self.angles(start, stop, dim_head, device)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


class Rotary(RotaryEmbedding):
    """Rotary position embedding, interleaved pairs, frequencies theta^(-2p/r) as rotary-embedding-torch has them.

    Args:
        dim: features r of each head that are rotated, even. None: all of them, whatever the head's size.
        theta: the base of the frequencies.
        freqs: r / 2 frequencies in radians per token in place of theta's.

    Raises:
        ValueError: dim is odd, or freqs has another length than dim / 2.
    """

    def __init__(self, dim: int | None = None, *, theta: float = 10000.0, freqs: list[float] | None = None) -> None:
        super().__init__()
        check_positive(dim=dim)
        if dim is not None and dim % 2:
            raise ValueError(f"dim must be even, features are rotated in pairs, got {dim=}")
        if freqs is not None and dim != 2 * len(freqs):
            raise ValueError(f"freqs must hold dim / 2 numbers, got {dim=} and {len(freqs)} freqs")
        self.dim = dim
        self.theta = theta
        self._freqs = {} if dim is None or freqs is None else {dim: freqs}

    def prepare(self, dim_head: int) -> None:
        dim = self._rotated(dim_head)
        if dim not in self._freqs:
            import rotary_embedding_torch as upstream  # imports einx, which takes a second

            with torch.device("cpu"):  # also where the model is being built on the meta device
                # of a single pair the package knows no frequency: it is theta^0
                self._freqs[dim] = [1.0] if dim == 2 else upstream.RotaryEmbedding(dim, theta=self.theta).freqs.tolist()

    def angles(self, start: int, stop: int, dim_head: int, device: torch.device) -> Tensor:
        freqs = torch.tensor(self._freqs[self._rotated(dim_head)], dtype=torch.float32, device=device)
        return torch.arange(start, stop, dtype=torch.float32, device=device)[:, None] * freqs

    def _rotated(self, dim_head: int) -> int:
        dim = dim_head // 2 * 2 if self.dim is None else self.dim
        if not 0 < dim <= dim_head:
            raise ValueError(f"rotary must rotate 2 ... dim_head features, got rotary.dim={self.dim}, {dim_head=}")
        return dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, theta={self.theta}"


class TextImageRotary(RotaryEmbedding):
    """Rotary position embedding for text and an image: a third of a head's features each for position, row, column.

    With r = floor(dim_head / 3), each part turns floor(r / 2) pairs, and what is left over stays. Text turns by
    p * theta^(-2k/r), image tokens all standing at p = 8192; rows and columns stand evenly on -1 ... 1 and turn by
    pi * pos * linspace(1, 5), text tokens standing at -10.

    Args:
        layout: the sequence.
        theta: the base of the frequencies of text.
    """

    FAR = 8192  # where the image stands among text positions
    OUTSIDE = -10.0  # where text stands among rows and columns

    def __init__(self, layout: TextImageLayout, *, theta: float = 10000.0) -> None:
        super().__init__()
        self.layout = layout
        self.theta = theta

    def prepare(self, dim_head: int) -> None:
        if dim_head < 6:
            raise ValueError(f"dim_head must be at least 6, a pair each for text, rows and columns, got {dim_head=}")

    def angles(self, start: int, stop: int, dim_head: int, device: torch.device) -> Tensor:
        r = dim_head // 3
        pairs = r // 2
        exponent = 2 * torch.arange(pairs, dtype=torch.float32, device=device) / r
        turns = torch.linspace(1, 5, pairs, device=device) * torch.pi
        index = torch.arange(start, stop, device=device)
        is_text = index < self.layout.text_len
        row, column = self.layout.rows_and_columns(start, stop, device=device)
        text = torch.where(is_text, index, self.FAR).float()
        y = torch.where(is_text, self.OUTSIDE, _evenly(row, self.layout.height))
        x = torch.where(is_text, self.OUTSIDE, _evenly(column, self.layout.width))
        return torch.cat((text[:, None] / self.theta**exponent, y[:, None] * turns, x[:, None] * turns), dim=-1)

    def extra_repr(self) -> str:
        return f"{self.layout}, theta={self.theta}"


def _evenly(index: Tensor, count: int) -> Tensor:
    """0 ... count - 1 spread evenly over -1 ... 1."""
    return 2 * index.float() / max(count - 1, 1) - 1


class RelativeBias(nn.Module):
    """T5's bias: one learned number per head and bucket of distances; buckets widen logarithmically.

    Args:
        heads: heads h of the blocks that share it.
        buckets: rows of the table.
        max_distance: distances from here on share the last bucket.
        causal: keys never stand after their query, so all buckets serve the past; otherwise half serve either side.
    """

    def __init__(self, heads: int, *, buckets: int = 32, max_distance: int = 128, causal: bool = True) -> None:
        super().__init__()
        check_positive(heads=heads, buckets=buckets, max_distance=max_distance)
        exact = buckets // 2 if causal else buckets // 4
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"max_distance must exceed the distances with a bucket of their own, got {max_distance=} with "
                f"{buckets=} and {causal=}, which gives {exact} of them"
            )
        self.heads = heads
        self.max_distance = max_distance
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.weight, std=0.02)

    def check_heads(self, heads: int) -> None:
        """Refuse a block with another number of heads.

        Raises:
            ValueError: it has.
        """
        if heads != self.heads:
            raise ValueError(f"bias must have one column per head, got {self.heads} columns and {heads=}")

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance, key position - query position."""
        buckets = self.weight.shape[0]
        offset = torch.zeros_like(distance)
        if self.causal:
            n = (-distance).clamp(min=0)
        else:
            buckets //= 2
            offset = (distance > 0) * buckets
            n = distance.abs()
        exact = buckets // 2
        # log of at least 1, for the branch that torch.where throws away must stay finite
        ratio = (n.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(n < exact, n, wide)

    def forward(self, queries: int, keys: int, device: torch.device) -> DistanceBias:
        """The bias of `queries` that stand at the end of `keys`, per distance: (h, queries + keys - 1)."""
        distance = torch.arange(1 - keys, queries, device=device)
        # float32, so that the gradients of all distances in a bucket are summed in it
        return DistanceBias(at_least_float32(self.weight)[self.bucket(distance)].t())

    def extra_repr(self) -> str:
        return f"heads={self.heads}, buckets={self.weight.shape[0]}, max_distance={self.max_distance}"
