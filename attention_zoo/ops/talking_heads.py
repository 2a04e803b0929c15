"""Talking heads: the maps of all heads are mixed before the softmax and after it.

Paper: Talking-Heads Attention, https://arxiv.org/abs/2003.02436; over streams: https://arxiv.org/abs/2107.10342
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import check_mask, slice_mask, visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import check_heads, masked_softmax

QUERY_BLOCK = 64  # queries whose maps are held at a time


class HeadMLP(NamedTuple):
    """A non-linear mix of C head maps, at every pair of query and key: x + w2 gelu(w1 (x / rms_c(x) * norm)).

    norm: (C,), w1: (2 C, C), w2: (C, 2 C).
    """

    norm: Tensor
    w1: Tensor
    w2: Tensor


HeadMix = Tensor | HeadMLP | None


def mix_heads(maps: Tensor, mix: HeadMix) -> Tensor:
    """Mix the head maps (b, C, i, j): out_o = sum_c mix[o, c] maps_c, or `HeadMLP`'s formula; None leaves them."""
    if mix is None:
        return maps
    flat = maps.flatten(2)  # (b, C, i j): one small matrix product for all pairs
    if isinstance(mix, HeadMLP):
        norm, w1, w2 = (part.to(maps.dtype) for part in mix)
        unit = flat * torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + 1e-5)
        mixed = flat + w2 @ F.gelu(w1 @ (unit * norm[:, None]))
    else:
        mixed = mix.to(maps.dtype) @ flat
    return mixed.view_as(maps)


