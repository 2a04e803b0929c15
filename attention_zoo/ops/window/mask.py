"""The definition of window attention: which keys each query may attend to."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo._checks import check_boolean, check_flag, check_int
from attention_zoo.ops.documents import Documents


def window_mask(
    queries: int,
    keys: int,
    *,
    window: int,
    sinks: int = 0,
    causal: bool = False,
    mask: Tensor | None = None,
    documents: Documents | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Mask of window attention: the keys less than `window` tokens away, and the first `sinks` valid keys.

    With window=3, sinks=1 and causal masking (x the query itself, o the other keys that it attends to):

        x
        o x
        o o x
        o o o x
        o . o o x
        o . . o o x

    Args:
        queries: number of queries i, the last i of the j tokens.
        keys: number of keys j.
        window: a query attends to the keys at distances below `window`. With causal masking these are the last `window`
            tokens, its own included. Masked tokens are counted.
        sinks: number of first valid tokens that all queries attend to. Masked tokens are not counted.
        causal: causal masking.
        mask: padding (b, j) bool, True = a valid token.
        documents: packed documents of the i = j tokens; each has its own window and sinks.
        device: device of the mask, where neither `mask` nor `documents` is given.

    Returns:
        (i, j) bool, True where query i (row) may attend to key j (column); (b, 1, i, j) with `mask` or `documents`.

    Raises:
        TypeError: a size is not an int, or `mask` is not boolean.
        ValueError: `window` is below 1, or `sinks` is negative.
    """
    check_window(window, sinks)
    check_flag(causal=causal)
    if mask is not None:
        check_boolean(mask=mask)
        device = mask.device
    elif documents is not None:
        device = documents.ids.device
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    allowed = distance.abs() < window
    if mask is None and documents is None:
        allowed = allowed | (torch.arange(keys, device=device) < sinks) if sinks else allowed
    else:
        valid = torch.ones_like(documents.starts) if mask is None and documents is not None else mask
        assert valid is not None  # for the type checker
        count = valid.cumsum(1)  # of valid tokens up to and including each
        count = count if documents is None else documents.restart(count)
        allowed = (allowed | (count <= sinks)[:, None]) & valid[:, None]
        allowed = allowed if documents is None else allowed & documents.pairs
        allowed = allowed[:, None]
    return allowed & (distance >= 0) if causal else allowed


def check_window(window: int, sinks: int) -> None:
    """Check the sizes of a window.

    Raises:
        TypeError: one is not an int.
        ValueError: `window` is below 1, or `sinks` is negative.
    """
    check_int(1, window=window)
    check_int(0, sinks=sinks)
