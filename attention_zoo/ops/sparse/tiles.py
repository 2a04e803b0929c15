"""Attention over a pattern made of tiles: groups of queries that share a run of keys.

A query may stand in several tiles, each pair of query and key in one at most: the parts of its softmax are merged by
their log-sum-exp. Forward keeps q, k, v, the output and one number per query; backward computes every tile again.
On the CPU a tile is torch's own flash kernel, which takes runs of keys with any stride, so that nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.precision import at_least_float32, no_autocast


class Tile(NamedTuple):
    """Queries that share keys.

    queries: where they stand in the sequence.
    keys: where their keys stand: a slice, or an index (l,) without repetition.
    seen: (queries, keys) bool, True where a query sees a key; None: it sees them all.
    more: an earlier tile holds other keys of these queries.
    """

    queries: slice
    keys: slice | Tensor
    seen: Tensor | None = None
    more: bool = False


# Makes the tiles for (tokens, numbers, extra, device): geometry as plain numbers, and a tensor where it needs one.
Plan = Callable[[int, Sequence[int], Tensor | None, torch.device], list[Tile]]
TiledOp = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Sequence[int]], tuple[Tensor, Tensor]]


def define_tiled_op(name: str, plan: Plan) -> TiledOp:
    """The custom op softmax(e^-0.5 q k^T) v over the tiles of a plan, with its backward.

    A custom op, because torch.compile would unroll the loop over tiles, and compile it again for every length.

    Args:
        name: of the op, in the namespace attention_zoo.
        plan: makes the tiles; each query has at least one, and its first is not `more`.

    Returns:
        A function of q, k, v (b, h, n, e) of one dtype; mask (b, n) bool over the keys or None; the plan's extra tensor
        or None; and its numbers. It returns the output (b, h, n, e) and the log-sum-exp of the scores (b, h, n).
    """

    @torch.library.custom_op(f"attention_zoo::{name}", mutates_args=())
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: Tensor | None, numbers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return _run_forward(q, k, v, mask, plan(q.shape[2], numbers, extra, q.device))

    @torch.library.custom_op(f"attention_zoo::{name}_backward", mutates_args=())
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        extra: Tensor | None,
        numbers: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _run_backward(grad, q, k, v, out, lse, mask, plan(q.shape[2], numbers, extra, q.device))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, extra, ctx.numbers = inputs
        ctx.save_for_backward(q, k, v, *output, mask, extra)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        with no_autocast(grad):
            return *backward(grad, *ctx.saved_tensors, ctx.numbers), None, None, None

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} has no second derivative on its fast path: compute it inside `with attention_zoo.reference():`"
        )

    def fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _like_projected(q), q.new_empty(q.shape[:3], dtype=at_least_float32(q).dtype)

    def fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _like_projected(q), _like_projected(k), _like_projected(v)

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(refuse)
    return forward


def _run_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    out = _like_projected(q)
    lse = q.new_empty(q.shape[:3], dtype=at_least_float32(q).dtype)
    with no_autocast(q):
        for tile, hidden in zip(tiles, _hidden(mask, tiles, q.dtype), strict=True):
            rows = tile.queries
            part, weight = _attend(q[:, :, rows], _take(k, tile.keys), _take(v, tile.keys), hidden)
            if mask is not None and hidden is not None:  # a query that sees none of these keys has no weight at all
                weight = weight.masked_fill((hidden == -math.inf).all(-1), -math.inf)
            if tile.more:
                _merge(out[:, :, rows], lse[:, :, rows], part, weight, padded=mask is not None)
            else:
                out[:, :, rows], lse[:, :, rows] = part, weight
    return out, lse


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    tiles: list[Tile],
) -> tuple[Tensor, Tensor, Tensor]:
    if mask is not None:
        lse = lse.masked_fill(lse == -math.inf, 0.0)  # nothing is visible: every weight is exp(-inf - 0) = 0
    wide = at_least_float32(q[:0]).dtype
    totals = tuple(_like_projected(t, dtype=wide).zero_() for t in (q, k, v))  # tiles overlap: summed in float32
    with no_autocast(q):
        for tile, hidden in zip(tiles, _hidden(mask, tiles, q.dtype), strict=True):
            rows = tile.queries
            places = (rows, tile.keys, tile.keys)
            parts = _differentiate(
                grad[:, :, rows],
                q[:, :, rows],
                _take(k, tile.keys),
                _take(v, tile.keys),
                out[:, :, rows],
                lse[:, :, rows],
                hidden,
            )
            for total, place, part in zip(totals, places, parts, strict=True):
                _add(total, place, part)
    return totals[0].to(q.dtype), totals[1].to(k.dtype), totals[2].to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """One tile's output (b, h, i, e) and log-sum-exp (b, h, i)."""
    if _has_flash(q):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found: tuple[Tensor, Tensor] = flash(q, k, v, attn_mask=hidden)
        return found
    scores = _scores(q, k, hidden)
    weight = scores.logsumexp(-1)
    safe = weight.masked_fill(weight == -math.inf, 0.0)
    part: Tensor = (scores - safe[..., None]).exp() @ at_least_float32(v)
    return part.to(v.dtype), weight


