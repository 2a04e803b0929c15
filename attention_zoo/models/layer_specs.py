"""From what a user writes for a layer to the modules that it names."""

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
# One layer: a sub-layer, or a list of those.
LayerSpec = BlockSpec | Sequence[BlockSpec]
FeedForwardSpec = str | tuple[str, Mapping[str, Any]] | Callable[..., nn.Module] | None


def is_named(spec: object) -> bool:
    """Whether `spec` is (name, options); a list, as JSON makes of the tuple, counts."""
    return isinstance(spec, (tuple, list)) and len(spec) == 2 and isinstance(spec[1], Mapping)


def parse_layers(attention: LayerSpec | Sequence[LayerSpec]) -> list[list[BlockSpec]]:
    """The blocks of each layer of one cycle, from any of the forms that `Stack` takes.

    Raises:
        ValueError: an empty list.
        TypeError: something that is no block.
    """
    if isinstance(attention, str) or callable(attention) or is_named(attention):
        return [[attention]]  # type: ignore[list-item]
    if not isinstance(attention, (list, tuple)):
        raise TypeError(f"attention must be a name, (name, options), a callable or a list, got {attention!r}")
    layers = []
    for layer in attention:
        whole = isinstance(layer, (list, tuple)) and not is_named(layer)
        layers.append(list(layer) if whole else [layer])
    if not layers or not all(layers):
        raise ValueError(f"attention must name at least one block per layer, got {attention!r}")
    for spec in (spec for layer in layers for spec in layer):
        if not (isinstance(spec, str) or callable(spec) or is_named(spec)):
            raise TypeError(f"attention must be made of names, (name, options) and callables, got {spec!r}")
    return layers


def make_block(spec: BlockSpec, dim: int, causal: bool, parts: Mapping[str, Any]) -> tuple[nn.Module, set[str]]:
    """Build one block, with the shared parts that its constructor has a name for.

    Returns:
        The block, and the names of the parts that it took.

    Raises:
        ValueError: an unknown block or option, or a block that cannot be bidirectional in a stack that is.
    """
    if isinstance(spec, str):
        spec = (spec, {})
    if is_named(spec):
        name, options = spec  # type: ignore[misc]
        check_choice("attention", name, BLOCKS)
        make: Callable[..., nn.Module] = BLOCKS[name]
    elif callable(spec):
        name, options, make = getattr(spec, "__name__", type(spec).__name__), {}, spec
    else:
        raise TypeError(f"attention must be a name, (name, options) or a callable, got {spec!r}")
    bound = getattr(make, "keywords", {})  # what functools.partial has settled is not overruled
    known = {key for key in inspect.signature(make).parameters if key != "dim" and key not in bound}
    for option in options:
        check_choice(f"option of {name!r}", option, sorted(known))
    taken = {key: part for key, part in parts.items() if key in known}
    if "causal" in known:
        taken["causal"] = causal
    block = make(dim, **{**taken, **options})
    if not causal and getattr(block, "causal", False) and "context" not in inspect.signature(block.forward).parameters:
        raise ValueError(f"causal=False must be possible for every block, but {name!r} is causal")
    return block, set(taken)


def make_feedforward(spec: FeedForwardSpec, dim: int, **defaults: Any) -> nn.Module:
    """Build one feedforward; options of `(name, options)` go before `defaults`.

    Raises:
        ValueError: an unknown name or option.
    """
    if isinstance(spec, str):
        spec = (spec, {})
    if is_named(spec):
        name, options = spec  # type: ignore[misc]
        check_choice("feedforward", name, FEEDFORWARDS)
        known = inspect.signature(FEEDFORWARDS[name]).parameters
        for option in options:
            check_choice(f"option of {name!r}", option, sorted(set(known) - {"dim"}))
        return FEEDFORWARDS[name](dim, **{**defaults, **options})
    if callable(spec):
        return spec(dim)
    raise TypeError(f"feedforward must be a name, (name, options), a callable or None, got {spec!r}")


def takes_part(attention: LayerSpec | Sequence[LayerSpec], name: str) -> bool:
    """Whether a block of these layers has a constructor argument called `name`, for a part that blocks share."""
    for layer in parse_layers(attention):
        for spec in layer:
            block: Any = spec[0] if is_named(spec) else spec  # type: ignore[index]
            if isinstance(block, str):
                check_choice("attention", block, BLOCKS)
                block = BLOCKS[block]
            if name in inspect.signature(block).parameters:
                return True
    return False


def shared_blocks(name: str, ids: Sequence[int] | None, depth: int) -> list[int]:
    """For each layer the id whose weights it has: the given ids cycled over the depth, or one of its own.

    Raises:
        TypeError: `ids` are not ints.
        ValueError: there are none.
    """
    if ids is None:
        return list(range(depth))
    if not all(isinstance(key, int) for key in ids):
        raise TypeError(f"{name} must be ints, got {ids!r}")
    if not ids:
        raise ValueError(f"{name} must hold at least one id, got {ids!r}")
    return [ids[layer % len(ids)] for layer in range(depth)]
