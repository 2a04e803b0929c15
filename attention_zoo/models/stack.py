"""A transformer's body: any block in any layer, each in its residual connection, followed by a feedforward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from attention_zoo.attention import BLOCKS
from attention_zoo.layers.checks import check_choice, check_features, check_fraction, check_padding, check_positive
from attention_zoo.layers.feedforward import FEEDFORWARDS
from attention_zoo.layers.norms import make_norm
from attention_zoo.layers.residual import RESIDUALS, Norm, Residual
from attention_zoo.layers.state import State, count_tokens, register_state

# One sub-layer: a name in BLOCKS, (name, options), or a function of dim that returns a block.
BlockSpec = str | tuple[str, Mapping[str, Any]] | Callable[..., nn.Module]
# One layer: a sub-layer, or a list of those.
LayerSpec = BlockSpec | Sequence[BlockSpec]
FeedForwardSpec = str | tuple[str, Mapping[str, Any]] | Callable[..., nn.Module] | None


@dataclass
class StackState(State):
    """The states of a stack's blocks.

    Attributes:
        blocks: the state of each block that has one, in the order of the layers.
        seen: tokens so far, a tensor without axes.
    """

    blocks: list[Any]
    seen: Tensor

    @property
    def length(self) -> int:
        return int(self.seen)


register_state(StackState)


class Sublayer(nn.Module):
    """A block in its residual connection.

    Args:
        block: attention, or a feedforward.
        residual: the rule by which it joins the stream.
        tokenwise: the block treats every token by itself, so that decoding needs no state for it.
    """

    def __init__(self, block: nn.Module, residual: Residual, *, tokenwise: bool) -> None:
        super().__init__()
        self.block: Any = block
        self.residual = residual
        self.tokenwise = tokenwise
        taken = () if tokenwise else inspect.signature(block.forward).parameters
        self.takes = tuple(name for name in ("mask", "context", "context_mask") if name in taken)

    def forward(self, x: Tensor, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Run the block on (b, n, d) beside those of `inputs` that it takes."""
        y = self.block(self.residual.branch(x), **{name: inputs[name] for name in self.takes})
        return self.residual.merge(x, y)

    def step(self, x: Tensor, state: Any, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Any]:
        """Run the block on new tokens (b, t, d)."""
        y, state = self.block.step(self.residual.branch(x), state, **{name: inputs[name] for name in self.takes})
        return self.residual.merge(x, y), state