def _differentiate(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What one tile adds to the gradients of its q, k and v, given the merged output and log-sum-exp of its queries."""
    if _has_flash(q):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: tuple[Tensor, Tensor, Tensor] = flash(grad, q, k, v, out, lse, 0.0, False, attn_mask=hidden)
        return grads
    weights = (_scores(q, k, hidden) - lse[..., None]).exp()
    grad, out, q, k, v = (at_least_float32(t) for t in (grad, out, q, k, v))
    scores = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    scores: Tensor = q.shape[-1] ** -0.5 * at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)
    return scores if hidden is None else scores + hidden


def _merge(out: Tensor, lse: Tensor, part: Tensor, weight: Tensor, *, padded: bool) -> None:
    """Add a tile's keys to the queries whose other keys gave `out` and `lse`, in place."""
    share = torch.sigmoid(weight - lse)
    if padded:
        share.nan_to_num_(nan=0.0)  # NaN: neither has seen a key, and both outputs are 0
    out.lerp_(part, share[..., None].to(out.dtype))
    torch.logaddexp(lse, weight, out=lse)


def _hidden(mask: Tensor | None, tiles: list[Tile], dtype: torch.dtype) -> Iterator[Tensor | None]:
    """What is added to each tile's scores, (i, j) or (b, 1, i, j): -inf where a key is hidden; None for nothing."""
    known: dict[tuple[int, torch.Size], Tensor] = {}
    for tile in tiles:
        if mask is not None:
            real = mask[:, None, None, tile.keys]
            queries = len(range(*tile.queries.indices(tile.queries.stop)))
            seen = real.expand(-1, -1, queries, -1) if tile.seen is None else real & tile.seen
            yield _additive(seen, dtype)
        elif tile.seen is None:
            yield None
        else:  # most tiles of a pattern see the same part of one table
            key = tile.seen.data_ptr(), tile.seen.shape
            if key not in known:
                known[key] = _additive(tile.seen, dtype)
            yield known[key]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _take(x: Tensor, keys: slice | Tensor) -> Tensor:
    taken: Tensor = x[:, :, keys] if isinstance(keys, slice) else x.index_select(2, keys)
    return taken


def _add(total: Tensor, place: slice | Tensor, part: Tensor) -> None:
    if isinstance(place, slice):
        total[:, :, place] += part
    else:
        total.index_add_(2, place, part.to(total.dtype))


def _like_projected(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty (b, h, n, e) laid out as projections leave it, heads inside tokens, so that merging heads is free."""
    b, h, n, e = x.shape
    return x.new_empty(b, n, h, e, dtype=dtype).transpose(1, 2)
