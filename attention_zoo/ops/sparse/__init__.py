"""Softmax attention under fixed sparse patterns: convolution-like, axial, block-sparse, or any table of pairs.

`pattern_attention` computes attention under any `Pattern`; the other functions build the pattern from their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attention_zoo.ops import tiling
from attention_zoo.ops.implementation import choose, flex_can_run, is_preferred
from attention_zoo.ops.masks import key_mask
from attention_zoo.ops.softmax import Bias, check_qkv, split_mask
from attention_zoo.ops.sparse.axial import AxialPattern, axial_mask
from attention_zoo.ops.sparse.block_sparse import BlockSparsePattern, block_sparse_mask, choose_blocks
from attention_zoo.ops.sparse.conv import ConvPattern, conv_mask
from attention_zoo.ops.sparse.dense import dense_attention
from attention_zoo.ops.sparse.gather import gather_attention
from attention_zoo.ops.sparse.image_layout import TextImageLayout
from attention_zoo.ops.sparse.pattern import MaskPattern, Pattern

__all__ = [
    "AxialPattern",
    "BlockSparsePattern",
    "ConvPattern",
    "MaskPattern",
    "Pattern",
    "TextImageLayout",
    "axial_attention",
    "axial_mask",
    "block_sparse_attention",
    "block_sparse_mask",
    "choose_blocks",
    "conv_attention",
    "conv_mask",
    "pattern_attention",
    "pattern_weights",
]

NEEDS = {
    "tiled": "as many queries as keys and no dropout, a pattern with tiles, equal head counts",
    "gather": "one query, a pattern with tiles, equal head counts",
    "flex": "no dropout, no gradients on the CPU",
    "folded": "as many queries as keys, rows or columns of an image, whole rows without causal masking",
}
DENSE_UP_TO = 256  # tokens, up to which the full score matrix is faster than a loop over tiles


def pattern_attention(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Bias | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T + bias) v over the keys that the pattern and the mask allow.

    Args:
        pattern: which keys a query may attend to.
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, kv_h, j, e); kv_h divides h, and each key/value head serves h / kv_h neighbouring query heads.
        mask: padding (b, j), or four axes that broadcast to (b, h, i, j); boolean or additive, see `softmax_attention`.
        bias: broadcasts to (b, h, i, j), or a `DistanceBias`.
        dropout: dropout probability of the weights. Pass 0 outside training.
        impl: "auto", "reference" (full score matrix, twice differentiable), "dense" (torch's fused kernels under the
            full mask), "tiled" (queries of the whole sequence, memory O(n); no dropout), "gather" (one query and only
            the keys of its pattern) or "folded" (rows or columns of an image as a batch, each with the text before
            it). "tiled" and "gather" need a pattern with tiles and equal head counts, and these three no bias and no
            mask of four axes. "flex" (FlexAttention, which skips masked blocks on a GPU; no dropout, no bias, no mask
            of four axes, and no gradients on the CPU) is never chosen by "auto" outside `prefer("flex")`. On devices
            other than the CPU "auto" is "folded" where it is possible and otherwise "dense": the number of operations
            does not depend on the length.

    Returns:
        (b, h, i, e). A query without an allowed key gets exactly 0, with zero gradient.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape does not fit, the sequence is longer than the pattern, or `impl` is unknown or cannot
            compute the arguments.
    """
    impl = choose(impl, ("dense", "tiled", "gather", "folded", "flex"))
    mask, bias = _check(pattern, q, k, v, mask, bias)
    i, j = q.shape[2], k.shape[2]
    plain = bias is None and (mask is None or mask.ndim == 2)
    sparse = pattern.has_tiles and plain and q.shape[1] == k.shape[1]
    # a traced branch on the length would limit an exported layer; on the CPU traced layers run tiles
    may_fold = impl == "folded" or not (torch.compiler.is_compiling() and tiling.prefers_tiles(q))
    can = {
        "tiled": sparse and i == j and not dropout,
        "gather": sparse and i == 1,
        "folded": plain and i == j and may_fold and pattern.folds(j),
        "flex": plain and not dropout and flex_can_run(q, k, v),
    }
    if impl == "auto":
        impl = _choose(pattern, q, j, can)
    if not can.get(impl, True):
        raise ValueError(
            f"{impl=} needs {NEEDS[impl]}, no bias and no mask of four axes, got q of shape {tuple(q.shape)}, "
            f"k of shape {tuple(k.shape)}, {dropout=}"
        )
    if impl == "flex":
        from attention_zoo.ops.sparse import flex

        return flex.flex_attention(pattern, q, k, v, mask)
    if impl == "tiled":
        return pattern.tiled(q, k, v, mask)
    if impl == "folded":
        return pattern.folded(q, k, v, mask, dropout)
    if impl == "gather":
        return gather_attention(pattern, q, k, v, mask, dropout)
    if impl == "dense":
        return dense_attention(pattern, q, k, v, mask, bias, dropout)
    from attention_zoo.ops.sparse import reference

    return reference.pattern_attention(q, k, v, _allowed(pattern, q, k, mask), bias, dropout)