def talking_heads_weights(
    q: Tensor,
    k: Tensor,
    pre: HeadMix,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """The softmax of the scores after the mix before it, (b, C, i, j), in float32 at least."""
    with no_autocast(q):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        scores = mix_heads((at_least_float32(q) * scale) @ at_least_float32(k).transpose(-1, -2), pre)
        return masked_softmax(scores, visible(*scores.shape[-2:], mask=mask, causal=causal, device=q.device))


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: HeadMix,
    post: HeadMix,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """post(softmax(pre(scale * q k^T))) v, where `pre` and `post` mix the maps of all heads.

    Args:
        q: (b, C, i, e); C counts all heads that talk: those of one stream, or of all streams of a row.
        k, v: (b, C, j, e).
        pre, post: a mix (C, C), with out_o = sum_c mix[o, c] map_c; a `HeadMLP`; or None.
        causal: hide the keys after a query; the last query stands at the last key.
        mask: padding (b, j), or anything boolean that broadcasts to (b, C, i, j); True = visible.
        scale: e^-0.5 where None.
        dropout: probability with which a weight is dropped, between the softmax and the mix after it.
        impl: "auto", "reference" (all maps at once, twice differentiable) or "blocks" (blocks of queries, computed
            again in backward: no tensor of size C n^2 is held).

    Returns:
        (b, C, i, e) in the dtype of v. A query that sees no key gets exactly 0.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message names the argument.
    """
    impl = choose(impl, ("blocks",))
    check_heads(q, k, v)
    check_mask(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    _check_mix("pre", pre, q.shape[1])
    _check_mix("post", post, q.shape[1])
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have the heads of q, for every head talks, got {k.shape[1]} and {q.shape[1]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        return _attend(q, k, v, pre, post, mask, causal, scale, dropout, None)
    # The seed, not the dropped weights, is what backward needs to drop them again.
    seed = torch.randint(2**62, (), device="cpu") if dropout else torch.zeros((), dtype=torch.int64)
    with no_autocast(q):  # it reaches into the op, and backward, which computes the maps again, runs without it
        out: Tensor = _blocks(q, k, v, _parts(pre), _parts(post), mask, causal, scale, dropout, seed)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: HeadMix,
    post: HeadMix,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The reference: all maps of these queries at once."""
    weights = talking_heads_weights(q, k, pre, mask=mask, causal=causal, scale=scale)
    with no_autocast(q):
        if dropout:
            weights = weights * _kept(weights, dropout, generator)
        return (mix_heads(weights, post) @ at_least_float32(v)).to(v.dtype)


def _kept(weights: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """What each weight is multiplied by: 0 where it is dropped, and more than 1 where it stays."""
    drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (drawn >= dropout).to(weights.dtype) / (1 - dropout)


def _parts(mix: HeadMix) -> list[Tensor]:
    """A mix as a list of tensors, which a custom op can take: none, one or three."""
    return [] if mix is None else [mix] if isinstance(mix, Tensor) else list(mix)


def _whole(parts: Sequence[Tensor]) -> HeadMix:
    return None if not parts else parts[0] if len(parts) == 1 else HeadMLP(*parts)


# The loop over blocks is an op of its own, so that torch.compile does not unroll it anew for every length.
@torch.library.custom_op("attention_zoo::talking_heads", mutates_args=())
def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: list[Tensor],
    post: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    wide_q, wide_k, wide_v = at_least_float32(q) * scale, at_least_float32(k), at_least_float32(v)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=wide_v.dtype, device=v.device)
    rooms = _Rooms(2, q, k)
    for row, block in _all_blocks(q, k, mask, causal):
        first, second = rooms.views(block)
        keys, values = wide_k[row, :, : block.keys], wide_v[row, :, : block.keys]
        torch.bmm(wide_q[row, :, block.rows], keys.transpose(1, 2), out=first)
        scores = _mix_into(first, _whole(pre), second)
        weights = _softmax_into(scores, block, first if scores is second else second)
        if dropout:
            weights *= _kept(weights, dropout, _generator(seed, row, block, q.device))
        mixed = _mix_into(weights, _whole(post), second if weights is first else first)
        out[row, :, block.rows] = mixed @ values
    return out.to(v.dtype)


@_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: list[Tensor],
    post: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("attention_zoo::talking_heads_backward", mutates_args=())
def _blocks_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: list[Tensor],
    post: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> list[Tensor]:
    """The gradients to q, k, v and the parts of the mixes, each block computed again."""
    wide_q, wide_k, wide_v = at_least_float32(q) * scale, at_least_float32(k), at_least_float32(v)
    to_q, to_k, to_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (wide_q, wide_k, wide_v))
    to_parts = [torch.zeros(part.shape, dtype=wide_q.dtype, device=part.device) for part in (*pre, *post)]
    rooms = _Rooms(4, q, k)
    for row, block in _all_blocks(q, k, mask, causal):
        scores, weights, spare, to_maps = rooms.views(block)
        queries, g = wide_q[row, :, block.rows], at_least_float32(gradient[row, :, block.rows])
        keys, values = wide_k[row, :, : block.keys], wide_v[row, :, : block.keys]
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        before = _mix_into(scores, _whole(pre), spare)
        _softmax_into(before.clone() if before is scores else before, block, weights)
        kept = _kept(weights, dropout, _generator(seed, row, block, q.device)) if dropout else None
        dropped = weights if kept is None else weights * kept
        mixed = _mix_into(dropped, _whole(post), spare)

        to_v[row, :, : block.keys] += mixed.transpose(1, 2) @ g
        torch.bmm(g, values.transpose(1, 2), out=to_maps)
        to_weights, post_parts = _mix_backward(dropped, _whole(post), to_maps, spare)
        if kept is not None:
            to_weights = to_weights * kept
        _softmax_backward(to_weights, weights, -1, weights.dtype, grad_input=to_maps)
        to_scores, pre_parts = _mix_backward(scores, _whole(pre), to_maps, spare)
        to_q[row, :, block.rows] = (to_scores @ keys) * scale
        to_k[row, :, : block.keys] += to_scores.transpose(1, 2) @ queries
        for total, part in zip(to_parts, (*pre_parts, *post_parts), strict=True):
            total += part
    return [part.to(t.dtype) for part, t in zip((to_q, to_k, to_v, *to_parts), (q, k, v, *pre, *post), strict=True)]


def _mix_backward(maps: Tensor, mix: HeadMix, gradient: Tensor, room: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradients of mixing maps (C, i, j) to the maps, written to `room` where that helps, and to the mix."""
    if mix is None:
        return gradient, []
    x, g = maps.flatten(1), gradient.flatten(1)
    if not isinstance(mix, HeadMLP):
        torch.mm(mix.to(x.dtype).t(), g, out=room.view(x.shape))
        return room, [g @ x.t()]
    norm, w1, w2 = (part.to(x.dtype) for part in mix)
    scale = torch.rsqrt(x.square().mean(dim=0, keepdim=True) + 1e-5)
    unit = x * scale
    hidden = w1 @ (unit * norm[:, None])
    to_hidden = torch.ops.aten.gelu_backward(w2.t() @ g, hidden)
    to_normed = w1.t() @ to_hidden
    to_unit = to_normed * norm[:, None]
    to_maps = g + scale * (to_unit - unit * (to_unit * unit).mean(dim=0, keepdim=True))
    parts = [(to_normed * unit).sum(1), to_hidden @ (unit * norm[:, None]).t(), g @ F.gelu(hidden).t()]
    return to_maps.view_as(maps), parts


@_blocks_backward.register_fake
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: list[Tensor],
    post: list[Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, *pre, *post)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, pre, post, mask, causal, scale, dropout, seed = inputs
    ctx.save_for_backward(q, k, v, mask, seed, *pre, *post)
    ctx.pre = len(pre)
    ctx.settings = (causal, scale, dropout)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    q, k, v, mask, seed, *parts = ctx.saved_tensors
    with no_autocast(gradient):
        found = _blocks_backward(gradient, q, k, v, parts[: ctx.pre], parts[ctx.pre :], mask, *ctx.settings, seed)
    to_pre, to_post = found[3 : 3 + ctx.pre], found[3 + ctx.pre :]
    return *found[:3], to_pre, to_post, None, None, None, None, None


_blocks.register_autograd(_backward, setup_context=_save)


class _Block(NamedTuple):
    """Some queries of one batch row, the keys that they may see, and what hides some of those.

    rows: the queries; keys: how many keys; hidden: (1 or C, i, j) bool, or None; diagonal: whether the last keys form
    the corner of the causal triangle, which is then all that is hidden.
    """

    rows: slice
    keys: int
    hidden: Tensor | None
    diagonal: bool


def _all_blocks(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Iterator[tuple[int, _Block]]:
    i, j = q.shape[2], k.shape[2]
    diagonal = causal and mask is None and j >= i
    for row in range(q.shape[0]):
        own = mask if mask is None or mask.shape[0] == 1 else mask[row : row + 1]
        for start in range(0, i, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, i)
            keys = max(j - i + stop, 0) if causal else j  # a causal block ends at its own last key
            hidden = None
            if not diagonal:
                part = slice_mask(own, start, stop, keys)
                seen = visible(stop - start, keys, mask=part, causal=causal, device=q.device)
                hidden = None if seen is None else ~seen[0]
            yield row, _Block(slice(start, stop), keys, hidden, diagonal)


class _Rooms:
    """Storage for the maps of one block, used again for every block: fresh pages cost more than the arithmetic."""

    def __init__(self, count: int, q: Tensor, k: Tensor) -> None:
        self.heads = q.shape[1]
        size = self.heads * min(QUERY_BLOCK, q.shape[2]) * k.shape[2]
        dtype = at_least_float32(q[:0]).dtype
        self.storage = [torch.empty(size, dtype=dtype, device=q.device) for _ in range(count)]

    def views(self, block: _Block) -> list[Tensor]:
        """The rooms as maps (C, i, j)."""
        shape = (self.heads, block.rows.stop - block.rows.start, block.keys)
        return [room[: math.prod(shape)].view(shape) for room in self.storage]


def _mix_into(maps: Tensor, mix: HeadMix, room: Tensor) -> Tensor:
    """`mix_heads` of maps (C, i, j), written to `room` where that helps; no mix gives the maps themselves."""
    if mix is None:
        return maps
    if isinstance(mix, HeadMLP):
        return mix_heads(maps[None], mix)[0]
    torch.mm(mix.to(maps.dtype), maps.flatten(1), out=room.view(maps.shape[0], -1))
    return room


def _softmax_into(scores: Tensor, block: _Block, room: Tensor) -> Tensor:
    """The softmax over the keys that are not hidden, written to `room`; the scores are overwritten."""
    if block.diagonal:
        i = scores.shape[1]
        future = torch.ones(i, i, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., scores.shape[2] - i :].masked_fill_(future, -math.inf)
    elif block.hidden is not None:
        scores.masked_fill_(block.hidden, torch.finfo(scores.dtype).min)
    torch.softmax(scores, -1, out=room)
    return room if block.hidden is None else room.masked_fill_(block.hidden, 0.0)


def _softmax_backward(*args: Any, grad_input: Tensor) -> None:
    torch.ops.aten._softmax_backward_data.out(*args, grad_input=grad_input)


def _generator(seed: Tensor, row: int, block: _Block, device: torch.device) -> torch.Generator:
    """The random numbers of one block, the same in forward and backward."""
    return torch.Generator(device).manual_seed((int(seed) + 1_000_003 * row + block.rows.start) % 2**63)


def _check_mix(name: str, mix: HeadMix, heads: int) -> None:
    if mix is None:
        return
    shapes = [tuple(part.shape) for part in _parts(mix)]
    want = [(heads, heads)] if isinstance(mix, Tensor) else [(heads,), (2 * heads, heads), (heads, 2 * heads)]
    if shapes != want:
        raise ValueError(f"{name} must mix the {heads} heads with shapes {want}, got {shapes}")
