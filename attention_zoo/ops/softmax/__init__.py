"""Softmax attention: the reference, torch's fused kernels, and blocks of queries where a bias learns.

Papers: Attention Is All You Need, https://arxiv.org/abs/1706.03762; grouped queries, https://arxiv.org/abs/2305.13245
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import check_mask, key_mask, visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax.distance_bias import distance_biased_attention
from attention_zoo.ops.tiling import masked_softmax, slice_mask

QUERY_BLOCK = 128  # queries whose scores are held at a time where a bias learns


class DistanceBias(NamedTuple):
    """A bias that depends on the distance from query to key alone, held per distance and not per pair.

    values: (h, i + j - 1), for the distances key - query = -(j - 1) ... i - 1 counted from the bottom-right corner:
        entry d belongs to all pairs with (key index) - (query index) + i - 1 = d, both counted from 0.
    """

    values: Tensor

    def pairs(self, queries: int, keys: int) -> Tensor:
        """The bias of every pair, (h, queries, keys), each row one key to the left of the row before it.

        In at least float32, in which the gradients of all pairs of a distance can be summed.
        """
        return at_least_float32(self.values).unfold(-1, keys, 1).flip(-2)

    def rows(self, start: int, stop: int, queries: int, keys: int) -> DistanceBias:
        """The same bias for the queries `start` to `stop` and the first `keys` keys."""
        return DistanceBias(self.values[:, queries - stop : queries - start - 1 + keys])


Bias = Tensor | DistanceBias


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
    impl: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T + bias) v over the visible keys, in float32 at least inside.

    Args:
        q: (b, h, i, e).
        k: (b, kv_h, j, e); kv_h divides h, and each key head serves h / kv_h neighbouring query heads.
        v: (b, kv_h, j, e_v).
        mask: padding (b, j), or anything boolean that broadcasts to (b, h, i, j); True = visible.
        causal: hide the keys after a query; the last query stands at the last key.
        bias: broadcasts to (b, h, i, j), or a `DistanceBias`; it gets gradients where it asks for them.
        scale: e^-0.5 where None.
        dropout: probability with which a weight is dropped. Pass 0 outside training.
        impl: "auto", "reference" (full score matrix, twice differentiable), "sdpa" (torch's fused kernels) or
            "tiled" (blocks of queries, recomputed in backward: memory O(n)).

    Returns:
        (b, h, i, e_v) in the dtype of `v`. A query that sees no key gets exactly 0, and gives zero gradient.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message names the argument.
    """
    impl = choose(impl, ("sdpa", "tiled"))
    check_heads(q, k, v)
    check_mask(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    check_bias(bias, q, k)
    if impl == "auto":
        # a causal block ends at its own last key, which pays for a bias per distance without gradients too
        shorter = causal and isinstance(bias, DistanceBias) and not dropout
        impl = "tiled" if (_needs_grad(bias) or shorter) and q.shape[-2] > 1 else "sdpa"
    if impl == "reference":
        return _reference(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, dropout=dropout)
    if impl == "tiled":
        return _blocks(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, dropout=dropout)
    return _sdpa(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, dropout=dropout)


def softmax_attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Tensor:
    """The weights (b, h, i, j) by which `softmax_attention` multiplies the values; all 0 where no key is visible."""
    with no_autocast(q):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = at_least_float32(q), at_least_float32(repeat_heads(k, q.shape[1]))
        scores = scale * q @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + (bias.pairs(*scores.shape[-2:]) if isinstance(bias, DistanceBias) else bias)
        seen = visible(*scores.shape[-2:], mask=mask, causal=causal, device=q.device)
        return masked_softmax(scores, seen)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    weights = softmax_attention_weights(q, k, mask=mask, causal=causal, bias=bias, scale=scale)
    with no_autocast(q):
        weights = F.dropout(weights, dropout)
        return (weights @ at_least_float32(repeat_heads(v, q.shape[1]))).to(v.dtype)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    i, j = q.shape[-2], k.shape[-2]
    # SDPA's own flag aligns top-left, so it serves only where that is bottom-right too; it is no symbol of a trace.
    flag = False
    if causal and mask is None and bias is None and i > 1 and i == j:
        flag = True
    seen = None if flag else visible(i, j, mask=mask, causal=causal, device=q.device)
    attn_mask = seen
    if bias is not None:
        attn_mask = bias.pairs(i, j) if isinstance(bias, DistanceBias) else bias
        if seen is not None:  # an empty row keeps its finite bias, for a row of -inf is NaN on some backends
            filled = seen.any(-1, keepdim=True)
            attn_mask = attn_mask.masked_fill(~seen & filled, -math.inf)
        if attn_mask.element_size() > q.element_size():
            # about to be rounded: softmax ignores the shift of a row that takes its largest to 0, where it is finest
            attn_mask = attn_mask - attn_mask.detach().amax(-1, keepdim=True)
        attn_mask = attn_mask.to(q.dtype)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    with no_autocast(q):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout, is_causal=flag, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    return out if bias is None or seen is None else torch.where(filled, out, out.new_zeros(()))


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """The reference over blocks of queries, each computed again in backward, so that no full score matrix is held."""
    i, j = q.shape[-2], k.shape[-2]
    if isinstance(bias, DistanceBias) and not dropout:
        heads = q.shape[1]
        with no_autocast(q):
            out: Tensor = distance_biased_attention(
                q,
                repeat_heads(k, heads),
                repeat_heads(v, heads),
                bias.values,
                key_mask(mask) if mask is not None and mask.ndim == 2 else mask,
                causal,
                q.shape[-1] ** -0.5 if scale is None else scale,
            )
            return out
    if isinstance(bias, DistanceBias):
        bias = DistanceBias(at_least_float32(bias.values))  # once, so that the blocks' gradients are summed in it
    outs = []
    for start in range(0, i, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, i)
        keys = max(j - i + stop, 0) if causal else j  # a causal block ends at its own last key

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int = start, stop: int = stop, keys: int = keys) -> Tensor:
            return _reference(
                q[..., start:stop, :],
                k[..., :keys, :],
                v[..., :keys, :],
                mask=slice_mask(mask, start, stop, keys),
                causal=causal,
                bias=_slice_bias(bias, start, stop, i, keys),
                scale=scale,
                dropout=dropout,
            )

        outs.append(checkpoint(attend, q, k, v, use_reentrant=False) if torch.is_grad_enabled() else attend(q, k, v))
    return torch.cat(outs, dim=-2)


