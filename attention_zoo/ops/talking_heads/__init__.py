"""Talking-heads attention: the attention maps of all heads are mixed before and after the softmax.

Papers: Talking-Heads Attention, https://arxiv.org/abs/2003.02436; over the heads of several streams: Multi-Stream
    Transformers, https://arxiv.org/abs/2107.10342
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo._checks import check_fraction, check_int
from attention_zoo.ops.documents import Documents, documents_of
from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import check_mask
from attention_zoo.ops.softmax import check_options, check_qkv, split_mask
from attention_zoo.ops.talking_heads.diversity import DiversityInputs, tiled_diversity
from attention_zoo.ops.talking_heads.tiled import TalkingHeadsInputs, tiled_talking_heads
from attention_zoo.ops.tiling import dropout_seed

__all__ = [
    "HeadMLP",
    "HeadMix",
    "mix_heads",
    "stream_diversity_loss",
    "talking_heads_attention",
    "talking_heads_weights",
]


class HeadMLP(NamedTuple):
    """Non-linear head mixing, at every pair of query and key: x + w2 gelu(w1 (x / rms(x) * norm)), x in R^h.

    Attributes:
        norm: (h,), weight of the RMS norm over the heads, rms(x) = sqrt(mean(x^2) + 1e-5).
        w1: (2 h, h).
        w2: (h, 2 h).
    """

    norm: Tensor
    w1: Tensor
    w2: Tensor


# Head mixing: a matrix (o, h), with out_o = sum_h mix[o, h] map_h; a `HeadMLP`; or None.
HeadMix = Tensor | HeadMLP | None


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: HeadMix,
    post_softmax: HeadMix,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> Tensor:
    """post_softmax(softmax(pre_softmax(scale * q k^T) + mask)) v, which mix the maps of all heads.

    The mixes may change the number of heads, as in the paper: q and k have h_k heads, the softmax is over h heads, and
    v has h_v heads.

    Time O(n^2 (h_k e + h h_k + h h_v + h_v e_v)), memory O(n) on the CPU. On other devices tiles hold at least 64
    queries of all rows, and as many as fit in 2^27 numbers.

    Args:
        q: (b, h_k, i, e). Heads are all that are mixed: those of one stream, or of all streams of a batch row.
        k: (b, h_k, j, e).
        v: (b, h_v, j, e_v).
        pre_softmax, post_softmax: head mixing before and after the softmax: a matrix, (h, h_k) before and (h_v, h)
            after, with out_o = sum_h mix[o, h] map_h; or, where the number of heads does not change, a `HeadMLP` or
            None.
        causal: causal masking, aligned bottom-right: the last query attends to the last key.
        mask: padding (b, j), or four axes that broadcast to (b, h, i, j); boolean, True = allowed, or with four axes
            additive: added to the mixed scores, -inf = masked; differentiable.
        scale: factor of the scores. None: e^-0.5.
        dropout: dropout probability of the weights, before `post_softmax`. Pass 0 outside training.
        document_ids: (b, n) int; see `softmax_attention`.
        impl: "auto", "reference" (all maps at once, twice differentiable) or "tiled" (tiles of queries, recomputed in
            backward). On the CPU "tiled" computes in at least float32. On other devices its matrix products with
            queries, keys, values and gradients run in their dtype, and mixes and softmax in at least float32.

    Returns:
        (b, h_v, i, e_v) in the dtype of v. A query without an allowed key gets exactly 0, with zero gradient.

    Raises:
        TypeError: a tensor has the wrong dtype, or `pre_softmax` or `post_softmax` is not a `HeadMix`.
        ValueError: a shape does not fit, `dropout` is outside [0, 1), or `impl` is unknown.
    """
    if document_ids is not None:
        options: dict[str, Any] = {"causal": causal, "scale": scale, "dropout": dropout, "impl": impl}

        def rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return talking_heads_attention(q, k, v, pre_softmax, post_softmax, mask=mask, **options)

        return documents_of(document_ids, q, k).apply(rows, q, k, v, mask=mask, causal=causal)
    impl = choose(impl, ("tiled",))
    check_qkv(q, k, k)
    _check_values(v, k)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have as many heads as q, got {k.shape[1]} and {q.shape[1]}")
    check_options(causal, 1.0 if scale is None else scale, dropout)
    check_fraction(dropout=dropout)
    pre, heads = _check_mix("pre_softmax", pre_softmax, q.shape[1])
    post, heads_v = _check_mix("post_softmax", post_softmax, heads, after=v.shape[1])
    if heads_v != v.shape[1]:
        raise ValueError(f"v must have as many heads as there are maps, got {v.shape[1]} and {heads_v}")
    mask, bias = _split_mask(mask, q, k, heads)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        from attention_zoo.ops.talking_heads import reference

        return reference.talking_heads_attention(
            q, k, v, pre_softmax, post_softmax, mask=mask, bias=bias, causal=causal, scale=scale, dropout=dropout
        )
    inputs = TalkingHeadsInputs(q, k, v, pre, post, bias, mask, causal, scale, dropout, dropout_seed(dropout))
    return tiled_talking_heads(inputs)[0]


def talking_heads_weights(
    q: Tensor,
    k: Tensor,
    pre_softmax: HeadMix,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(pre_softmax(scale * q k^T) + mask), (b, h, i, j) in at least float32, by the reference.

    Args:
        q, k, pre_softmax, causal, mask, scale: see `talking_heads_attention`.
    """
    from attention_zoo.ops.talking_heads import reference

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask, bias = _split_mask(mask, q, k, _check_mix("pre_softmax", pre_softmax, q.shape[1])[1])
    return reference.talking_heads_weights(q, k, pre_softmax, mask=mask, bias=bias, causal=causal, scale=scale)


