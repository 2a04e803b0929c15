"""Positions: learned position embeddings, rotary position embedding (for text and images too), biases by distance.

Papers: RoFormer, https://arxiv.org/abs/2104.09864; position interpolation, https://arxiv.org/abs/2306.15595; YaRN,
    https://arxiv.org/abs/2309.00071; xPos, https://arxiv.org/abs/2212.10554; T5, https://arxiv.org/abs/1910.10683;
    ALiBi, https://arxiv.org/abs/2108.12409
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._arguments import RecordsArguments
from attention_zoo._checks import (
    check_choice,
    check_flag,
    check_in,
    check_instance,
    check_int,
    check_number,
    check_positive,
    check_positive_number,
)
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.rotary import PAIRINGS, rotate, spread_over_pairs
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

    Attributes:
        pairing: which features are a pair; see `ops.rotate`.
        attention_factor: factor of the cosines and sines, and so of the rotated features.
        xpos: whether `decay` changes queries and keys, which needs a causal layer.
    """

    pairing: str = "interleaved"
    attention_factor: float = 1.0
    xpos: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def prepare(self, dim_head: int) -> None:
        """Prepare for heads of `dim_head` features; called by the constructor of a layer.

        Raises:
            ValueError: heads of this size cannot be rotated.
        """
        raise NotImplementedError

    def angles(self, positions: Tensor, dim_head: int) -> Tensor:
        """Angles (..., pairs) in radians at positions (...), integers."""
        raise NotImplementedError

    def table(self, start: int, stop: int, dim_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (stop - start, r) at the positions start, ..., stop - 1, as `ops.rotate` takes them."""
        if torch.compiler.is_compiling() or device.type == "meta":
            return self._build(torch.arange(start, stop, device=device), dim_head)
        cos, sin = self._tables.get((dim_head, device), (None, None))
        if cos is None or sin is None or cos.shape[0] < stop:
            with torch.inference_mode(False):  # the cached table is used outside inference mode too
                cos, sin = self._build(torch.arange(max(64, 2 * stop), device=device), dim_head)
            self._tables[dim_head, device] = cos, sin
        return cos[start:stop], sin[start:stop]

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """Rotate features (..., n, e) of tokens at the positions start, start + 1, ...; the shape is kept.

        `start` may also be the positions themselves, (b, n) int, for features (b, ..., n, e).
        """
        if isinstance(start, Tensor):
            shape = (start.shape[0], *(1,) * (x.ndim - 3), start.shape[1], -1)
            cos, sin = (table.view(shape) for table in self._build(start.long(), x.shape[-1]))
        else:
            cos, sin = self.table(start, start + x.shape[-2], x.shape[-1], x.device)
        return rotate(x, cos, sin, pairing=self.pairing)

    def decay(self, q: Tensor, k: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys (..., n, e) with a decay of their scores with the distance; here unchanged.

        `start` as in `forward`.
        """
        return q, k

    def _build(self, positions: Tensor, dim_head: int) -> tuple[Tensor, Tensor]:
        angle = self.angles(positions, dim_head)
        cos, sin = angle.cos(), angle.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return spread_over_pairs(cos, cos, pairing=self.pairing), spread_over_pairs(-sin, sin, pairing=self.pairing)


class Rotary(RotaryEmbedding):
    """Rotary position embedding with the frequencies theta^(-2p/r), optionally scaled for longer sequences.

    Args:
        dim: number r of rotated features of each head, even. Default: all of them, for heads of any size.
        theta: base of the frequencies.
        scaling: `{"type": ..., "factor": ...}`, which stretches the frequencies of a model that was trained on shorter
            sequences; `factor` is at least 1. Types and their further options:

            - "linear", position interpolation (https://arxiv.org/abs/2306.15595): all frequencies / factor.
            - "ntk", NTK-aware: theta * factor^(r / (r - 2)), so that only the lowest frequency is divided by factor.
            - "llama3": frequencies with more than `high_freq_factor` turns over `original_max_seq_len` tokens are kept,
              those with less than `low_freq_factor` divided by factor, and those between interpolated.
            - "yarn" (https://arxiv.org/abs/2309.00071): likewise with `beta_fast` (32) and `beta_slow` (1) turns over
              `original_max_seq_len` tokens, interpolated over the pairs, whose first and last are rounded outwards
              with `truncate` (True). Rotated features are multiplied by `attention_factor`, by default
              m(1) = 0.1 ln(factor) + 1, or m(mscale) / m(mscale_all_dim) where both are given, with
              m(s) = 0.1 s ln(factor) + 1.
        freqs: r / 2 frequencies in radians per token, in place of those of theta.
        pairing: "interleaved" for the pairs (x0, x1), (x2, x3), ... of rotated features, or "half" for (x0, x_{r/2}),
            (x1, x_{r/2+1}), ..., as Llama's weights in `transformers`.
        xpos: xPos (https://arxiv.org/abs/2212.10554): the products of pair p of queries and keys are multiplied by
            zeta_p^(distance / xpos_scale_base), zeta_p = (2p / r + 0.4) / 1.4, so that scores decay with the distance.
            For causal layers. Queries are multiplied by zeta_p^(position / xpos_scale_base) and keys divided by it,
            which limits the positions: with the default base to 3,116 in float16 and 31,161 in bfloat16 and float32.
            "linear" scaling divides these positions too.
        xpos_scale_base: tokens over which the products of pair p decay by zeta_p.

    Raises:
        TypeError: `dim` is not an int, `theta`, a frequency or an option of `scaling` is not a number, `scaling` is
            not a mapping, or `xpos` is not a bool.
        ValueError: `dim` is odd, `theta` or `xpos_scale_base` is not positive, a frequency is not finite, the length
            of `freqs` is not dim / 2, `pairing` is unknown, `scaling` is given with `freqs`, or its type, or an
            option, is unknown, missing or out of range, or `xpos_scale_base` is given without `xpos`.
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        freqs: Sequence[float] | None = None,
        pairing: str = "interleaved",
        xpos: bool = False,
        xpos_scale_base: float = 512.0,
    ) -> None:
        super().__init__()
        check_positive(dim=dim)
        check_positive_number(theta=theta, xpos_scale_base=xpos_scale_base)
        check_flag(xpos=xpos)
        if not xpos and xpos_scale_base != 512:
            raise ValueError(f"xpos_scale_base must be 512 without xpos, got {xpos_scale_base=}, {xpos=}")
        check_choice("pairing", pairing, PAIRINGS)
        if dim is not None and dim % 2:
            raise ValueError(f"dim must be even, features are rotated in pairs, got {dim=}")
        self.scaling = None if scaling is None else check_scaling(scaling, theta)
        if freqs is not None:
            check_instance(Sequence, freqs=freqs)
            freqs = list(freqs)
            for freq in freqs:
                check_number(freqs=freq)
            if dim != 2 * len(freqs):
                raise ValueError(f"freqs must hold dim / 2 numbers, got {dim=} and {len(freqs)} freqs")
            if scaling is not None:
                raise ValueError(f"scaling must be None with freqs, got scaling={dict(scaling)}")
        self.dim = dim
        self.theta = theta
        self.pairing = pairing
        self.xpos = xpos
        self.xpos_scale_base = xpos_scale_base
        if self.scaling is not None and self.scaling["type"] == "yarn":
            self.attention_factor = yarn_attention_factor(self.scaling)
        self._freqs: dict[int, list[float]] = {} if dim is None or freqs is None else {dim: list(freqs)}
        self._freqs_on: dict[tuple[int, torch.device], Tensor] = {}

    def prepare(self, dim_head: int) -> None:
        dim = self._rotated(dim_head)
        if dim not in self._freqs:
            self._freqs[dim] = rotary_frequencies(dim, self.theta, self.scaling)

    def angles(self, positions: Tensor, dim_head: int) -> Tensor:
        return positions[..., None].float() * self._frequencies(self._rotated(dim_head), positions.device)

    def decay(self, q: Tensor, k: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        if not self.xpos:
            return q, k
        n, dim_head = q.shape[-2:]
        dim, base = self._rotated(dim_head), self.xpos_scale_base
        if self.scaling is not None and self.scaling["type"] == "linear":
            base = base * self.scaling["factor"]
        self._check_range(start, n, base, q.dtype)
        if isinstance(start, Tensor):
            positions = start.view(start.shape[0], *(1,) * (q.ndim - 3), n)
        else:
            positions = torch.arange(start, start + n, device=q.device)
        zeta = (torch.arange(0, dim, 2, device=q.device) / dim + XPOS_GAMMA) / (1 + XPOS_GAMMA)
        scale = zeta ** (positions[..., None].float() / base)
        scale = spread_over_pairs(scale, scale, pairing=self.pairing)
        scale = nn.functional.pad(scale, (0, dim_head - dim), value=1.0)
        return (q * scale).to(q.dtype), (k / scale).to(k.dtype)

    def _check_range(self, start: int | Tensor, n: int, base: float, dtype: torch.dtype) -> None:
        """Check that the scales fit a dtype; not for tensors on other devices, where it would synchronise.

        Raises:
            ValueError: a position is too large.
        """
        on_cpu = not isinstance(start, Tensor) or start.device.type == "cpu"
        if torch.compiler.is_compiling() or not on_cpu or n == 0:
            return
        furthest = int(start.long().abs().max()) if isinstance(start, Tensor) else start + n - 1
        limit = int(base * XPOS_BITS.get(dtype, 110) * math.log(2) / math.log(1 + 1 / XPOS_GAMMA))
        if furthest > limit:
            raise ValueError(f"positions must be at most {limit} with xpos in {dtype}, got {furthest}")

    def _frequencies(self, dim: int, device: torch.device) -> Tensor:
        """The frequencies (r / 2,) on a device, where they are kept: copying them there would synchronise."""
        if torch.compiler.is_compiling() or device.type == "meta":
            return torch.tensor(self._freqs[dim], dtype=torch.float32, device=device)
        if (dim, device) not in self._freqs_on:
            with torch.inference_mode(False):
                self._freqs_on[dim, device] = torch.tensor(self._freqs[dim], dtype=torch.float32, device=device)
        return self._freqs_on[dim, device]

    def _rotated(self, dim_head: int) -> int:
        dim = dim_head // 2 * 2 if self.dim is None else self.dim
        if not 0 < dim <= dim_head:
            raise ValueError(f"rotary must rotate 2 ... dim_head features, got rotary.dim={self.dim}, {dim_head=}")
        return dim

    def extra_repr(self) -> str:
        defaults = {"scaling": None, "pairing": "interleaved", "xpos": False, "xpos_scale_base": 512}
        values = ((name, getattr(self, name)) for name in defaults)
        given = "".join(f", {name}={value!r}" for name, value in values if value != defaults[name])
        return f"dim={self.dim}, theta={self.theta}{given}"


# Options of `scaling` besides "type", by type: those that must be given, and the others with their defaults.
SCALINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "linear": (("factor",), {}),
    "ntk": (("factor",), {}),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"), {}),
    "yarn": (
        ("factor", "original_max_seq_len"),
        {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
        },
    ),
}
XPOS_GAMMA = 0.4
XPOS_BITS = {torch.float16: 11, torch.float64: 1000}  # the largest binary exponent of a scale; 110 for other dtypes
LENGTH_DEPENDENT = ("dynamic", "longrope")  # types of `transformers`


def check_scaling(scaling: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The argument `scaling` of `Rotary`, with all options of its type; those that are None have their defaults.

    Raises:
        TypeError, ValueError: see `Rotary`.
    """
    check_instance(Mapping, scaling=scaling)
    kind: Any = scaling.get("type")
    if kind in LENGTH_DEPENDENT:
        raise ValueError(
            f"scaling['type'] must not be {kind!r}, whose frequencies change with the length of the sequence, so that "
            f"cached keys would be wrong; known types: {list(SCALINGS)}"
        )
    check_choice("scaling['type']", kind, SCALINGS)
    needed, defaults = SCALINGS[kind]
    for name in scaling:
        check_choice(f"options of scaling {kind!r}", name, ("type", *needed, *defaults))
    options = {**defaults, **{name: value for name, value in scaling.items() if value is not None}}
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(f"scaling {kind!r} must have {', '.join(missing)}, got scaling={dict(scaling)}")
    for name, value in options.items():
        argument = {f"scaling[{name!r}]": value}
        if name == "truncate":
            check_flag(**argument)
        elif name == "original_max_seq_len":
            check_positive(**argument)
        elif name != "type" and value is not None:
            check_in("[1e-9, 1e9]", **argument)
    if options["factor"] < 1:
        raise ValueError(f"scaling['factor'] must be at least 1, got {options['factor']}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if high in options and options[high] <= options[low]:
            raise ValueError(f"scaling[{high!r}] must exceed scaling[{low!r}], got {options[high]} and {options[low]}")
    if kind == "yarn" and theta <= 1:
        raise ValueError(f"theta must exceed 1 with scaling 'yarn', got {theta=}")
    if kind == "yarn" and (options["mscale"] is None) != (options["mscale_all_dim"] is None):
        raise ValueError(f"scaling must have both or none of mscale and mscale_all_dim, got scaling={dict(scaling)}")
    return options


def rotary_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> list[float]:
    """dim / 2 frequencies in radians per token; `scaling` as `check_scaling` returns it.

    They are computed in float32 and in the order of rotary-embedding-torch and `transformers`, whose tables they equal.

    Raises:
        ValueError: "ntk" scaling of a single pair, which has the frequency 1 for every theta.
    """
    options = dict(scaling or {"type": None})
    kind, factor = options["type"], options.get("factor", 1.0)
    if kind == "ntk":
        if dim == 2:
            raise ValueError(f"rotary must rotate at least 4 features with scaling 'ntk', got {dim}")
        theta = theta * factor ** (dim / (dim - 2))
    index = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")  # also in a context of the meta device
    periods = theta ** (index / dim)  # in tokens per radian
    freqs = 1.0 / periods
    if kind == "linear":
        freqs = freqs / factor
    elif kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        turns = options["original_max_seq_len"] * freqs / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = (1 - kept) * freqs / factor + kept * freqs
    elif kind == "yarn":
        first, last = (
            dim * math.log(options["original_max_seq_len"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (options["beta_fast"], options["beta_slow"])
        )
        if options["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last = last + 0.001 if first == last else last
        kept = 1 - ((index / 2 - first) / (last - first)).clamp(0, 1)
        freqs = 1.0 / (factor * periods) * (1 - kept) + freqs * kept
    if not bool(freqs.isfinite().all()):
        raise ValueError(f"theta must give finite frequencies in float32, got {theta=}")
    return freqs.tolist()


def yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """The factor of rotated features; `scaling` as `check_scaling` returns it."""
    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]
    log = 0.1 * math.log(scaling["factor"])
    if scaling["mscale"] is None:
        return log + 1
    return (scaling["mscale"] * log + 1) / (scaling["mscale_all_dim"] * log + 1)


# What layers take as `rotary`: a RotaryEmbedding, True, None, or an object of rotary-embedding-torch.
RotaryArgument = RotaryEmbedding | bool | Any | None


def make_rotary(rotary: RotaryArgument, dim_head: int, *, causal: bool = True) -> RotaryEmbedding | None:
    """The rotary position embedding of a layer with heads of `dim_head` features. See `as_rotary`.

    Raises:
        TypeError, ValueError: see `as_rotary`; or heads of this size cannot be rotated, or xpos in a layer that is
            not causal.
    """
    embedding = as_rotary(rotary)
    if embedding is not None:
        embedding.prepare(dim_head)
        if embedding.xpos and not causal:
            raise ValueError(f"rotary.xpos must be False with {causal=}: scores of later keys would grow")
    return embedding


def as_rotary(rotary: RotaryArgument) -> RotaryEmbedding | None:
    """The rotary position embedding that an argument `rotary` names.

    Args:
        rotary: a `RotaryEmbedding`; True for `Rotary()`; None or False for no rotation; or a RotaryEmbedding of
            rotary-embedding-torch, whose frequencies and interpolation factor are taken over by a `Rotary`, so that
            queries and keys (b, h, n, e) are rotated as by its `rotate_queries_or_keys`, or with `use_xpos` have the
            scores of its `rotate_queries_and_keys`.

    Raises:
        TypeError: `rotary` is something else.
        ValueError: an object of rotary-embedding-torch has learned frequencies, or a table of frequencies.
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
    if rotary.learned_freq:
        raise ValueError("rotary must have learned_freq=False to be converted to attention_zoo.Rotary, got True")
    if rotary.freqs.requires_grad:
        raise ValueError("rotary.freqs must not require gradients to be converted to attention_zoo.Rotary")
    if rotary.freqs.ndim != 1:
        shape = tuple(rotary.freqs.shape)
        raise ValueError(f"rotary.freqs must be (pairs,), the same for all heads, got custom_freqs of shape {shape}")
    freqs = rotary.freqs.detach().double() / rotary.interpolate_factor
    xpos = {"xpos": True, "xpos_scale_base": rotary.scale_base * rotary.interpolate_factor} if rotary.use_xpos else {}
    return Rotary(2 * freqs.numel(), freqs=freqs.tolist(), **xpos)


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

    def angles(self, positions: Tensor, dim_head: int) -> Tensor:
        r = dim_head // 3
        pairs = r // 2
        exponent = 2 * torch.arange(pairs, dtype=torch.float32, device=positions.device) / r
        frequencies = torch.linspace(1, 5, pairs, device=positions.device) * torch.pi
        is_text = positions < self.layout.text_len
        row, column = self.layout.rows_and_columns(positions)
        text = torch.where(is_text, positions, self.IMAGE_POSITION).float()
        y = torch.where(is_text, self.TEXT_COORDINATE, _evenly(row, self.layout.height))
        x = torch.where(is_text, self.TEXT_COORDINATE, _evenly(column, self.layout.width))
        parts = (text[..., None] / self.theta**exponent, y[..., None] * frequencies, x[..., None] * frequencies)
        return torch.cat(parts, dim=-1)

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