def _slice_bias(bias: Bias | None, start: int, stop: int, queries: int, keys: int) -> Bias | None:
    if bias is None:
        return None
    if isinstance(bias, DistanceBias):
        return bias.rows(start, stop, queries, keys)
    rows = bias if bias.shape[-2] == 1 else bias[..., start:stop, :]
    return rows if rows.shape[-1] == 1 else rows[..., :keys]


def _needs_grad(bias: Bias | None) -> bool:
    values = bias.values if isinstance(bias, DistanceBias) else bias
    return values is not None and values.requires_grad and torch.is_grad_enabled()


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(b, kv_h, n, e) with each head standing heads / kv_h times in a row: (b, heads, n, e)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k, v that do not belong together.

    Raises:
        TypeError: they are not floating point, or not of one dtype.
        ValueError: they are not (b, h, n, e), or batch, key count, feature size or head counts do not fit.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (b, h, n, e), got shape {tuple(tensor.shape)}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must be of one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same number of features, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(
            f"q, k and v must share the batch, k and v their heads and length, got shapes "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of k must divide those of q, got {k.shape[1]} and {q.shape[1]}")


def check_bias(bias: Bias | None, q: Tensor, k: Tensor) -> None:
    """Refuse a bias that does not broadcast to the scores (b, h, i, j).

    Raises:
        TypeError: it is not floating point; a mask is no bias.
        ValueError: it does not.
    """
    if bias is None:
        return
    values = bias.values if isinstance(bias, DistanceBias) else bias
    if not values.is_floating_point():
        raise TypeError(f"bias must be floating point, numbers added to the scores, got dtype {values.dtype}")
    b, h, i, j = *q.shape[:3], k.shape[-2]
    if isinstance(bias, DistanceBias):
        if bias.values.shape != (h, i + j - 1):
            raise ValueError(f"bias.values must be (h, i + j - 1) = {(h, i + j - 1)}, got {tuple(bias.values.shape)}")
        return
    sizes = (b, h, i, j)[-bias.ndim :]
    if bias.ndim not in (2, 3, 4) or any(got not in (1, want) for got, want in zip(bias.shape, sizes, strict=True)):
        raise ValueError(f"bias must broadcast to (b, h, i, j) = {(b, h, i, j)}, got shape {tuple(bias.shape)}")
