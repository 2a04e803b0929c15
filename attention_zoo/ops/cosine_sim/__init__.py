"""Cosine-sim attention: softmax over the cosines of queries and keys, whose scores cannot grow with the weights.

Paper: Query-Key Normalization for Transformers, https://arxiv.org/abs/2010.04245
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import softmax_attention


def l2_normalize(x: Tensor, *, groups: int = 1, eps: float | None = None, impl: str = "auto") -> Tensor:
    """x / max(||x||, eps), separately in each of `groups` equal slices of the features.

    Args:
        x: (..., e).
        groups: number of slices; divides e.
        eps: smallest norm divided by. None: 1e-12, or float16's smallest normal number, whose inverse, the largest
            gradient that a zero row sends back, float16 still holds.
        impl: "auto", "reference" or "fused" (a backward of its own, twice as fast).

    Returns:
        (..., e) in the dtype of `x`; the norm itself is taken in float32 at least.

    Raises:
        ValueError: groups does not divide e.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups must divide the features of a head, got {groups=} and {x.shape[-1]} features")
    eps = max(1e-12, torch.finfo(x.dtype).tiny) if eps is None else eps
    recorded = x.requires_grad and torch.is_grad_enabled()
    fused = choose(impl, ("fused",)) != "reference" and recorded
    with no_autocast(x):
        slices = at_least_float32(x).reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        unit: Tensor
        if fused:
            unit, _ = _Unit.apply(slices, eps)  # type: ignore[no-untyped-call]
        else:
            unit = slices / _norm(slices, eps)
        return unit.reshape(x.shape).to(x.dtype)


def _norm(x: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.clamp(min=eps)


class _Unit(torch.autograd.Function):
    """u = x / r with r = max(||x||, eps); the gradient is g -> (g - u (u . g)) / r, or g / eps below eps.

    r is an output too: what backward reads must be part of the graph for a second derivative to be right.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = _norm(x, eps)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return unit, norm

    @staticmethod
    def backward(ctx: Any, to_unit: Tensor | None, to_norm: Any) -> tuple[Tensor | None, None]:
        unit, norm = ctx.saved_tensors
        free = norm > ctx.eps
        if to_unit is None and to_norm is None:
            return None, None
        if to_unit is None:
            return to_norm * unit * free, None
        along = (to_unit * unit).sum(-1, keepdim=True) * free
        gradient = torch.addcmul(to_unit, unit, along, value=-1) / norm
        return (gradient if to_norm is None else gradient + to_norm * unit * free), None


def cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float = 8.0,
    groups: int = 1,
    eps: float | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale * q^ k^^T + bias) v, where q^ and k^ are l2-normalised in `groups` slices of their features.

    Args:
        q: (b, h, i, e), or (b, i, e) where batch and heads are merged.
        k, v: (b, kv_h, j, e) with kv_h dividing h; or (b, j, e): one key/value head for all, or merged like q.
        mask: padding (b, j), or, beside 4-D queries, anything boolean that broadcasts to (b, h, i, j); True = visible.
        causal: hide the keys after a query, the last query standing at the last key; combines with `mask`.
        bias: broadcasts to (b, h, i, j): (h, i, j), or (b, 1, i, j) per row. In the merged form (b, i, j).
        scale: the largest score, in place of softmax attention's e^-0.5.
        groups: slices normalised separately; scores then lie in scale * [-groups, groups].
        eps: see `l2_normalize`.
        dropout: probability with which a weight is dropped. Pass 0 outside training.
        impl: as in `softmax_attention`.

    Returns:
        The shape of q with v's features, in v's dtype. A query that sees no key gets exactly 0.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message names the argument.
    """
    merged = q.ndim == 3
    if merged and k.ndim == 4:
        raise ValueError(f"k must have 3 axes where q has 3, got shapes {tuple(k.shape)} and {tuple(q.shape)}")
    if merged:
        q = q[:, None]
        bias = bias[:, None] if bias is not None and bias.ndim == 3 else bias
    k = k[:, None] if k.ndim == 3 else k
    v = v[:, None] if v.ndim == 3 else v
    norm_impl = "reference" if impl == "reference" else "auto"
    q, k = (l2_normalize(x, groups=groups, eps=eps, impl=norm_impl) for x in (q, k))
    out = softmax_attention(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, dropout=dropout, impl=impl)
    return out[:, 0] if merged else out
