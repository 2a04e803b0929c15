"""Talking-heads attention in tiles, recomputed in backward: memory O(n).

A tile is the maps (h, r, i, j) of some queries of some batch rows, heads first. On the CPU it is small enough for the
cache; on other devices, where each operator is a kernel launch, it holds all rows and as many queries as keep the
device busy, and matrix products run in the dtype of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.precision import at_least_float32
from attention_zoo.ops.talking_heads.head_mixing import in_buffer, mix_backward, mix_into
from attention_zoo.ops.tiling import QUERY_TILE, dropout_mask, query_tiles, slice_pairs, tile_mask

CPU_NUMBERS = 2**18  # in the maps of a tile of several rows; more rows than the cache holds are slower
# In the maps of one row: an operator on them takes ten times as long as its launch, and larger tiles would only skip
# less of the masked future.
ROW_NUMBERS = 2**25
ALL_NUMBERS = 2**27  # in the maps of all rows: 512 MiB each, of which backward holds four


class TileSize(NamedTuple):
    """The choice of the implementation by device.

    Attributes:
        rows, queries: batch rows and queries of a tile.
        dtype: of the factors of matrix products with queries, keys, values and gradients. Maps are of at least float32.
    """

    rows: int
    queries: int
    dtype: torch.dtype


def tile_size(q: Tensor, k: Tensor, heads: int) -> TileSize:
    """The tiles of `heads` maps of q (b, h, i, e) and k (b, h, j, e)."""
    b, _, i, _ = q.shape
    per_query = max(heads * k.shape[2], 1)
    if q.device.type == "cpu":
        queries = min(QUERY_TILE, max(i, 1))
        return TileSize(max(CPU_NUMBERS // (queries * per_query), 1), queries, at_least_float32(q).dtype)
    numbers = min(ROW_NUMBERS, ALL_NUMBERS // max(b, 1))
    return TileSize(max(b, 1), max(numbers // per_query, QUERY_TILE), q.dtype)


class TalkingHeadsInputs(NamedTuple):
    """Inputs of the operator: see `talking_heads_attention`.

    Attributes:
        pre_softmax, post_softmax: tensors of the head mixing: none, one or three.
        bias: finite, broadcasts to (b, h, i, j), added to the mixed scores; or None.
        mask: boolean.
        seed: scalar int64 on the CPU, from `dropout_seed`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pre_softmax: list[Tensor]
    post_softmax: list[Tensor]
    bias: Tensor | None
    mask: Tensor | None
    causal: bool
    scale: float
    dropout: float
    seed: Tensor


def _forward(inputs: TalkingHeadsInputs) -> list[Tensor]:
    v = inputs.v
    out = v.new_empty(*v.shape[:2], inputs.q.shape[2], v.shape[3])
    maps = Maps(inputs.q, inputs.k, inputs.mask, inputs.causal, inputs.scale, bias=inputs.bias, heads=_heads(inputs))
    first, second = maps.buffers(2)
    for rows in maps.rows():
        values = rows.heads_first(v)
        for tile in rows.tiles():
            _, weights = softmax_maps(tile, inputs.pre_softmax, first, second, first if inputs.pre_softmax else second)
            spare = second if inputs.pre_softmax else first
            if inputs.dropout:
                weights *= _dropout_mask(inputs, tile, weights)
            mixed = mix_into(weights, inputs.post_softmax, spare)
            out[rows.index, :, tile.queries] = rows.rows_first(product(_flat(mixed), values[:, tile.keys]))
    return [out]


