"""Positions and lengths of token sequences, for the models that count them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_features, check_tokens
from attention_zoo.layers.positions import ALiBi, LearnedPositions, RelativeBias, Rotary
from attention_zoo.layers.state import State
from attention_zoo.models.layer_specs import has_options
from attention_zoo.ops.documents import Documents

# A name, or (name, options), which is a list where it was read from JSON.
PositionSpec = str | tuple[str, Mapping[str, Any]] | None
ROTARY_OPTIONS = tuple(inspect.signature(Rotary).parameters)
# The options of each name.
POSITIONS: dict[str, tuple[str, ...]] = {
    "auto": ROTARY_OPTIONS,
    "rotary": ROTARY_OPTIONS,
    "t5": ("buckets", "max_distance"),
    "alibi": (),
    "learned": (),
}


def parse_positions(
    positions: PositionSpec, *, known: Mapping[str, Sequence[str]] = POSITIONS
) -> tuple[str | None, dict[str, Any]]:
    """The name and the options of an argument `positions`.

    Args:
        positions: a name, `(name, options)` or None.
        known: the accepted names with their options.

    Raises:
        TypeError: `positions` is something else.
        ValueError: the name or an option is unknown.
    """
    if positions is None:
        return None, {}
    if not isinstance(positions, str) and not has_options(positions):
        raise TypeError(f"positions must be a name, (name, options) or None, got {positions!r}")
    name, options = (positions, {}) if isinstance(positions, str) else positions
    check_choice("positions", name, known)
    for option in options:
        check_choice(f"options of positions {name!r}", option, known[name])
    return name, dict(options)


def position_parts(
    positions: PositionSpec, heads: int | None, *, known: Sequence[str], causal: bool = True
) -> dict[str, Any]:
    """The arguments of `Stack` that give its blocks their positions.

    Args:
        positions: a name or `(name, options)`. "rotary", with the options of `Rotary`; "t5" for a relative position
            bias, with `buckets` and `max_distance` of `RelativeBias`; "alibi"; "auto" for rotary in the blocks that
            take it. Any other: no positions.
        heads: heads of the bias. None: 8, the blocks' default.
        known: the names that the model accepts.
        causal: whether the blocks are causal.

    Raises:
        TypeError, ValueError: `positions` is not accepted, or an option is invalid.
    """
    name, options = parse_positions(positions, known={name: POSITIONS[name] for name in known})
    if name == "rotary":
        return {"rotary": Rotary(**options)}
    if name == "t5":
        return {"bias": RelativeBias(8 if heads is None else heads, causal=causal, **options)}
    if name == "alibi":
        return {"bias": ALiBi(8 if heads is None else heads)}
    return {"defaults": {"rotary": Rotary(**options)}} if name == "auto" else {}


def learned_positions(positions: PositionSpec, max_seq_len: int | None, dim: int) -> LearnedPositions | None:
    """The table of positions="learned"; None for others.

    Raises:
        ValueError: `max_seq_len` is None.
    """
    if parse_positions(positions)[0] != "learned":
        return None
    if max_seq_len is None:
        raise ValueError("max_seq_len must be given with positions='learned', got max_seq_len=None")
    return LearnedPositions(max_seq_len, dim)


def embed_tokens(
    embedding: nn.Module, tokens: Tensor | None, inputs_embeds: Tensor | None, *, dim: int, name: str = "tokens"
) -> Tensor:
    """Embeddings (b, n, d) of tokens (b, n), or the given ones.

    Raises:
        TypeError: `tokens` are not integers, or `inputs_embeds` is not floating point.
        ValueError: not exactly one of the two is given, a shape is wrong, or an id is out of range.
    """
    if (tokens is None) == (inputs_embeds is None):
        got = "neither" if tokens is None else "both"
        raise ValueError(f"{name} must be given if and only if inputs_embeds is not, got {got}")
    if tokens is None:
        check_features(inputs_embeds, dim, name="inputs_embeds")  # type: ignore[arg-type]
        return inputs_embeds  # type: ignore[return-value]
    check_tokens(tokens, embedding.num_embeddings, name=name)  # type: ignore[arg-type]
    return embedding(tokens if tokens.dtype in (torch.int64, torch.int32) else tokens.long())


def count_valid_tokens(
    tokens: Tensor, mask: Tensor | None, before: Tensor | None, documents: Documents | None = None
) -> Tensor:
    """The number of valid tokens up to and including each token, (b, n) int64.

    Args:
        tokens: (b, n, ...).
        mask: (b, n) bool, True = a valid token.
        before: (b,) int, number of valid tokens of earlier steps. None: 0.
        documents: the documents of packed rows, in each of which the count starts at 0.
    """
    valid = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device) if mask is None else mask.long()
    count = valid.cumsum(dim=1) + (0 if before is None else before[:, None])
    return count if documents is None else documents.restart(count)


def check_length(
    tokens: Tensor, state: State | None, max_seq_len: int | None, *, name: str = "tokens", limit: str = "max_seq_len"
) -> None:
    """Check that the tokens of earlier steps and the new ones fit the model.

    The length of a state is the value of a tensor, which is read on the CPU only, and not under torch.compile.

    Raises:
        ValueError: there are more than `max_seq_len` tokens.
    """
    if max_seq_len is None:
        return
    unknown = state is None or tokens.device.type != "cpu" or torch.compiler.is_compiling()
    total = tokens.shape[1] + (0 if unknown else state.length)  # type: ignore[union-attr]
    if total > max_seq_len:
        raise ValueError(f"{name} must fit {limit}={max_seq_len}, got a sequence of {total} tokens")