def _choose(pattern: Pattern, q: Tensor, keys: int, can: Mapping[str, bool]) -> str:
    """The implementation by device: loops over tiles and gathered keys on the CPU, a few large operations elsewhere."""
    if is_preferred("flex") and can["flex"] and q.shape[2] > 1:
        return "flex"
    if not tiling.prefers_tiles(q):
        return "folded" if can["folded"] else "dense"
    if torch.compiler.is_compiling():  # tracing "gather" or a length limit would specialise on the position
        return "tiled" if can["tiled"] else "dense"
    if can["gather"] and keys > 1:
        return "gather"
    if can["folded"] and not pattern.has_text:  # every line after the text is slower than tiles
        return "folded"
    return "tiled" if can["tiled"] and keys > DENSE_UP_TO else "dense"


def pattern_weights(
    pattern: Pattern, q: Tensor, k: Tensor, *, mask: Tensor | None = None, bias: Bias | None = None
) -> Tensor:
    """The weights (b, h, i, j) by which `pattern_attention` multiplies the values, by the reference."""
    from attention_zoo.ops.sparse import reference

    mask, bias = _check(pattern, q, k, k, mask, bias)
    return reference.pattern_weights(q, k, _allowed(pattern, q, k, mask), bias)


def conv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TextImageLayout,
    kernel_size: int = 5,
    dilation: int = 1,
    window: str | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T) v under `conv_mask`.

    Tiled: one tile per strip of image rows, with the rows of its windows as keys, and one for the text. Time
    O(n (text + kernel_size dilation width)), memory O(n).

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, h, j, e), a prefix of the layout.
        layout, kernel_size, dilation, window, causal: see `conv_mask`.
        mask, dropout, impl: see `pattern_attention`.

    Returns:
        (b, h, i, e). A query without an allowed key gets exactly 0, with zero gradient.

    Raises:
        TypeError, ValueError: see `conv_mask` and `pattern_attention`.
    """
    pattern = ConvPattern(layout, kernel_size, dilation, window, causal)
    return pattern_attention(pattern, q, k, v, mask=mask, dropout=dropout, impl=impl)


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TextImageLayout,
    axis: str = "row",
    causal: bool = True,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T) v under `axial_mask`.

    Tiled: one tile per row or column, and one for the text, memory O(n). Folded: rows or columns as rows of a batch,
    each with a copy of the text before it, memory O(n + text height) or O(n + text width). Time O(n (text + width)) for
    rows, O(n (text + height)) for columns.

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, h, j, e), a prefix of the layout.
        layout, axis, causal: see `axial_mask`.
        mask, dropout, impl: see `pattern_attention`.

    Returns:
        (b, h, i, e). A query without an allowed key gets exactly 0, with zero gradient.

    Raises:
        TypeError, ValueError: see `axial_mask` and `pattern_attention`.
    """
    pattern = AxialPattern(layout, axis, causal)
    return pattern_attention(pattern, q, k, v, mask=mask, dropout=dropout, impl=impl)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: Tensor,
    block_size: int,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T) v under `block_sparse_mask`.

    Tiled: the blocks that all rows attend to are one tile; for each block of queries, the consecutive blocks up to its
    own are a second, and its other blocks, gathered, a third. Time proportional to the number of allowed blocks, memory
    O(n).

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, h, j, e).
        blocks, block_size, causal: see `block_sparse_mask`.
        mask, dropout, impl: see `pattern_attention`.

    Returns:
        (b, h, i, e). A query without an allowed key gets exactly 0, with zero gradient.

    Raises:
        TypeError, ValueError: see `BlockSparsePattern` and `pattern_attention`.
    """
    pattern = BlockSparsePattern(blocks, block_size, causal, len(blocks) * block_size)
    return pattern_attention(pattern, q, k, v, mask=mask, dropout=dropout, impl=impl)


def _allowed(pattern: Pattern, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The pattern and the mask as four axes that broadcast to (b, h, i, j)."""
    allowed = pattern.mask(k.shape[2] - q.shape[2], k.shape[2], q.device)[None, None]
    return allowed if mask is None else allowed & (key_mask(mask) if mask.ndim == 2 else mask)


def _check(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Bias | None
) -> tuple[Tensor | None, Bias | None]:
    """Check the arguments, and return the boolean mask and the bias."""
    check_qkv(q, k, v)
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must be the last of the tokens of k, got {q.shape[2]} queries and {k.shape[2]} keys")
    pattern.check(k.shape[2], name="k")
    return split_mask(mask, bias, q, k)
