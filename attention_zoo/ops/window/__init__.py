"""Window attention: softmax attention over the last tokens, and the first.

Papers: Longformer, https://arxiv.org/abs/2004.05150; Mistral 7B, https://arxiv.org/abs/2310.06825; Efficient Streaming
    Language Models with Attention Sinks, https://arxiv.org/abs/2309.17453
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo._checks import check_attn_mask, check_padding
from attention_zoo.ops.documents import Documents, documents_of
from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import as_pairs, restrict
from attention_zoo.ops.softmax import check_options, check_qkv, softmax_attention, split_mask
from attention_zoo.ops.window.chunked import Window, chunked_attention, dense_attention, join_sinks, keys_per_chunk
from attention_zoo.ops.window.mask import check_window, window_mask
from attention_zoo.ops.window.sinks import Sinks, first_sinks

__all__ = [
    "Sinks",
    "cached_window_attention",
    "check_window",
    "first_sinks",
    "window_attention",
    "window_mask",
    "window_pairs",
]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    causal: bool = False,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys with |i - j| < window and the first valid `sinks`.

    Time O(i (window + sinks) e), memory O((i + j) e + i window) where it is chunked.

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, kv_h, j, e); kv_h divides h, and each key/value head serves h / kv_h neighbouring query heads.
        window: a query attends to the keys at distances below `window`, masked ones counted. With causal masking these
            are the last `window` tokens, its own included.
        sinks: number of first valid tokens of a row, or of a document, that all its queries attend to.
        causal: causal masking, aligned bottom-right.
        mask: padding (b, j) bool, True = a valid token.
        attn_mask: (i, j), (b, i, j) or (b, h, i, j), where b and h may be 1; boolean, or added to the scores.
        scale: factor of the scores; e^-0.5 if None.
        dropout: dropout probability of the weights. Pass 0 outside training.
        document_ids: (b, n) int, for packed rows of n = i = j tokens: windows and sinks restart at every document.
        impl: "auto", "reference" (full score matrix, twice differentiable), "dense" (torch's fused kernels under the
            full mask) or "chunked" (without `attn_mask`).

    Returns:
        (b, h, i, e_v) in the dtype of `v`. A query without an allowed key gets exactly 0, with zero gradient.

    Raises:
        TypeError: the type or the dtype of an argument is wrong.
        ValueError: `window` is below 1, `sinks` is negative, the shapes of the arguments do not fit, there are more
            queries than keys, or `impl` is unknown or cannot compute the arguments.
    """
    choice = choose(impl, ("dense", "chunked"))
    check_qkv(q, k, v)
    check_window(window, sinks)
    check_options(causal, 1.0 if scale is None else scale, dropout)
    i, j = q.shape[2], k.shape[2]
    if i > j:
        raise ValueError(f"q must be the last of the tokens of k, got {i} queries and {j} keys")
    check_padding(mask, k[:, 0])
    check_attn_mask(attn_mask, q[:, 0], q.shape[1], j)
    if impl == "chunked" and attn_mask is not None:
        raise ValueError(f"attn_mask must be None with {impl=}")
    options = Window(window, causal, 0, scale, dropout)
    if document_ids is not None:
        documents = documents_of(document_ids, q, k)

        def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
            if mask is not None and mask.ndim == 4:  # whole rows
                return _attend_pairs(q, k, v, pairs(), scale, dropout, choice)
            return _attend(q, k, v, sinks, mask, options, choice)

        def pairs() -> Tensor:
            return window_pairs(
                i, j, window=window, sinks=sinks, causal=causal, mask=mask, attn_mask=attn_mask, documents=documents
            )

        return documents.apply(attend, q, k, v, mask=mask, attn_mask=attn_mask, causal=causal)
    if attn_mask is not None:
        allowed = window_pairs(i, j, window=window, sinks=sinks, causal=causal, mask=mask, attn_mask=attn_mask)
        return _attend_pairs(q, k, v, allowed, scale, dropout, choice)
    return _attend(q, k, v, sinks, mask, options, choice)


