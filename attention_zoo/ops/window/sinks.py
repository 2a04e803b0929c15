"""Attention sinks: the first valid tokens of each row, which all later tokens attend to.

Paper: Efficient Streaming Language Models with Attention Sinks, https://arxiv.org/abs/2309.17453
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ABSENT = 2**62  # position of a sink that a row does not have (yet)


class Sinks(NamedTuple):
    """Keys and values of the first valid tokens of each row.

    keys, values: (b, kv_h, s, e).
    position: (b, s) int64, the position of each sink in its row, ABSENT where a row has fewer valid tokens; None: the
        sinks are the tokens 0, ..., s - 1 of every row.
    """

    keys: Tensor
    values: Tensor
    position: Tensor | None

    def positions(self) -> Tensor:
        """(b or 1, s) int64."""
        if self.position is not None:
            return self.position
        return torch.arange(self.keys.shape[2], device=self.keys.device)[None]


def first_sinks(
    keys: Tensor, values: Tensor, mask: Tensor | None, count: int, *, start: int = 0, old: Sinks | None = None
) -> Sinks:
    """The sinks of rows to which tokens have been appended.

    Args:
        keys, values: (b, kv_h, t, e) of the new tokens.
        mask: (b, t) bool, True = a valid token; None: all are valid.
        count: number of sinks.
        start: position of the first new token.
        old: the sinks of the tokens before, or None.
    """
    have = 0 if old is None else old.keys.shape[2]
    if mask is None and (old is None or old.position is None):
        if old is not None and have == count:
            return old
        # copies: a state does not hold the memory of all tokens
        keys, values = keys[:, :, : count - have].clone(), values[:, :, : count - have].clone()
        if old is None:
            return Sinks(keys, values, None)
        return Sinks(torch.cat((old.keys, keys), 2), torch.cat((old.values, values), 2), None)
    batch, tokens = keys.shape[0], keys.shape[2]
    position = torch.arange(start, start + tokens, device=keys.device).expand(batch, -1)
    position = position if mask is None else position.masked_fill(~mask, ABSENT)
    if old is not None:
        position = torch.cat((old.positions().expand(batch, -1), position), 1)
        keys, values = torch.cat((old.keys, keys), 2), torch.cat((old.values, values), 2)
    position, chosen = position.topk(min(count, position.shape[1]), largest=False)
    index = chosen[:, None, :, None]
    keys, values = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))
    return Sinks(keys, values, position)
