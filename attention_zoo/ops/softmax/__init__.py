"""Softmax attention.

Papers: Attention Is All You Need, https://arxiv.org/abs/1706.03762; grouped queries, https://arxiv.org/abs/2305.13245
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from attention_zoo._checks import check_flag, check_in
from attention_zoo.ops import tiling
from attention_zoo.ops.documents import Documents, documents_of
from attention_zoo.ops.implementation import choose, flex_can_run, is_preferred
from attention_zoo.ops.softmax.bias import Bias, DistanceBias, check_bias, split_mask
from attention_zoo.ops.softmax.distance_bias import distance_biased_attention
from attention_zoo.ops.softmax.sdpa import sdpa_attention
from attention_zoo.ops.softmax.tiled import repeat_heads, tiled_attention

__all__ = [
    "Bias",
    "DistanceBias",
    "check_bias",
    "check_options",
    "check_qkv",
    "repeat_heads",
    "softmax_attention",
    "softmax_attention_weights",
    "split_mask",
]


IMPLEMENTATIONS = ("sdpa", "tiled", "flex")
MOST_PAIRS = 2**22  # pairs of each head for which "sdpa", the faster without causal masking, may hold a distance bias


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j over the allowed keys j, in at least float32 inside.

    Time O(i j e). Memory for the scores: O(i j) in "reference", O(j) in "tiled"; that of "sdpa" depends on the kernel
    that torch chooses for the arguments, and is O(h i j) with a `DistanceBias`, whose pairs are stored in the dtype of
    `q`. On the CPU "auto" is "tiled" where a bias is learned, and with a causal `DistanceBias`; on other devices it is
    "sdpa", whose number of operations does not depend on the length.

    Args:
        q: (b, h, i, e).
        k: (b, kv_h, j, e); kv_h divides h, and each key head serves h / kv_h neighbouring query heads.
        v: (b, kv_h, j, e_v).
        mask: padding (b, j), or four axes that broadcast to (b, h, i, j); boolean, True = allowed, or with four axes
            additive: added to the scores, -inf = masked; differentiable.
        causal: causal masking, aligned bottom-right: the last query attends to the last key.
        bias: broadcasts to (b, h, i, j), or a `DistanceBias`; differentiable.
        scale: factor of the scores; e^-0.5 if None.
        dropout: dropout probability of the weights. Pass 0 outside training.
        document_ids: (b, n) int, for packed rows of n = i = j tokens: a query attends to keys of its own document,
            a maximal run of equal ids; see `Documents`. Costs the sum over the documents on the CPU without `bias`.
        impl: "auto", "reference" (full score matrix, twice differentiable), "sdpa" (torch's fused kernels), "tiled"
            (query tiles, recomputed in backward: memory O(n) where `bias` is learned) or "flex" (FlexAttention: on a
            GPU memory O(n) with any bias, and time for the blocks within documents only; no dropout, and no gradients
            on the CPU). "auto" is never "flex" outside `prefer("flex")`, and there only for a `DistanceBias`.

    Returns:
        (b, h, i, e_v) in the dtype of `v`. A query without an allowed key gets exactly 0, with zero gradient.

    Raises:
        TypeError: the type or the dtype of an argument is wrong.
        ValueError: the shapes of the arguments do not fit, a number is outside its range, or `impl` is unknown.
    """
    if document_ids is not None and choose(impl, IMPLEMENTATIONS) != "flex":
        rows = partial(softmax_attention, causal=causal, bias=bias, scale=scale, dropout=dropout, impl=impl)
        documents = documents_of(document_ids, q, k)
        return documents.apply(rows, q, k, v, mask=mask, causal=causal, whole=bias is not None)
    impl = choose(impl, IMPLEMENTATIONS)
    check_qkv(q, k, v)
    mask, bias = split_mask(mask, bias, q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_options(causal, scale, dropout)
    if impl == "auto" and is_preferred("flex") and isinstance(bias, DistanceBias) and q.shape[-2] > 1:
        plain = mask is None or mask.ndim == 2
        impl = "flex" if plain and _flex_can_run(q, k, v, bias, dropout) else impl
    if impl == "auto":
        # a causal tile ends at the last key of its last query, which pays for a distance bias without gradients too
        shorter = causal and isinstance(bias, DistanceBias) and not dropout
        in_tiles = tiling.prefers_tiles(q) and q.shape[-2] > 1
        impl = "tiled" if in_tiles and (_needs_grad(bias) or shorter or _is_wide(bias, q, k)) else "sdpa"
    if impl == "flex":
        if not _flex_can_run(q, k, v, bias, dropout):
            raise ValueError(f"impl='flex' needs no dropout and no gradients on the CPU, got {dropout=}, {q.device=}")
        from attention_zoo.ops.softmax import flex

        packed = None if document_ids is None else documents_of(document_ids, q, k)
        return flex.flex_attention(q, k, v, mask, causal, bias, scale, packed)
    if impl == "sdpa":
        return sdpa_attention(q, k, v, mask, causal, bias, scale, dropout)
    if impl == "tiled" and isinstance(bias, DistanceBias) and not dropout:
        return distance_biased_attention(q, k, v, mask, causal, bias, scale)
    if impl == "tiled":
        return tiled_attention(q, k, v, mask, causal, bias, scale, dropout)
    from attention_zoo.ops.softmax import reference

    return reference.attention(q, k, v, mask, causal, bias, scale, dropout)


def softmax_attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Tensor:
    """The weights (b, h, i, j) of the values in `softmax_attention`, by the reference; all 0 without an allowed key.

    Args: see `softmax_attention`.
    """
    from attention_zoo.ops.softmax import reference

    mask, bias = split_mask(mask, bias, q, k)
    return reference.attention_weights(q, k, mask, causal, bias, q.shape[-1] ** -0.5 if scale is None else scale)


def _is_wide(bias: Bias | None, q: Tensor, k: Tensor) -> bool:
    """Whether a distance bias has so many pairs that they are not to be held at a time."""
    return isinstance(bias, DistanceBias) and not torch.compiler.is_compiling() and q.shape[2] * k.shape[2] > MOST_PAIRS


def _flex_can_run(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, dropout: float) -> bool:
    return not dropout and flex_can_run(q, k, v, bias.values if isinstance(bias, DistanceBias) else bias)


def _needs_grad(bias: Bias | None) -> bool:
    values = bias.values if isinstance(bias, DistanceBias) else bias
    return values is not None and values.requires_grad and torch.is_grad_enabled()


def check_options(causal: bool, scale: float, dropout: float) -> None:
    """Check the options of an attention operation; not in a compiled function, where they may be symbols.

    Raises:
        TypeError: `causal` is not a bool, or `scale` or `dropout` is not a number.
        ValueError: `scale` is not finite, or `dropout` is outside [0, 1].
    """
    if torch.compiler.is_compiling():
        return
    check_flag(causal=causal)
    if not isinstance(scale, float) or not math.isfinite(scale):
        check_in("(-inf, inf)", scale=scale)
    if dropout != 0.0:
        check_in("[0, 1]", dropout=dropout)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q, k and v fit each other.

    Raises:
        TypeError: q, k, v are not dense floating point tensors of one dtype.
        ValueError: a tensor is not (b, h, n, e), or device, batch, number of keys, features or heads differ.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = f"layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a dense tensor, got {kind}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (b, h, n, e), got shape {tuple(tensor.shape)}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must be of one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same number of features, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(
            f"q, k and v must share the batch, k and v their heads and length, got shapes "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of k must divide those of q, got {k.shape[1]} and {q.shape[1]}")