def window_pairs(
    queries: int,
    keys: int,
    *,
    window: int,
    sinks: int,
    causal: bool,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    documents: Documents | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """`window_mask` in four axes that broadcast to (b, h, i, j), combined with an attention mask, whose dtype it has.

    Args: see `window_mask` and `window_attention`.
    """
    device = device if attn_mask is None else attn_mask.device
    allowed = window_mask(
        queries, keys, window=window, sinks=sinks, causal=causal, mask=mask, documents=documents, device=device
    )
    allowed = allowed if allowed.ndim == 4 else allowed[None, None]
    return allowed if attn_mask is None else restrict(attn_mask, allowed)


def cached_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Sinks | None,
    *,
    window: int,
    start: int,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal window attention of new tokens over the cached tokens of their windows and the sinks.

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, kv_h, j, e), the new tokens and at least the window - 1 tokens before them, if there are as many.
        sinks: the sinks of all tokens of the rows, or None.
        window, scale, dropout: see `window_attention`.
        start: position of the first of the j tokens in its row.
        mask: (b, j) bool, True = a valid token.
        attn_mask: as in `window_attention`, over all start + j tokens of the rows.
    """
    options = Window(window, True, start, scale, dropout)
    fast = choose("auto", ()) == "auto" and attn_mask is None and not torch.compiler.is_compiling()
    if attn_mask is not None:
        k, v, allowed = join_sinks(q, k, v, sinks, mask, options)
        attn_mask = _columns(attn_mask, None if sinks is None else sinks.positions(), start)
        return softmax_attention(q, k, v, mask=restrict(attn_mask, allowed), scale=scale, dropout=dropout)
    if fast and q.shape[2] >= keys_per_chunk(window, 0 if sinks is None else sinks.keys.shape[2], True):
        return chunked_attention(q, k, v, sinks, mask, options)
    return dense_attention(q, k, v, sinks, mask, options)


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: int, mask: Tensor | None, options: Window, choice: str) -> Tensor:
    """Window attention of rows or documents without `attn_mask`, by the implementation `choice`."""
    i, j = q.shape[2], k.shape[2]
    window, causal, _, scale, dropout = options
    if choice == "reference":
        allowed = window_pairs(i, j, window=window, sinks=sinks, causal=causal, mask=mask, device=q.device)
        return _attend_pairs(q, k, v, allowed, scale, dropout, choice)
    if choice == "auto" and torch.compiler.is_compiling():
        choice = "chunked" if i > 1 else "dense"  # a limit of the length would specialise a trace
    elif choice == "auto":
        choice = "chunked" if i >= keys_per_chunk(window, sinks, causal) else "dense"
    implementation = chunked_attention if choice == "chunked" else dense_attention
    return implementation(q, k, v, first_sinks(k, v, mask, sinks) if sinks else None, mask, options)


def _attend_pairs(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float | None, dropout: float, choice: str
) -> Tensor:
    """Softmax attention under a mask of all pairs."""
    if choice != "reference":
        return softmax_attention(q, k, v, mask=pairs, scale=scale, dropout=dropout)
    from attention_zoo.ops.window import reference

    mask, bias = split_mask(pairs, None, q, k)
    return reference.attention(q, k, v, mask, bias, q.shape[-1] ** -0.5 if scale is None else scale, dropout)


def _columns(attn_mask: Tensor, sinks: Tensor | None, start: int) -> Tensor:
    """The columns of an attention mask for sinks at positions (b or 1, s), and for the tokens from `start` on."""
    attn_mask = as_pairs(attn_mask)
    if sinks is None:
        return attn_mask[..., start:]
    index = sinks.clamp(max=attn_mask.shape[-1] - 1)[:, None, None]
    shape = (max(attn_mask.shape[0], index.shape[0]), *attn_mask.shape[1:3])
    columns = attn_mask.expand(*shape, -1).gather(-1, index.expand(*shape, -1))
    return torch.cat((columns, attn_mask.expand(*shape, -1)[..., start:]), dim=-1)