class Layer(nn.Module):
    """The sub-layers of one layer, in order. The unit to shard, to compile or to checkpoint."""

    def __init__(self, sublayers: Sequence[Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, x: Tensor, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        for sublayer in self.sublayers:
            x = sublayer(x, inputs)
        return x


class Stack(nn.Module):
    """Layers of blocks and feedforwards around one stream of features.

    Args:
        dim: features d.
        depth: number of layers.
        attention: the block of every layer, or a list cycled over the depth. A block is a name in BLOCKS,
            `(name, options)`, or a function that takes dim (and any shared part it has a parameter for) and returns a
            module with the contract's `forward`. A layer may be a list of blocks: `["full", "cross"]` within the list.
        feedforward: a name in FEEDFORWARDS, `(name, options)`, a function of dim, or None for no feedforward.
        norm: a name in NORMS, or a function of dim.
        residual: a name in RESIDUALS: "pre", "post", "sandwich", "deepnorm".
        heads, dim_head: passed to every block that has them; None leaves each block its own default.
        causal: passed to every block. False is an error for a block that is always causal.
        attn_dropout, ff_dropout: probabilities with which attention weights and hidden features are dropped.
        ff_mult: hidden features of the feedforward as a multiple of dim.
        shared: parts such as `rotary=` or `bias=`; each goes to the blocks whose constructor has that name.

    Raises:
        ValueError: an unknown name or option (the nearest is proposed), a size below 1, a shared part no block takes.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        attention: LayerSpec | Sequence[LayerSpec] = "full",
        feedforward: FeedForwardSpec = "gelu",
        norm: Norm = "layer",
        residual: str = "pre",
        heads: int | None = None,
        dim_head: int | None = None,
        causal: bool = True,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        ff_mult: float = 4,
        **shared: Any,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, heads=heads, dim_head=dim_head)
        check_choice("residual", residual, RESIDUALS)
        check_fraction(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        if ff_dropout and (feedforward is None or callable(feedforward)):
            raise ValueError(f"ff_dropout must be 0 beside feedforward={feedforward!r}, got {ff_dropout=}")
        self.dim = dim
        self.causal = causal
        wanted = {"heads": heads, "dim_head": dim_head, "dropout": attn_dropout or None, **shared}
        parts = {name: part for name, part in wanted.items() if part is not None}
        layers = parse_layers(attention)
        used: set[str] = set()
        rule = RESIDUALS[residual]

        def sublayer(block: nn.Module, *, tokenwise: bool = False) -> Sublayer:
            connection = rule(dim, norm=norm, depth=depth)
            connection.initialize(block)
            return Sublayer(block, connection, tokenwise=tokenwise)

        self.layers = nn.ModuleList()
        for index in range(depth):
            sublayers = []
            for spec in layers[index % len(layers)]:
                block, taken = make_block(spec, dim, causal, parts)
                used |= taken
                sublayers.append(sublayer(block))
            if feedforward is not None:
                block = make_feedforward(feedforward, dim, mult=ff_mult, dropout=ff_dropout)
                sublayers.append(sublayer(block, tokenwise=True))
            self.layers.append(Layer(sublayers))
        unused = sorted(set(parts) - used)
        if unused:
            name = "attn_dropout" if unused[0] == "dropout" else unused[0]
            raise ValueError(f"{name} must be taken by at least one block, but none of {attention!r} has it")
        self.norm = make_norm(norm, dim) if rule.final_norm else nn.Identity()
        self.takes_context = any("context" in sub.takes for sub in self.sublayers())

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            x: (b, n, d).
            mask: (b, n) bool, True = a real token.
            context: (b, j, context_dim) for the blocks that read one.
            context_mask: (b, j) bool.

        Returns:
            (b, n, d).
        """
        inputs = self._inputs(x, mask, context, context_mask)
        if self.takes_context and context is None:
            raise ValueError("context must be given to a stack with blocks that read one, got None")
        for layer in self.layers:
            x = layer(x, inputs)
        out: Tensor = self.norm(x)
        return out

    def step(
        self,
        x: Tensor,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """Run all layers on new tokens (b, t, d); the context comes with the first step alone."""
        inputs = self._inputs(x, mask, context, context_mask)
        sublayers = self.sublayers()
        count = sum(not sub.tokenwise for sub in sublayers)
        if state is not None and (not isinstance(state, StackState) or len(state.blocks) != count):
            raise TypeError(f"state must be a StackState of {count} blocks, got {_describe(state)}")
        old = iter([None] * count if state is None else state.blocks)
        new = []
        for sub in sublayers:
            if sub.tokenwise:
                x = sub(x, inputs)
                continue
            if not hasattr(sub.block, "step"):
                raise TypeError(f"every block must have step to decode, but {type(sub.block).__name__} has none")
            x, block_state = sub.step(x, next(old), inputs)
            new.append(block_state)
        seen = count_tokens(None if state is None else state.seen, x.shape[1])
        return self.norm(x), StackState(new, seen)

    def sublayers(self) -> list[Sublayer]:
        """All sub-layers, in the order in which they run."""
        return [sub for layer in self.layers for sub in cast(Layer, layer).sublayers]  # type: ignore[misc]

    def _inputs(
        self, x: Tensor, mask: Tensor | None, context: Tensor | None, context_mask: Tensor | None
    ) -> dict[str, Tensor | None]:
        check_features(x, self.dim)
        check_padding(mask, x)
        if context is not None and not self.takes_context:
            raise ValueError("context must be read by a block of the stack, but none takes one")
        if context is None and context_mask is not None:
            raise ValueError("context_mask must come with a context, got context=None")
        return {"mask": mask, "context": context, "context_mask": context_mask}


def _describe(state: object) -> str:
    return f"one of {len(state.blocks)} blocks" if isinstance(state, StackState) else type(state).__name__


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
