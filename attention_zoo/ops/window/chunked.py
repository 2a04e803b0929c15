"""Window attention in chunks of queries: one batched call of softmax attention for all chunks.

A chunk of queries attends to its own chunk of keys, to the chunks within the window before it (and after it, without
causal masking), and to the sinks. Chunks are a batch axis, so that the number of launches does not depend on n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.softmax import softmax_attention
from attention_zoo.ops.window.sinks import ABSENT, Sinks

MIN_CHUNK = 64  # queries, below which kernels are inefficient
CHUNKS = 4  # chunks of a wide window: more of them compute fewer masked pairs, and copy the keys more often


class Window(NamedTuple):
    """What a query attends to, and options of the softmax.

    window, causal, scale, dropout: see `window_attention`.
    start: position of the first key in its row.
    """

    window: int
    causal: bool
    start: int
    scale: float | None
    dropout: float


def chunk_size(window: int) -> int:
    """Queries per chunk."""
    return max(MIN_CHUNK, -(-window // CHUNKS))


def keys_per_chunk(window: int, sinks: int, causal: bool) -> int:
    """Keys that a chunk of queries is compared with, sinks included."""
    size = chunk_size(window)
    return sinks + size * (1 + (1 if causal else 2) * _chunks_before(window))


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, mask: Tensor | None, options: Window
) -> Tensor:
    """All queries with all keys and sinks.

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, kv_h, j, e), consecutive tokens of the rows.
        sinks: the sinks of the rows, which may be before the keys; or None.
        mask: (b, j) bool, True = a valid token; or None.
        options: what a query attends to.
    """
    window, causal, start, scale, dropout = options
    i, j = q.shape[2], k.shape[2]
    if causal and (i == 1 or not torch.compiler.is_compiling()):
        if window >= j and (sinks is None or start == 0):  # all earlier keys are in the window, and so are all sinks
            return softmax_attention(q, k, v, mask=mask, causal=True, scale=scale, dropout=dropout)
        if i == 1 and mask is None and (sinks is None or sinks.position is None):
            k, v = k[:, :, max(j - window, 0) :], v[:, :, max(j - window, 0) :]
            if sinks is not None:
                before = max(start + j - window, 0)  # tokens before the window
                k, v = torch.cat((sinks.keys[:, :, :before], k), 2), torch.cat((sinks.values[:, :, :before], v), 2)
            return softmax_attention(q, k, v, scale=scale, dropout=dropout)
    k, v, allowed = join_sinks(q, k, v, sinks, mask, options)
    return softmax_attention(q, k, v, mask=allowed, scale=scale, dropout=dropout)


def join_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, mask: Tensor | None, options: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (b, kv_h, s + j, e) of sinks and tokens, and their mask, (b or 1, 1, i, s + j) bool.

    Arguments as in `dense_attention`. A sink in the window of a query is masked: it is among the tokens.
    """
    i, j = q.shape[2], k.shape[2]
    query = torch.arange(j - i, j, device=q.device)
    allowed = _near(query, torch.arange(j, device=q.device), options)
    allowed = allowed[None] if mask is None else allowed & mask[:, None]
    if sinks is not None:
        allowed = _cat(_far(options.start + query, sinks, options), allowed, q.shape[0])
        k, v = torch.cat((sinks.keys, k), 2), torch.cat((sinks.values, v), 2)
    return k, v, allowed[:, None]


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, mask: Tensor | None, options: Window
) -> Tensor:
    """Chunks of queries with the keys of their windows. Arguments as in `dense_attention`."""
    i, j = q.shape[2], k.shape[2]
    size, before = chunk_size(options.window), _chunks_before(options.window)
    if mask is not None or not options.causal or torch.compiler.is_compiling():
        return _masked_chunks(q, k, v, sinks, mask, options)
    # The queries that have all keys of their chunks, and all sinks before their window, share one mask.
    earlier, window = j - i, options.window
    first = max(0, before * size - earlier)
    if sinks is not None:
        first = max(first, window - 1 + sinks.keys.shape[2] - options.start - earlier)
    head = i - (i - first) // size * size if i > first else i
    # The queries before them are dense; those of the first window attend to all earlier keys, which kernels know.
    cut = min(window, head) if options.start == earlier == 0 else 0
    outs = [
        dense_attention(*_queries(q, k, v, start, stop), sinks, None, options)
        for start, stop in ((0, cut), (cut, head))
        if stop > start
    ]
    if head < i:
        allowed = _near(*_local(before, 1 + before, size, q.device), options)
        if sinks is not None:
            allowed = F.pad(allowed, (sinks.keys.shape[2], 0), value=True)
        keys = slice(earlier + head - before * size, j)
        outs.append(
            _attend(q[:, :, head:], k[:, :, keys], v[:, :, keys], sinks, allowed[None, None], size, before, options)
        )
    return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]


