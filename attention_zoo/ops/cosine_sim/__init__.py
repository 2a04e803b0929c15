"""Cosine-sim attention: softmax over the cosines of queries and keys, which bounds the scores.

Paper: Query-Key Normalization for Transformers, https://arxiv.org/abs/2010.04245
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attention_zoo._checks import check_floats, check_in, check_int
from attention_zoo.ops.cosine_sim.fused_norm import unit
from attention_zoo.ops.documents import Documents, documents_of
from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import Bias, check_options, check_qkv, softmax_attention, split_mask

__all__ = ["cosine_sim_attention", "l2_normalize", "scale_unit_queries"]


def l2_normalize(x: Tensor, *, groups: int = 1, eps: float | None = None, impl: str = "auto") -> Tensor:
    """x / max(||x||, eps), separately in each of `groups` equal slices of the features.

    Args:
        x: (..., e).
        groups: number of slices; divides e.
        eps: smallest norm to divide by. If None, 1e-12; in float16 its smallest normal number, whose inverse, the
            largest gradient of a zero row, is still finite in float16.
        impl: "auto", "reference" or "fused" (explicit backward, twice as fast).

    Returns:
        (..., e) in the dtype of `x`; the norm is computed in at least float32.

    Raises:
        TypeError: `x` is not floating point, `groups` not an int, or `eps` not a number.
        ValueError: `groups` does not divide e, `eps` is negative or not finite, or `impl` is unknown.
    """
    impl = choose(impl, ("fused",))
    check_floats(x=x)
    _check_groups(groups, x)
    if eps is not None:
        check_in("[0, inf)", eps=eps)
    eps = _smallest_norm(x) if eps is None else eps
    with no_autocast(x):
        if impl == "reference":
            from attention_zoo.ops.cosine_sim import reference

            return reference.l2_normalize(x, groups, eps).to(x.dtype)
        slices = at_least_float32(x).reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        return unit(slices, eps).reshape(x.shape).to(x.dtype)


def cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | Tensor = 8.0,
    groups: int = 1,
    eps: float | None = None,
    dropout: float = 0.0,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_i = sum_j softmax_j(scale q^_i . k^_j + bias_ij) v_j, with q^, k^ = q, k l2-normalised in slices of features.

    A `scale` that is a tensor is learned, as the paper's g. It multiplies the normalised queries, so that the same
    kernels run with both.

    Time and memory as `softmax_attention`.

    Args:
        q: (b, h, i, e), or (b, i, e) with batch and heads merged.
        k, v: (b, kv_h, j, e) with kv_h dividing h; or (b, j, e): one key/value head for all, or merged like q.
        mask: padding (b, j), or, with a 4-D `q`, four axes that broadcast to (b, h, i, j); boolean or additive, see
            `softmax_attention`.
        causal: causal masking, aligned bottom-right: the last query attends to the last key.
        bias: broadcasts to (b, h, i, j), or a `DistanceBias`. In the merged form (b, i, j).
        scale: factor of the cosines, in place of softmax attention's e^-0.5: a number, or a floating point tensor (1,)
            or (h,), one for all heads or one for each; differentiable. With a 3-D `q`, (1,).
        groups: number of slices of the features, normalised separately; scores then lie in scale * [-groups, groups].
        eps: see `l2_normalize`.
        dropout: dropout probability of the weights. Pass 0 outside training.
        document_ids: see `softmax_attention`; for a 4-D `q`.
        impl: as in `softmax_attention`.

    Returns:
        (b, h, i, e_v), or (b, i, e_v) for a 3-D `q`, in the dtype of `v`. A query without an allowed key gets exactly
        0, with zero gradient.

    Raises:
        TypeError: the type or the dtype of an argument is wrong.
        ValueError: the shapes of the arguments do not fit, a number is outside its range, or `impl` is unknown.
    """
    if document_ids is not None:
        rows = partial(
            cosine_sim_attention,
            causal=causal,
            bias=bias,
            scale=scale,
            groups=groups,
            eps=eps,
            dropout=dropout,
            impl=impl,
        )
        documents = documents_of(document_ids, q, k)
        return documents.apply(rows, q, k, v, mask=mask, causal=causal, whole=bias is not None)
    impl = choose(impl, ("sdpa", "tiled"))
    merged = q.ndim == 3
    if merged and k.ndim == 4:
        raise ValueError(f"k must have 3 axes where q has 3, got shapes {tuple(k.shape)} and {tuple(q.shape)}")
    if merged:
        q = q[:, None]
        bias = bias[:, None] if isinstance(bias, Tensor) and bias.ndim == 3 else bias
    k = k[:, None] if k.ndim == 3 else k
    v = v[:, None] if v.ndim == 3 else v
    if isinstance(scale, Tensor):
        _check_scale(scale, q)
    if impl == "reference":
        check_qkv(q, k, v)
        mask, bias = split_mask(mask, bias, q, k)
        _check_groups(groups, q)
        check_options(causal, 1.0 if isinstance(scale, Tensor) else scale, dropout)
        if eps is not None:
            check_in("[0, inf)", eps=eps)
        eps = _smallest_norm(q) if eps is None else eps
        from attention_zoo.ops.cosine_sim import reference

        out = reference.attention(q, k, v, mask, causal, bias, scale, groups, eps, dropout)
    else:
        q, k = (l2_normalize(x, groups=groups, eps=eps) for x in (q, k))
        if isinstance(scale, Tensor):
            q, scale = scale_unit_queries(q, scale), 1.0
        out = softmax_attention(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, dropout=dropout, impl=impl)
    return out[:, 0] if merged else out


def scale_unit_queries(q: Tensor, scale: Tensor) -> Tensor:
    """Normalised queries (b, h, n, e) times a scale (1,) or (h,), in at least float32, in the dtype of `q`."""
    with no_autocast(q):
        return (at_least_float32(q) * at_least_float32(scale)[:, None, None]).to(q.dtype)


def _check_scale(scale: Tensor, q: Tensor) -> None:
    check_floats(scale=scale)
    if q.ndim == 4 and tuple(scale.shape) not in ((1,), (q.shape[1],)):
        raise ValueError(f"scale must be (1,) or (h,) with h = {q.shape[1]}, got shape {tuple(scale.shape)}")
    if scale.device != q.device:
        raise ValueError(f"scale must be on the device of q, {q.device}, got {scale.device}")


def _smallest_norm(x: Tensor) -> float:
    return max(1e-12, torch.finfo(x.dtype).tiny)


def _check_groups(groups: int, x: Tensor) -> None:
    check_int(0, groups=groups)
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups must divide the features of a head, got {groups=} and {x.shape[-1]} features")
