"""Attention over tiles, each a group of queries that share a run of keys.

A query may be in several tiles with different keys: their outputs are merged by the log-sum-exp of the scores. Forward
saves q, k, v, the output and one number per query and head; backward recomputes every tile. On the CPU a tile is one
call of torch's flash attention kernel, which takes keys with any stride, so that nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.masks import causal_mask
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.sparse.pattern import Pattern

MIN_ROWS = 32  # minimum number of queries in a tile of image rows
TEXT_QUERIES = 64  # text queries per tile


class Tile(NamedTuple):
    """Queries that share keys.

    Attributes:
        queries: indices of the queries.
        keys: indices of the keys: a slice, or a tensor (l,) without repetition.
        allowed: (queries, keys) bool, True where a query attends to a key. None: to all of them.
        merge: an earlier tile has other keys of these queries.
    """

    queries: slice
    keys: slice | Tensor
    allowed: Tensor | None = None
    merge: bool = False


class TiledInputs(NamedTuple):
    """Inputs of a tiled operator.

    Attributes:
        q, k, v: (b, h, n, e) of one dtype.
        mask: (b, n) bool, True = a valid token; or None.
        extra: the tensor that the plan needs, or None.
        numbers: the numbers that the plan needs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    extra: Tensor | None
    numbers: Sequence[int]


# Tiles of a sequence: (number of tokens, numbers, extra, device) -> tiles. The first tile of a query has merge=False.
Plan = Callable[[int, Sequence[int], Tensor | None, torch.device], list[Tile]]


