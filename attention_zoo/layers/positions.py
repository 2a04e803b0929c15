"""Positions: learned position embeddings, rotary position embedding (for text and images too), biases by distance.

Papers: RoFormer, https://arxiv.org/abs/2104.09864; T5, https://arxiv.org/abs/1910.10683; ALiBi,
    https://arxiv.org/abs/2108.12409
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._arguments import RecordsArguments
from attention_zoo._checks import (
    check_flag,
    check_instance,
    check_int,
    check_number,
    check_positive,
    check_positive_number,
)
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.rotary import rotate
from attention_zoo.ops.softmax import DistanceBias
from attention_zoo.ops.sparse import TextImageLayout


class LearnedPositions(nn.Module):
    """One learned vector per position. Positions count the valid tokens only.

    Args:
        max_seq_len: number of positions.
        dim: features d.
    """

    def __init__(self, max_seq_len: int, dim: int) -> None:
        super().__init__()
        check_int(1, max_seq_len=max_seq_len, dim=dim)
        self.weight = nn.Parameter(torch.empty(max_seq_len, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, count: Tensor) -> Tensor:
        """Position embeddings of tokens.

        Args:
            count: (b, n) int, the number of valid tokens up to and including each token; 0 for padding before them.

        Returns:
            (b, n, d).
        """
        return nn.functional.embedding((count - 1).clamp(min=0), self.weight)


class RotaryEmbedding(RecordsArguments, nn.Module):
    """Base class of rotary position embeddings. A subclass defines the angles.

    The table of cosines and sines is neither parameter nor buffer, so that casting a model does not cast it and meta
    construction does not empty it. It is float32, computed from integer positions, cached per device and head size,
    and grows by doubling.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def prepare(self, dim_head: int) -> None:
        """Prepare for heads of `dim_head` features; called by the constructor of a layer.

        Raises:
            ValueError: heads of this size cannot be rotated.
        """
        raise NotImplementedError

    def angles(self, start: int, stop: int, dim_head: int, device: torch.device) -> Tensor:
        """Angles (stop - start, pairs) in radians at the positions start, ..., stop - 1."""
        raise NotImplementedError

    def table(self, start: int, stop: int, dim_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (stop - start, r) at the positions start, ..., stop - 1, as `ops.rotate` takes them."""
        if torch.compiler.is_compiling() or device.type == "meta":
            return self._build(start, stop, dim_head, device)
        cos, sin = self._tables.get((dim_head, device), (None, None))
        if cos is None or sin is None or cos.shape[0] < stop:
            with torch.inference_mode(False):  # the cached table is used outside inference mode too
                cos, sin = self._build(0, max(64, 2 * stop), dim_head, device)
            self._tables[dim_head, device] = cos, sin
        return cos[start:stop], sin[start:stop]

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """Rotate features (..., n, e) of tokens at the positions start, start + 1, ...; the shape is kept.

        `start` may also be the positions themselves, (b, n) int below n, for features (b, ..., n, e).
        """
        if isinstance(start, Tensor):
            tables = self.table(0, x.shape[-2], x.shape[-1], x.device)
            shape = (start.shape[0], *(1,) * (x.ndim - 3), start.shape[1], -1)
            return rotate(x, *(table[start].view(shape) for table in tables))
        return rotate(x, *self.table(start, start + x.shape[-2], x.shape[-1], x.device))

    def _build(self, start: int, stop: int, dim_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angle = self.angles(start, stop, dim_head, device)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


class Rotary(RotaryEmbedding):
    """Rotary position embedding with interleaved pairs and the frequencies theta^(-2p/r) of rotary-embedding-torch.

    Args:
        dim: number r of rotated features of each head, even. Default: all of them, for heads of any size.
        theta: base of the frequencies.
        freqs: r / 2 frequencies in radians per token, in place of those of theta.

    Raises:
        TypeError: `dim` is not an int, or `theta` or a frequency is not a number.
        ValueError: `dim` is odd, `theta` is not positive, a frequency is not finite, or the length of `freqs` is not
            dim / 2.
    """

    def __init__(self, dim: int | None = None, *, theta: float = 10000.0, freqs: Sequence[float] | None = None) -> None:
        super().__init__()
        check_positive(dim=dim)
        check_positive_number(theta=theta)
        if dim is not None and dim % 2:
            raise ValueError(f"dim must be even, features are rotated in pairs, got {dim=}")
        if freqs is not None:
            freqs = list(freqs)
            for freq in freqs:
                check_number(freqs=freq)
            if dim != 2 * len(freqs):
                raise ValueError(f"freqs must hold dim / 2 numbers, got {dim=} and {len(freqs)} freqs")
        self.dim = dim
        self.theta = theta
        self._freqs: dict[int, list[float]] = {} if dim is None or freqs is None else {dim: list(freqs)}

    def prepare(self, dim_head: int) -> None:
        dim = self._rotated(dim_head)
        if dim not in self._freqs:
            import rotary_embedding_torch as upstream  # imports einx, which takes a second

            with torch.device("cpu"):  # also when the model is constructed on the meta device
                # The package returns no frequency for a single pair; it is theta^0.
                # cache_max_seq_len: the package allocates its cache at once
                embedding = upstream.RotaryEmbedding(dim, theta=self.theta, cache_max_seq_len=1)
                self._freqs[dim] = [1.0] if dim == 2 else embedding.freqs.tolist()

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


# What layers take as `rotary`: a RotaryEmbedding, True, None, or an object of rotary-embedding-torch.
RotaryArgument = RotaryEmbedding | bool | Any | None


def make_rotary(rotary: RotaryArgument, dim_head: int) -> RotaryEmbedding | None:
    """The rotary position embedding of a layer with heads of `dim_head` features. See `as_rotary`.

    Raises:
        TypeError, ValueError: see `as_rotary`; or heads of this size cannot be rotated.
    """
    embedding = as_rotary(rotary)
    if embedding is not None:
        embedding.prepare(dim_head)
    return embedding


def as_rotary(rotary: RotaryArgument) -> RotaryEmbedding | None:
    """The rotary position embedding that an argument `rotary` names.

    Args:
        rotary: a `RotaryEmbedding`; True for `Rotary()`; None or False for no rotation; or a RotaryEmbedding of
            rotary-embedding-torch, whose frequencies and interpolation factor are taken over by a `Rotary`, so that
            queries and keys (b, h, n, e) are rotated as by its `rotate_queries_or_keys`.

    Raises:
        TypeError: `rotary` is something else.
        ValueError: an object of rotary-embedding-torch has learned frequencies, xpos, or a table of frequencies.
    """
    if rotary is None or rotary is False:
        return None
    if rotary is True:
        rotary = Rotary()
    upstream = sys.modules.get("rotary_embedding_torch")  # imported already if `rotary` is one of its objects
    if upstream is not None and type(rotary) is upstream.RotaryEmbedding:
        rotary = _convert_rotary(rotary)
    if not isinstance(rotary, RotaryEmbedding):
        raise TypeError(
            "rotary must be a RotaryEmbedding of attention_zoo or of rotary_embedding_torch, True or None, got "
            f"{type(rotary).__module__}.{type(rotary).__qualname__}"
        )
    return rotary


def _convert_rotary(rotary: Any) -> Rotary:
    """A `Rotary` with the angles of a RotaryEmbedding of rotary-embedding-torch."""
    for name in ("learned_freq", "use_xpos"):
        if getattr(rotary, name):
            raise ValueError(f"rotary must have {name}=False to be converted to attention_zoo.Rotary, got {name}=True")
    if rotary.freqs.requires_grad:
        raise ValueError("rotary.freqs must not require gradients to be converted to attention_zoo.Rotary")
    if rotary.freqs.ndim != 1:
        shape = tuple(rotary.freqs.shape)
        raise ValueError(f"rotary.freqs must be (pairs,), the same for all heads, got custom_freqs of shape {shape}")
    freqs = rotary.freqs.detach().double() / rotary.interpolate_factor
    return Rotary(2 * freqs.numel(), freqs=freqs.tolist())


class TextImageRotary(RotaryEmbedding):
    """Rotary position embedding for text followed by an image: a third of the features each for text, row and column.

    With r = floor(dim_head / 3), each third rotates floor(r / 2) pairs; the remaining features are not rotated. Text
    tokens at position p have the angles p * theta^(-2k/r), and all image tokens those of p = 8192. Rows and columns
    are spaced evenly on [-1, 1] and have the angles pi * position * linspace(1, 5), and text tokens those of -10.

    Args:
        layout: number of text tokens and size of the image.
        theta: base of the frequencies of the text positions.
    """

    IMAGE_POSITION = 8192  # text position of all image tokens
    TEXT_COORDINATE = -10.0  # row and column of all text tokens

    def __init__(self, layout: TextImageLayout, *, theta: float = 10000.0) -> None:
        super().__init__()
        check_instance(TextImageLayout, layout=layout)
        check_positive_number(theta=theta)
        self.layout = layout
        self.theta = theta

    def prepare(self, dim_head: int) -> None:
        if dim_head < 6:
            raise ValueError(f"dim_head must be at least 6, a pair each for text, rows and columns, got {dim_head=}")

    def angles(self, start: int, stop: int, dim_head: int, device: torch.device) -> Tensor:
        r = dim_head // 3
        pairs = r // 2
        exponent = 2 * torch.arange(pairs, dtype=torch.float32, device=device) / r
        frequencies = torch.linspace(1, 5, pairs, device=device) * torch.pi
        index = torch.arange(start, stop, device=device)
        is_text = index < self.layout.text_len
        row, column = self.layout.rows_and_columns(start, stop, device=device)
        text = torch.where(is_text, index, self.IMAGE_POSITION).float()
        y = torch.where(is_text, self.TEXT_COORDINATE, _evenly(row, self.layout.height))
        x = torch.where(is_text, self.TEXT_COORDINATE, _evenly(column, self.layout.width))
        return torch.cat(
            (text[:, None] / self.theta**exponent, y[:, None] * frequencies, x[:, None] * frequencies), dim=-1
        )

    def extra_repr(self) -> str:
        return f"{self.layout}, theta={self.theta}"


def _evenly(index: Tensor, count: int) -> Tensor:
    """0, ..., count - 1 spaced evenly on [-1, 1]."""
    return 2 * index.float() / max(count - 1, 1) - 1


class RelativeBias(RecordsArguments, nn.Module):
    """T5's relative position bias: one learned number per head and bucket of distances, in logarithmic buckets.

    Args:
        heads: number of heads h of the layers that share it.
        buckets: number of buckets.
        max_distance: distance from which on all distances share the last bucket.
        causal: whether all buckets are for keys up to the query. False: half of them are for keys after it.

    Raises:
        TypeError: a size is not an int, or `causal` is not a bool.
        ValueError: a size is below 1, or `max_distance` is not above the number of distances that have a bucket each.
    """

    def __init__(self, heads: int, *, buckets: int = 32, max_distance: int = 128, causal: bool = True) -> None:
        super().__init__()
        check_int(1, heads=heads, buckets=buckets, max_distance=max_distance)
        check_flag(causal=causal)
        exact = buckets // 2 if causal else buckets // 4
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"max_distance must exceed the number of distances with their own bucket, got {max_distance=} with "
                f"{buckets=} and {causal=}, which gives {exact}"
            )
        self.heads = heads
        self.max_distance = max_distance
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.weight, std=0.02)

    def check_heads(self, heads: int) -> None:
        """Check that a layer has as many heads as this bias.

        Raises:
            ValueError: it has another number of heads.
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
        # The logarithm of at least 1: the branch that torch.where does not select must stay finite.
        ratio = (n.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(n < exact, n, wide)

    def forward(self, queries: int, keys: int, device: torch.device) -> DistanceBias:
        """The bias (h, queries + keys - 1) per distance; the last query is at the position of the last key."""
        distance = torch.arange(1 - keys, queries, device=device)
        # float32, in which the gradients of all distances of a bucket are summed
        return DistanceBias(at_least_float32(self.weight)[self.bucket(distance)].t())

    def extra_repr(self) -> str:
        return f"heads={self.heads}, buckets={self.weight.shape[0]}, max_distance={self.max_distance}"


class ALiBi(RecordsArguments, nn.Module):
    """Attention with linear biases: -m_h |i - j| is added to the scores of head h. No parameters.

    The slopes m_h are 2^(-8 / h), 2^(-16 / h), ..., 2^-8 for a power of two of heads. For other numbers they are those
    of the next smaller power of two, and every second slope of the next larger one, as in the authors' code.

    Paper: Train Short, Test Long, https://arxiv.org/abs/2108.12409

    Args:
        heads: number of heads h.

    Example:
        >>> layer = FullAttention(512, bias=ALiBi(8))
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        check_int(1, heads=heads)
        self.heads = heads
        self.slopes = _alibi_slopes(heads)

    def check_heads(self, heads: int) -> None:
        """Check that a layer has as many heads as this bias.

        Raises:
            ValueError: it has another number of heads.
        """
        if heads != self.heads:
            raise ValueError(f"bias must have one slope per head, got {self.heads} slopes and {heads=}")

    def forward(self, queries: int, keys: int, device: torch.device) -> DistanceBias:
        """The bias (h, queries + keys - 1) per distance; the last query is at the position of the last key."""
        distance = torch.arange(1 - keys, queries, dtype=torch.float32, device=device)
        return DistanceBias(torch.tensor(self.slopes, device=device)[:, None] * -distance.abs())

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def _alibi_slopes(heads: int) -> list[float]:
    """The slopes of `ALiBi`."""
    power = 1 << heads.bit_length() - 1  # the largest power of two up to `heads`
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * (heads - power), 2)]
