"""Attention under a pattern by FlexAttention, which skips the blocks of scores that the pattern masks."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from attention_zoo.ops.flex import MaskMod, block_mask_of, hide_pairs, run_flex
from attention_zoo.ops.sparse.axial import AxialPattern
from attention_zoo.ops.sparse.dense import remember
from attention_zoo.ops.sparse.image_layout import TextImageLayout
from attention_zoo.ops.sparse.pattern import Pattern


def flex_attention(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Arguments as in `pattern_attention`; `mask` is (b, j) or None."""
    i, j = q.shape[2], k.shape[2]
    if isinstance(pattern, AxialPattern) and pattern.axis == "column" and i == j and pattern.folds(j):
        return _attend_to_columns(pattern, q, k, v, mask)
    return run_flex(q, k, v, hide_pairs(mask), block_mask(pattern, i, j, q.device), q.shape[-1] ** -0.5)


def mask_mod(pattern: Pattern, start: int = 0) -> MaskMod:
    """Whether the query `start` + query attends to a key, as FlexAttention asks for it."""
    return lambda b, h, query, key: pattern.attends(query + start, key)


def block_mask(pattern: Pattern, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The block mask of the last queries of a sequence, kept for whole sequences."""
    pattern = pattern.to(device)

    def make() -> BlockMask:
        return block_mask_of(mask_mod(pattern, keys - queries), queries, keys, device)

    if queries != keys or torch.compiler.is_compiling():
        return make()
    return remember(pattern, ("block mask", keys, device), make)


def _attend_to_columns(pattern: AxialPattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Columns as the rows of the transposed image: in raster order every block of keys holds a part of each column."""
    text, width, n = pattern.layout.text_len, pattern.layout.width, q.shape[2]
    height = -(-(n - text) // width)
    padding = text + height * width - n  # the rest of the last row, which causal queries do not attend to

    def transpose(x: Tensor) -> Tensor:
        image = F.pad(x[:, :, text:], (0, 0, 0, padding)) if padding else x[:, :, text:]
        return torch.cat((x[:, :, :text], rearrange(image, "b h (r c) e -> b h (c r) e", c=width)), dim=2)

    rows = AxialPattern(TextImageLayout(text, width, height), "row", pattern.causal)
    keys = None if mask is None else transpose(mask[:, None, :, None])[:, 0, :, 0]
    out = flex_attention(rows, transpose(q), transpose(k), transpose(v), keys)
    image = rearrange(out[:, :, text:], "b h (c r) e -> b h (r c) e", c=width)
    return torch.cat((out[:, :, :text], image), dim=2)[:, :, :n]