def tiled_operator(
    name: str, plan: Plan
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Sequence[int]], Tensor]:
    """Register softmax(e^-0.5 q k^T) v over the tiles of a plan as `attention_zoo::name`.

    Returns:
        A function of the fields of `TiledInputs` that returns the output (b, h, n, e).
    """

    def tiles_of(inputs: TiledInputs) -> list[Tile]:
        return plan(inputs.q.shape[2], inputs.numbers, inputs.extra, inputs.q.device)

    def backward(inputs: TiledInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        return _backward(gradients[0], inputs, outputs[0], outputs[1], tiles_of(inputs))

    operator = register_operator(
        name, TiledInputs, lambda inputs: _forward(inputs, tiles_of(inputs)), backward, _empty_outputs
    )
    return lambda *inputs: operator(TiledInputs(*inputs))[0]


def text_tiles(n: int, text_len: int, device: torch.device, *, causal: bool) -> list[Tile]:
    """Tiles of the text in a sequence of text and image: image queries attend to all of it.

    Args:
        n: number of tokens of the sequence.
        text_len: number of text tokens of the layout; the sequence has fewer where n is smaller.
        device: device of the masks.
        causal: whether text queries attend to the text up to them. If not, they attend to all tokens.
    """
    text = min(n, text_len)
    tiles = [] if causal or not text else [Tile(slice(0, text), slice(0, n))]
    for start in range(0, text if causal else 0, TEXT_QUERIES):
        stop = min(start + TEXT_QUERIES, text)
        tiles.append(Tile(slice(start, stop), slice(0, stop), causal_mask(stop - start, stop, device=device)))
    if text and n > text:
        tiles.append(Tile(slice(text, n), slice(0, text)))
    return tiles


def strip_tiles(
    n: int,
    text_len: int,
    width: int,
    pattern: Callable[[int], Pattern],
    *,
    above: int,
    below: int,
    device: torch.device,
) -> list[Tile]:
    """Tiles of the text, and of strips of image rows whose queries attend to some rows above and below them.

    Args:
        n, text_len, device: see `text_tiles`.
        width: width of the image.
        pattern: the pattern of an image with a given number of rows and no text.
        above, below: number of rows above and below a query to which it may attend.
    """
    tall = max(1, MIN_ROWS // width)
    strip = pattern(above + tall + below)  # a strip of `tall` rows that has all rows of its windows around it
    key = torch.arange((above + tall + below) * width, device=device)
    allowed = strip.attends(key[above * width : (above + tall) * width, None], key)
    tiles = text_tiles(n, text_len, device, causal=strip.is_causal)
    for first in range(text_len, n, tall * width):
        stop = min(first + tall * width, n)
        begin, end = max(text_len, first - above * width), min(stop + below * width, n)
        missing = above * width - (first - begin)  # keys that would lie above the image
        part = allowed[: stop - first, missing : missing + end - begin]
        tiles.append(Tile(slice(first, stop), slice(begin, end), part, merge=text_len > 0))
    return tiles


def _forward(inputs: TiledInputs, tiles: list[Tile]) -> Sequence[Tensor]:
    """The output (b, h, n, e) and the log-sum-exp of the scores (b, h, n)."""
    q, k, v, mask = inputs[:4]
    out, lse = _empty_outputs(inputs)
    for tile, bias in zip(tiles, _mask_biases(mask, tiles, q.dtype), strict=True):
        rows = tile.queries
        part, part_lse = _attend(q[:, :, rows], _take(k, tile.keys), _take(v, tile.keys), bias)
        if mask is not None and bias is not None:  # a query without an allowed key has no weight in a merge
            part_lse = part_lse.masked_fill((bias == -math.inf).all(-1), -math.inf)
        if tile.merge:
            _merge(out[:, :, rows], lse[:, :, rows], part, part_lse, padded=mask is not None)
        else:
            out[:, :, rows], lse[:, :, rows] = part, part_lse
    return out, lse


def _backward(gradient: Tensor, inputs: TiledInputs, out: Tensor, lse: Tensor, tiles: list[Tile]) -> Sequence[Tensor]:
    q, k, v, mask = inputs[:4]
    if mask is not None:
        lse = lse.masked_fill(lse == -math.inf, 0.0)  # without an allowed key every weight is exp(-inf - 0) = 0
    wide = at_least_float32(q[:0]).dtype
    totals = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v)]  # tiles overlap: sums in float32
    for tile, bias in zip(tiles, _mask_biases(mask, tiles, q.dtype), strict=True):
        rows, keys = tile.queries, tile.keys
        parts = _attend_backward(
            gradient[:, :, rows], q[:, :, rows], _take(k, keys), _take(v, keys), out[:, :, rows], lse[:, :, rows], bias
        )
        for total, place, part in zip(totals, (rows, keys, keys), parts, strict=True):
            if isinstance(place, slice):
                total[:, :, place] += part
            else:
                total.index_add_(2, place, part.to(wide))
    return totals


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (b, h, i, e) and log-sum-exp (b, h, i) of one tile."""
    if _has_flash(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    scores = _scores(q, k, bias)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    return ((scores - finite[..., None]).exp() @ at_least_float32(v)).to(v.dtype), lse


def _attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one tile, given the merged output and log-sum-exp of its queries."""
    if _has_flash(q):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(gradient, q, k, v, out, lse, 0.0, False, attn_mask=bias)
    weights = (_scores(q, k, bias) - lse[..., None]).exp()
    gradient, out, q, k, v = (at_least_float32(t) for t in (gradient, out, q, k, v))
    scores = weights * (gradient @ v.transpose(-1, -2) - (gradient * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ gradient


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = q.shape[-1] ** -0.5 * at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)
    return scores if bias is None else scores + bias


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, padded: bool) -> None:
    """Merge the output of a tile into that of the queries' earlier tiles, in place."""
    share = torch.sigmoid(part_lse - lse)
    if padded:
        share.nan_to_num_(nan=0.0)  # NaN: no key is allowed in either, and both outputs are 0
    out.lerp_(part, share[..., None].to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)


def _mask_biases(mask: Tensor | None, tiles: list[Tile], dtype: torch.dtype) -> Iterator[Tensor | None]:
    """The mask of each tile as a bias of its scores, 0 or -inf, (i, j) or (b, 1, i, j); None: all allowed."""
    known: dict[tuple[int, torch.Size], Tensor] = {}
    for tile in tiles:
        if mask is not None:
            valid = mask[:, None, None, tile.keys]
            queries = len(range(*tile.queries.indices(tile.queries.stop)))
            yield _mask_bias(valid.expand(-1, -1, queries, -1) if tile.allowed is None else valid & tile.allowed, dtype)
        elif tile.allowed is None:
            yield None
        else:  # most tiles of a pattern use the same part of one table
            key = tile.allowed.data_ptr(), tile.allowed.shape
            if key not in known:
                known[key] = _mask_bias(tile.allowed, dtype)
            yield known[key]


def _mask_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _take(x: Tensor, keys: slice | Tensor) -> Tensor:
    return x[:, :, keys] if isinstance(keys, slice) else x.index_select(2, keys)


def _empty_outputs(inputs: TiledInputs) -> Sequence[Tensor]:
    """Empty outputs. Heads are laid out inside tokens, as in projections, so that merging heads copies nothing."""
    b, h, n, e = inputs.q.shape
    out = inputs.q.new_empty(b, n, h, e).transpose(1, 2)
    return out, inputs.q.new_empty((b, h, n), dtype=at_least_float32(inputs.q).dtype)
