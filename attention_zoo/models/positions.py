"""Positions and lengths of token sequences, for the models that count them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo._checks import check_choice
from attention_zoo.layers.positions import RelativeBias, Rotary
from attention_zoo.layers.state import State
from attention_zoo.models.layer_specs import AttentionSpec, parse_layers, takes_part


def position_parts(
    positions: str | None, attention: AttentionSpec, heads: int | None, *, known: tuple[str, ...]
) -> dict[str, Any]:
    """The shared argument of `Stack` that gives its blocks their positions.

    Args:
        positions: "rotary"; "t5" for a relative position bias; "auto" for rotary if a block takes it. Any other value:
            no argument.
        attention: the blocks; see `Stack`.
        heads: heads of the relative bias. None: 8, the blocks' default.
        known: the values of `positions` that the model accepts besides None.

    Raises:
        ValueError: `positions` is not accepted.
    """
    if positions is not None:
        check_choice("positions", positions, known)
    if positions == "rotary" or (positions == "auto" and takes_part(parse_layers(attention), "rotary")):
        return {"rotary": Rotary()}
    if positions == "t5":
        return {"bias": RelativeBias(8 if heads is None else heads)}
    return {}


def count_valid_tokens(tokens: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
    """The number of valid tokens up to and including each token, (b, n) int64.

    Args:
        tokens: (b, n).
        mask: (b, n) bool, True = a valid token.
        before: (b,) int, number of valid tokens of earlier steps. None: 0.
    """
    valid = torch.ones_like(tokens, dtype=torch.int64) if mask is None else mask.long()
    return valid.cumsum(dim=1) + (0 if before is None else before[:, None])


def check_length(
    tokens: Tensor, state: State | None, max_seq_len: int | None, *, name: str = "tokens", limit: str = "max_seq_len"
) -> None:
    """Check that the tokens of earlier steps and the new ones fit the model.

    Under torch.compile the length of a state is the value of a tensor and cannot be checked.

    Raises:
        ValueError: there are more than `max_seq_len` tokens.
    """
    if max_seq_len is None:
        return
    total = tokens.shape[1] + (0 if state is None or torch.compiler.is_compiling() else state.length)
    if total > max_seq_len:
        raise ValueError(f"{name} must fit {limit}={max_seq_len}, got a sequence of {total} tokens")
