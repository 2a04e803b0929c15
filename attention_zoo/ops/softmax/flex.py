"""Softmax attention by FlexAttention: it skips blocks of later keys and of other documents, and stores no pairs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attention_zoo.ops.documents import Documents
from attention_zoo.ops.flex import MaskMod, ScoreMod, block_mask_of, hide_pairs, run_flex
from attention_zoo.ops.softmax.bias import Bias, DistanceBias


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """Arguments as in `softmax_attention`."""
    i, j = q.shape[2], k.shape[2]
    if documents is not None:  # depends on the values of a tensor: made for every call, without a synchronisation
        within = document_mod(documents.first, causal)
        blocks: BlockMask | None = create_block_mask(within, q.shape[0], None, i, j, device=q.device)
    elif causal:
        make = _causal_blocks.__wrapped__ if torch.compiler.is_compiling() else _causal_blocks
        blocks = make(i, j, q.device)
    else:
        blocks = None
    return run_flex(q, k, v, hide_pairs(mask, bias_mod(bias, q, k)), blocks, scale)


def bias_mod(bias: Bias | None, q: Tensor, k: Tensor) -> ScoreMod | None:
    """The addition of a bias to a score."""
    if bias is None:
        return None
    if isinstance(bias, DistanceBias):
        values, last = bias.values, q.shape[2] - 1
        return lambda score, b, h, query, key: score + values[h, key - query + last]
    pairs = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return lambda score, b, h, query, key: score + pairs[b, h, query, key]


def causal_mod(start: int) -> MaskMod:
    """Whether a key is up to the query `start` + query."""
    return lambda b, h, query, key: key <= query + start


def document_mod(first: Tensor, causal: bool) -> MaskMod:
    """Whether a key is of the document of the query.

    Args:
        first: (b, n), the index of the first token of each token's document.
        causal: whether it must also be up to the query.
    """
    if causal:
        return lambda b, h, query, key: (first[b, query] == first[b, key]) & (key <= query)
    return lambda b, h, query, key: first[b, query] == first[b, key]


@lru_cache(maxsize=16)
def _causal_blocks(queries: int, keys: int, device: torch.device) -> BlockMask:
    return block_mask_of(causal_mod(keys - queries), queries, keys, device)