def mix_heads(maps: Tensor, mix: HeadMix) -> Tensor:
    """Mix head maps (b, h, i, j) into (b, o, i, j), by the reference."""
    from attention_zoo.ops.talking_heads import reference

    return reference.mix_heads(maps, mix)


def stream_diversity_loss(
    q: Tensor,
    k: Tensor,
    pre_softmax: HeadMix,
    *,
    streams: int,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Minus the mean Jensen-Shannon divergence between the softmax maps of different streams.

    -JSD(a, b) = (H(a) + H(b)) / 2 - H((a + b) / 2), H the entropy in nats, averaged over pairs of streams, pairs of a
    head of either, valid queries and batch rows. The loss is lowest where the heads of different streams attend to
    different keys. Time O(n^2 (h e + h^2)), memory O(n).

    Args:
        q, k: (b, s h_k, n, e), the heads of all streams.
        pre_softmax: head mixing before the softmax, see `talking_heads_attention`.
        streams: number of streams s.
        causal, scale: see `talking_heads_attention`.
        mask: (b, n) bool, True = a valid token; applies to keys, and to queries in the mean.
        impl: "auto", "reference" (all maps at once, twice differentiable) or "tiled" (query tiles, recomputed in
            backward).

    Returns:
        A scalar in [-ln 2, 0]; 0 for one stream.

    Raises:
        TypeError: a tensor has the wrong dtype, `pre_softmax` is not a `HeadMix`, or `streams` is not an int.
        ValueError: `streams` does not divide the heads, a shape does not fit, or `impl` is unknown.
    """
    impl = choose(impl, ("tiled",))
    b, heads, n, e = q.shape
    check_int(0, streams=streams)
    if streams < 1 or heads % streams:
        raise ValueError(f"streams must divide the heads of q, got {streams=} and {heads} heads")
    check_mask(mask, b, heads, n, k.shape[2])
    pre, maps = _check_mix("pre_softmax", pre_softmax, heads)
    if maps % streams:
        raise ValueError(f"streams must divide the maps of pre_softmax, got {streams=} and {maps} maps")
    if streams == 1:
        return torch.zeros((), dtype=torch.float32, device=q.device)
    scale = e**-0.5 if scale is None else scale
    check_options(causal, scale, 0.0)
    if impl == "reference":
        from attention_zoo.ops.talking_heads import reference

        return reference.stream_diversity_loss(
            q, k, pre_softmax, streams=streams, mask=mask, causal=causal, scale=scale
        )
    (total,) = tiled_diversity(DiversityInputs(q, k, pre, mask, causal, scale, streams))
    pairs = (maps // streams) ** 2 * streams * (streams - 1) / 2
    queries = max(b * n, 1) if mask is None else mask.sum().clamp(min=1)
    return -total / pairs / queries


def _split_mask(mask: Tensor | None, q: Tensor, k: Tensor, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """The boolean mask and the bias of `heads` maps; see `split_mask`."""
    maps = q if q.shape[1] == heads else q[:, :1].expand(-1, heads, -1, -1)
    mask, bias = split_mask(mask, None, maps, k)
    return mask, bias if isinstance(bias, Tensor) else None


def _check_values(v: Tensor, k: Tensor) -> None:
    """Check that v has the dtype, device, batch and length of k; its heads may differ."""
    if not isinstance(v, Tensor) or v.layout != torch.strided or v.dtype != k.dtype:
        got = f"dtype {v.dtype}, layout {v.layout}" if isinstance(v, Tensor) else type(v).__name__
        raise TypeError(f"v must be a dense tensor of the dtype of q and k, {k.dtype}, got {got}")
    if v.device != k.device:
        raise ValueError(f"v must be on the device of q and k, {k.device}, got {v.device}")
    if v.ndim != 4 or (v.shape[0], v.shape[2]) != (k.shape[0], k.shape[2]):
        want = f"(b, h_v, j, e_v) with b = {k.shape[0]}, j = {k.shape[2]}"
        raise ValueError(f"v must be {want}, got shape {tuple(v.shape)}")


def _check_mix(name: str, mix: object, heads: int, *, after: int | None = None) -> tuple[list[Tensor], int]:
    """Check a mix of `heads` maps, into `after` maps if given. Returns its tensors and the number of maps after it."""
    if mix is None:
        return [], heads
    if not isinstance(mix, (Tensor, HeadMLP)):
        raise TypeError(f"{name} must be an (o, h) tensor, a HeadMLP or None, got {type(mix).__name__} {mix!r:.40}")
    parts = [mix] if isinstance(mix, Tensor) else list(mix)
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"{name} must be a HeadMLP of tensors, got {mix!r:.80}")
    shapes = [tuple(part.shape) for part in parts]
    if isinstance(mix, HeadMLP):
        after, want = heads, [(heads,), (2 * heads, heads), (heads, 2 * heads)]
    else:
        found = mix.shape[0] if mix.ndim == 2 else heads
        after = max(found, 1) if after is None else after
        want = [(after, heads)]
    if shapes != want:
        raise ValueError(f"{name} must mix the {heads} heads with shapes {want}, got {shapes}")
    return parts, after