def _backward(inputs: TalkingHeadsInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    maps = Maps(q, k, inputs.mask, inputs.causal, inputs.scale, bias=inputs.bias, heads=_heads(inputs))
    grad_q, grad_k, grad_v = (maps.zeros(*t.shape) for t in (q, k, v))
    grad_mixes = [maps.zeros(*part.shape) for part in (*inputs.pre_softmax, *inputs.post_softmax)]
    grad_bias = None if inputs.bias is None else maps.zeros(*inputs.bias.shape)
    first, spare, third, fourth = maps.buffers(4)
    for rows in maps.rows():
        values, grad_out = rows.heads_first(v), rows.heads_first(gradients[0])
        for tile in rows.tiles():
            row, queries, keys = rows.index, tile.queries, tile.keys
            scores, weights = softmax_maps(tile, inputs.pre_softmax, first, spare, third)
            kept = _dropout_mask(inputs, tile, weights) if inputs.dropout else None
            dropped = weights if kept is None else weights * kept
            mixed = mix_into(dropped, inputs.post_softmax, spare)

            gradient = grad_out[:, queries]
            grad_v[row, :, keys] += rows.rows_first(product(_flat(mixed).transpose(1, 2), gradient))
            grad_mixed = in_buffer(fourth, *mixed.shape)
            product(gradient, values[:, keys].transpose(1, 2), _flat(grad_mixed))
            grad_weights, grad_post = mix_backward(dropped, inputs.post_softmax, grad_mixed, spare)
            if kept is not None:
                grad_weights = grad_weights * kept
            grad_maps = in_buffer(fourth, *weights.shape)
            softmax_backward(grad_weights, weights, grad_maps)
            if grad_bias is not None:
                total = _rows_of_bias(grad_bias, row, queries, keys.stop)
                total += grad_maps.transpose(0, 1).sum_to_size(total.shape)
            grad_scores, grad_pre = mix_backward(scores, inputs.pre_softmax, grad_maps, spare)
            scores_backward(rows, tile, grad_scores, grad_q, grad_k)
            for total, part in zip(grad_mixes, (*grad_pre, *grad_post), strict=True):
                total += part
    return [grad_q, grad_k, grad_v, *grad_mixes, *(() if grad_bias is None else (grad_bias,))]


def _fake(inputs: TalkingHeadsInputs) -> list[Tensor]:
    v = inputs.v
    return [v.new_empty(*v.shape[:2], inputs.q.shape[2], v.shape[3])]


def _heads(inputs: TalkingHeadsInputs) -> int:
    """The largest number of maps at a time: before, between and after the mixes."""
    between = inputs.pre_softmax[0].shape[0] if len(inputs.pre_softmax) == 1 else 0
    return max(inputs.q.shape[1], between, inputs.v.shape[1])


def _dropout_mask(inputs: TalkingHeadsInputs, tile: MapTile, weights: Tensor) -> Tensor:
    return dropout_mask(weights, inputs.dropout, inputs.seed, row=tile.row, start=tile.queries.start)


class MapTile(NamedTuple):
    """The maps (h, r, i, j) of some queries of some batch rows.

    Attributes:
        row: the first batch row.
        queries: indices of the queries.
        keys: indices of the first keys; the queries attend to no others.
        q: (h r, i, e), scaled.
        k: (h r, j, e).
        heads: number of heads h of q and k.
        masked: bool, broadcasts to (h, r, i, j), True where a key is masked; None without masked keys or with `causal`.
        causal: whether exactly the keys after each query are masked. The last query of the tile attends to all keys.
        bias: broadcasts to (h, r, i, j), or None.
    """

    row: int
    queries: slice
    keys: slice
    q: Tensor
    k: Tensor
    heads: int
    masked: Tensor | None
    causal: bool
    bias: Tensor | None


class Maps:
    """The maps of all batch rows, as tiles.

    Args:
        q: (b, h, i, e).
        k: (b, h, j, e).
        mask: boolean, see `visible`; or None.
        causal: causal masking.
        scale: factor of the scores.
        bias: broadcasts to (b, h, i, j), or None.
        heads: the largest number of maps at a time.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        *,
        bias: Tensor | None = None,
        heads: int,
    ) -> None:
        self.q, self.k, self.mask, self.causal, self.scale, self.bias = q, k, mask, causal, scale, bias
        self.heads = heads
        self.size = tile_size(q, k, heads)
        self.dtype = at_least_float32(q).dtype

    def rows(self) -> Iterator[MapRows]:
        """Groups of batch rows."""
        for start in range(0, self.q.shape[0], self.size.rows):
            yield MapRows(self, start, min(start + self.size.rows, self.q.shape[0]))

    def buffers(self, count: int) -> list[Tensor]:
        """Flat buffers for the maps of a tile, reused by all: allocating new pages costs more than the arithmetic."""
        b, _, i, _ = self.q.shape
        numbers = self.heads * min(self.size.rows, b) * min(self.size.queries, i) * self.k.shape[2]
        return [self.q.new_empty(numbers, dtype=self.dtype) for _ in range(count)]

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in at least float32."""
        return self.q.new_zeros(shape, dtype=self.dtype)


class MapRows:
    """The maps of the batch rows `start` ... `stop` - 1.

    Attributes:
        index: the rows as an index.
    """

    def __init__(self, maps: Maps, start: int, stop: int) -> None:
        self.maps = maps
        self.index = slice(start, stop)
        self.q = self.heads_first(at_least_float32(maps.q[self.index]) * maps.scale, sliced=True)
        self.k = self.heads_first(maps.k)

    def heads_first(self, x: Tensor, *, sliced: bool = False) -> Tensor:
        """These rows of x (b, h, n, e) as the factor (h r, n, e) of a matrix product; a view of one row if possible."""
        rows = x if sliced else x[self.index]
        return rows.to(self.maps.size.dtype).transpose(0, 1).flatten(0, 1)

    def rows_first(self, x: Tensor) -> Tensor:
        """(h r, n, e) -> (r, h, n, e), a view."""
        rows = self.index.stop - self.index.start
        return x.view(x.shape[0] // rows, rows, *x.shape[1:]).transpose(0, 1)

    def tiles(self) -> Iterator[MapTile]:
        """The tiles of these rows."""
        maps = self.maps
        i, j = maps.q.shape[2], maps.k.shape[2]
        only_causal = maps.causal and maps.mask is None and j >= i
        own = maps.mask if maps.mask is None or maps.mask.shape[0] == 1 else maps.mask[self.index]
        for tile in query_tiles(i, j, maps.causal, maps.size.queries):
            allowed = None if only_causal else tile_mask(tile, mask=own, causal=maps.causal, device=maps.q.device)
            bias = None if maps.bias is None else _rows_of_bias(maps.bias, self.index, tile.queries, tile.keys)
            yield MapTile(
                row=self.index.start,
                queries=tile.queries,
                keys=slice(0, tile.keys),
                q=self.q[:, tile.queries],
                k=self.k[:, : tile.keys],
                heads=maps.q.shape[1],
                masked=None if allowed is None else ~allowed.transpose(0, 1),
                causal=only_causal and i > 1,
                bias=None if bias is None else bias.transpose(0, 1),
            )


def _rows_of_bias(bias: Tensor, rows: slice, queries: slice, keys: int) -> Tensor:
    """The part of a bias (b, h, i, j) that broadcasts to the maps of a tile, a view."""
    return slice_pairs(bias[rows] if bias.shape[0] > 1 else bias, queries.start, queries.stop, keys)


def _flat(maps: Tensor) -> Tensor:
    """(h, r, i, j) -> (h r, i, j)."""
    return maps.flatten(0, 1)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The matrix products a b of (h r, n, m) and (h r, m, e), in at least float32.

    Args:
        a, b: one of them in the dtype of `TileSize`, to which the other is cast.
        out: buffer of the result in at least float32.
    """
    dtype = a.dtype if a.dtype.itemsize < b.dtype.itemsize else b.dtype
    a, b = a.to(dtype), b.to(dtype)
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    if dtype == wide:
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if a.device.type in ("cuda", "meta"):  # not rounded to half precision
        return torch.bmm(a, b, out_dtype=wide) if out is None else torch.bmm(a, b, out_dtype=wide, out=out)
    return torch.bmm(a, b).to(wide) if out is None else out.copy_(torch.bmm(a, b))


def softmax_maps(
    tile: MapTile, pre_softmax: Sequence[Tensor], scores: Tensor, spare: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(pre_softmax(q k^T) + bias) of one tile.

    Args:
        tile: the tile.
        pre_softmax: tensors of the mix.
        scores, spare, weights: flat buffers: for q k^T, overwritten, and for the result. `weights` may be the buffer of
            the scores if there is a mix, and the scores are lost then.

    Returns:
        The scores, which are lost without a mix too, and the weights.
    """
    i, j = tile.q.shape[1], tile.k.shape[1]
    maps = in_buffer(scores, tile.heads, tile.q.shape[0] // tile.heads, i, j)
    product(tile.q, tile.k.transpose(1, 2), _flat(maps))
    mixed = mix_into(maps, pre_softmax, spare)
    if tile.bias is not None:
        mixed += tile.bias
    if tile.causal:
        future = torch.ones(i, i, dtype=torch.bool, device=mixed.device).triu(1)
        mixed[..., j - i :].masked_fill_(future, -math.inf)
    elif tile.masked is not None:
        mixed.masked_fill_(tile.masked, torch.finfo(mixed.dtype).min)
    out = in_buffer(weights, *mixed.shape)
    torch.softmax(mixed, -1, out=out)
    return maps, out if tile.masked is None else out.masked_fill_(tile.masked, 0.0)


def softmax_backward(gradient: Tensor, weights: Tensor, buffer: Tensor) -> None:
    """Gradient of the scores, given that of their softmax `weights`, written to `buffer`, which may be `gradient`."""
    torch.ops.aten._softmax_backward_data.out(gradient, weights, -1, weights.dtype, grad_input=buffer)


def scores_backward(rows: MapRows, tile: MapTile, gradient: Tensor, grad_q: Tensor, grad_k: Tensor) -> None:
    """Write the gradient of the queries of a tile, and add that of its keys, given that of the scores (h, r, i, j)."""
    gradient = _flat(gradient).to(tile.q.dtype)
    grad_q[rows.index, :, tile.queries] = rows.rows_first(product(gradient, tile.k)) * rows.maps.scale
    grad_k[rows.index, :, tile.keys] += rows.rows_first(product(gradient.transpose(1, 2), tile.q))


tiled_talking_heads = register_operator(
    "talking_heads", TalkingHeadsInputs, _forward, _backward, _fake, save_outputs=False
)
