"""FlexAttention of torch: fused kernels for scores and masks that are functions of indices. It is opt-in.

On a GPU it is compiled. On the CPU torch runs it without fusing, and without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attention_zoo.ops import tiling
from attention_zoo.ops.precision import no_autocast

# batch row, head, query and key -> whether the query attends to the key; a score and these -> the new score
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def run_flex(
    q: Tensor, k: Tensor, v: Tensor, score_mod: ScoreMod | None, block_mask: BlockMask | None, scale: float
) -> Tensor:
    """Attention of q (b, h, i, e) to k, v (b, kv_h, j, e); a query without an allowed key gets 0."""
    eager = tiling.prefers_tiles(q) or torch.compiler.is_compiling()
    grouped = q.shape[1] != k.shape[1]
    with no_autocast(q):
        attend = flex_attention if eager else _compiled()
        out: Tensor = attend(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped)
    return out


def hide_pairs(mask: Tensor | None, score_mod: ScoreMod | None = None) -> ScoreMod | None:
    """`score_mod` followed by a mask.

    Args:
        mask: None, padding (b, j), or four axes of bool that broadcast to (b, h, i, j).
        score_mod: None leaves the scores as they are.
    """
    if mask is None:
        return score_mod
    many = [size > 1 for size in mask.shape]

    def hidden(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        index = (b, key) if mask.ndim == 2 else tuple(x * m for x, m in zip((b, h, query, key), many, strict=True))
        score = score if score_mod is None else score_mod(score, b, h, query, key)
        return torch.where(mask[index], score, -torch.inf)

    return hidden


def block_mask_of(mask_mod: MaskMod, queries: int, keys: int, device: torch.device) -> BlockMask:
    """Which blocks of queries and keys a mask needs, the same for all rows and heads."""
    return create_block_mask(mask_mod, None, None, queries, keys, device=device)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
