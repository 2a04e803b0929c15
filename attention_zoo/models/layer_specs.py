"""Layer specs: how a user names the blocks and feedforwards of a stack, and how they are built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from attention_zoo._checks import check_choice
from attention_zoo.attention import BLOCKS
from attention_zoo.layers.feedforward import FEEDFORWARDS

# One sub-layer: a name in BLOCKS, (name, options), or a function of dim that returns a block.
BlockSpec = str | tuple[str, Mapping[str, Any]] | Callable[..., nn.Module]
# One layer: a sub-layer, or a list of sub-layers.
LayerSpec = BlockSpec | Sequence[BlockSpec]
# The attention of a whole stack: one layer, or a list of layers cycled over the depth.
AttentionSpec = LayerSpec | Sequence[LayerSpec]
FeedForwardSpec = str | tuple[str, Mapping[str, Any]] | Callable[..., nn.Module] | None


def is_named(spec: object) -> bool:
    """Whether `spec` is (name, options), as a tuple or, read from JSON, a list."""
    return isinstance(spec, (tuple, list)) and len(spec) == 2 and isinstance(spec[1], Mapping)


def parse_layers(attention: AttentionSpec) -> list[list[Any]]:
    """The block specs of each layer of one cycle.

    Raises:
        TypeError: `attention` or an entry of it is not a spec.
        ValueError: a list is empty.
    """
    if isinstance(attention, str) or callable(attention) or is_named(attention):
        return [[attention]]
    if not isinstance(attention, (list, tuple)):
        raise TypeError(f"attention must be a name, (name, options), a callable or a list, got {attention!r}")
    layers = [
        list(layer) if isinstance(layer, (list, tuple)) and not is_named(layer) else [layer] for layer in attention
    ]
    if not layers or not all(layers):
        raise ValueError(f"attention must name at least one block per layer, got {attention!r}")
    for spec in (spec for layer in layers for spec in layer):
        if not (isinstance(spec, str) or callable(spec) or is_named(spec)):
            raise TypeError(f"attention must be made of names, (name, options) and callables, got {spec!r}")
    return layers


def cycle_layers(attention: AttentionSpec, depth: int) -> list[list[Any]]:
    """The block specs of each of `depth` layers. Errors as in `parse_layers`."""
    cycle = parse_layers(attention)
    return [cycle[layer % len(cycle)] for layer in range(depth)]


def check_shared(shared: Mapping[str, Any], attention: AttentionSpec, depth: int) -> None:
    """Check that every shared argument is taken by a block of the stack.

    Raises:
        ValueError: no block takes an argument.
    """
    layers = cycle_layers(attention, depth)
    for name in sorted(shared):
        if not takes_part(layers, name):
            name = "attn_dropout" if name == "dropout" else name
            raise ValueError(f"{name} must be taken by at least one block, but none of {attention!r} has it")


def make_block(spec: Any, dim: int, *, causal: bool, shared: Mapping[str, Any]) -> nn.Module:
    """Build one block. Its own options take precedence over shared parts.

    Args:
        spec: a `BlockSpec`.
        dim: features d.
        causal: passed to a block that has the argument.
        shared: parts and sizes; the block gets those that its constructor has an argument for.

    Raises:
        ValueError: a name or an option is unknown, or the block is always causal with causal=False.
    """
    name, make, options = _resolve("attention", spec, BLOCKS)
    known = _arguments(make)
    given = {key: value for key, value in {**shared, "causal": causal}.items() if key in known}
    block = make(dim, **{**given, **options})
    if not causal and getattr(block, "causal", False) and "context" not in inspect.signature(block.forward).parameters:
        raise ValueError(f"causal=False must be possible for every block, but {name!r} is causal")
    return block


def make_feedforward(spec: FeedForwardSpec, dim: int, **defaults: Any) -> nn.Module:
    """Build one feedforward. The options of `(name, options)` take precedence over `defaults`.

    Raises:
        TypeError: `spec` is not a feedforward spec.
        ValueError: a name or an option is unknown.
    """
    if callable(spec):
        return spec(dim)
    if not isinstance(spec, str) and not is_named(spec):
        raise TypeError(f"feedforward must be a name, (name, options), a callable or None, got {spec!r}")
    _, make, options = _resolve("feedforward", spec, FEEDFORWARDS)
    return make(dim, **{**defaults, **options})


def takes_part(layers: Sequence[Sequence[Any]], part: str) -> bool:
    """Whether the constructor of a block in these layers has an argument called `part`."""
    return any(part in _arguments(_resolve("attention", spec, BLOCKS)[1]) for layer in layers for spec in layer)


def first_with_same_id(name: str, ids: Sequence[int] | None, specs: Sequence[Any]) -> list[int]:
    """For each layer the first layer with the same id, whose weights it shares.

    Args:
        name: the argument's name, for error messages.
        ids: an id per layer, cycled over the depth. None: no two layers share weights.
        specs: what each layer is made of.

    Raises:
        TypeError: an id is not an int.
        ValueError: `ids` is empty, or layers with different specs have the same id.
    """
    if ids is None:
        return list(range(len(specs)))
    if not all(isinstance(key, int) for key in ids):
        raise TypeError(f"{name} must be ints, got {ids!r}")
    if not ids:
        raise ValueError(f"{name} must hold at least one id, got {ids!r}")
    first = [ids.index(ids[layer % len(ids)]) for layer in range(len(specs))]
    for layer, other in enumerate(first):
        if specs[layer] != specs[other]:
            raise ValueError(
                f"{name} must give the same id only to layers of one kind, got id {ids[other]} for "
                f"{specs[other]!r} and {specs[layer]!r}"
            )
    return first


def _resolve(
    kind: str, spec: Any, registry: Mapping[str, Callable[..., nn.Module]]
) -> tuple[str, Callable[..., nn.Module], Mapping[str, Any]]:
    """The name, the constructor and the options of a spec, the options' names checked."""
    if callable(spec):
        return getattr(spec, "__name__", type(spec).__name__), spec, {}
    name, options = (spec, {}) if isinstance(spec, str) else spec
    check_choice(kind, name, registry)
    for option in options:
        check_choice(f"option of {name!r}", option, sorted(_arguments(registry[name])))
    return name, registry[name], options


def _arguments(make: Callable[..., nn.Module]) -> set[str]:
    """The arguments of a constructor besides `dim` that no functools.partial has set."""
    return set(inspect.signature(make).parameters) - {"dim"} - set(getattr(make, "keywords", {}))