def _masked_chunks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, mask: Tensor | None, options: Window
) -> Tensor:
    """Chunks from the first query to the last, each with its own mask; the last one is filled with zeros."""
    batch, i, j = q.shape[0], q.shape[2], k.shape[2]
    size, before = chunk_size(options.window), _chunks_before(options.window)
    extra = before if options.causal else 2 * before
    chunks = (i + size - 1) // size + torch.compiler.is_compiling()  # a trace is specialised on an axis of size 1
    front, back = before * size - (j - i), (chunks + extra - before) * size - i
    valid = torch.ones(1, j, dtype=torch.bool, device=q.device) if mask is None else mask
    valid = _split(F.pad(valid, (front, back), value=False), size)
    valid = torch.cat([valid.narrow(1, shift, chunks) for shift in range(extra + 1)], dim=2)
    allowed = _near(*_local(before, 1 + extra, size, q.device), options) & valid[:, :, None]  # (b, chunks, size, keys)
    if sinks is not None:
        position = torch.arange(chunks * size, device=q.device) + (options.start + j - i)
        allowed = _cat(_split(_far(position, sinks, options), size), allowed, batch)
    allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    q = F.pad(q, (0, 0, 0, chunks * size - i))
    k, v = (F.pad(x, (0, 0, front, back)) for x in (k, v))
    out = _attend(q, k, v, sinks, allowed, size, extra, options)
    if torch.compiler.is_exporting():  # a slice would be guarded on whether it is contiguous
        return out.index_select(2, torch.arange(i, device=q.device))
    return out[:, :, :i]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, allowed: Tensor, size: int, extra: int, options: Window
) -> Tensor:
    """Attention of all chunks as a batch.

    Args:
        q: (b, h, c size, e).
        k, v: (b, kv_h, (c + extra) size, e); chunk a of the queries is compared with the chunks a ... a + extra.
        sinks: or None.
        allowed: broadcasts to (b c, h, size, s + (1 + extra) size).
        size: queries per chunk.
        extra: number of chunks of keys beside one.
        options: see `Window`.
    """
    chunks = q.shape[2] // size
    k = _overlapping(k, None if sinks is None else sinks.keys, chunks, size, extra)
    v = _overlapping(v, None if sinks is None else sinks.values, chunks, size, extra)
    folded = _split(q.transpose(1, 2), size).flatten(0, 1).transpose(1, 2)
    out = softmax_attention(folded, k, v, mask=allowed, scale=options.scale, dropout=options.dropout)
    return out.transpose(1, 2).unflatten(0, (q.shape[0], -1)).flatten(1, 2).transpose(1, 2)


def _overlapping(x: Tensor, sinks: Tensor | None, chunks: int, size: int, extra: int) -> Tensor:
    """Keys or values (b, kv_h, (c + extra) size, e) as those of each chunk, (b c, kv_h, s + (1 + extra) size, e)."""
    parts = _split(x.transpose(1, 2), size)
    pieces = [parts.narrow(1, shift, chunks) for shift in range(extra + 1)]  # not slices, whose symbolic size is opaque
    if sinks is not None:
        pieces.insert(0, sinks.transpose(1, 2)[:, None].expand(-1, chunks, -1, -1, -1))
    return torch.cat(pieces, dim=2).flatten(0, 1).transpose(1, 2)


def _split(x: Tensor, size: int) -> Tensor:
    """(b, c size, ...) -> (b, c, size, ...)."""
    if torch.compiler.is_exporting():  # a view would be guarded on whether c divides c size
        return x.unfold(1, size, size).movedim(-1, 2)
    return x.unflatten(1, (-1, size))


def _chunks_before(window: int) -> int:
    """Chunks of keys before the chunk of the queries that their windows reach."""
    return -((1 - window) // chunk_size(window))


def _local(before: int, chunks: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the queries and of the keys of a chunk, counted from its first key."""
    key = torch.arange(chunks * size, device=device)
    return key[before * size : (before + 1) * size], key


def _near(query: Tensor, key: Tensor, options: Window) -> Tensor:
    """(i, j) bool, True where a key is in the window of a query; by positions (i,) and (j,)."""
    distance = query[:, None] - key
    return (distance < options.window) & (distance >= (0 if options.causal else 1 - options.window))


def _far(query: Tensor, sinks: Sinks, options: Window) -> Tensor:
    """(b or 1, i, s) bool, True where a sink is outside the window of a query at a position (i,) of the row."""
    query, position = query[:, None], sinks.positions()[:, None]
    far = position <= query - options.window
    return far if options.causal else far | ((position >= query + options.window) & (position < ABSENT))


def _cat(sinks: Tensor, keys: Tensor, batch: int) -> Tensor:
    """Masks of sinks and of keys (b or 1, ..., i, s) and (b or 1, ..., i, j) concatenated."""
    if sinks.shape[0] != keys.shape[0]:
        sinks, keys = (mask.expand(batch, *mask.shape[1:]) for mask in (sinks, keys))
    return torch.cat((sinks, keys), dim=-1)


def _queries(q: Tensor, k: Tensor, v: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """The queries start ... stop - 1 of i, and the keys up to them."""
    keys = k.shape[2] - q.shape[2] + stop
    return q[:, :, start:stop], k[:, :, :keys], v[:, :, :keys]
