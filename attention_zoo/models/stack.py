"""A transformer's body: any block in any layer, each in its residual connection, followed by a feedforward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_zoo._checks import check_choice, check_features, check_fraction, check_padding, check_positive
from attention_zoo.layers.layer_scale import layer_scale_start
from attention_zoo.layers.norms import make_norm
from attention_zoo.layers.residual import RESIDUALS, Norm, Residual
from attention_zoo.layers.reversible import reversible as run_reversible
from attention_zoo.layers.state import State, count_tokens, register_state
from attention_zoo.layers.token_shift import TokenShift
from attention_zoo.models.layer_specs import (
    BlockSpec,
    FeedForwardSpec,
    LayerSpec,
    make_block,
    make_feedforward,
    parse_layers,
    shared_blocks,
)
from attention_zoo.ops.sparse.image_layout import TextImageLayout


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
        return self.residual.merge(x, self._branch(x, inputs))

    def delta(self, x: Tensor, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """What the block adds to the stream when it reads x."""
        return self.residual.delta(self._branch(x, inputs))

    def _branch(self, x: Tensor, inputs: Mapping[str, Tensor | None]) -> Tensor:
        y: Tensor = self.block(self.residual.branch(x), **{name: inputs[name] for name in self.takes})
        return y

    def step(self, x: Tensor, state: Any, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Any]:
        """Run the block on new tokens (b, t, d)."""
        y, state = self._step_branch(x, state, inputs)
        return self.residual.merge(x, y), state

    def step_delta(self, x: Tensor, state: Any, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Any]:
        """What the block adds to the stream when it reads new tokens (b, t, d)."""
        y, state = self._step_branch(x, state, inputs)
        return self.residual.delta(y), state

    def _step_branch(self, x: Tensor, state: Any, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Any]:
        if self.tokenwise:
            return self._branch(x, inputs), None
        if not hasattr(self.block, "step"):
            raise TypeError(f"every block must have step to decode, but {type(self.block).__name__} has none")
        y, state = self.block.step(self.residual.branch(x), state, **{name: inputs[name] for name in self.takes})
        return y, state


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
        layer_scale: learned factors on what every sub-layer adds, small at the start; see `LayerScale`.
        token_shift: a layout of text and image in which every sub-layer sees shifted tokens; see `TokenShift`.
        shared_attn_ids, shared_ff_ids: an id per layer, cycled over the depth: layers with the same id share the
            weights of their blocks, or of their feedforward. Norms and factors stay their own.
        reversible: two streams, each sub-layer adding to one what it makes of the other; the result is their mean.
            Training memory for activations is that of one sub-layer. No second derivative, no torch.compile.
        checkpoint_layers: keep only the input of every layer for backward, which runs the layer again, dropout
            included: activation memory of one layer and depth inputs, for a third more time.
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
        layer_scale: bool = False,
        token_shift: TextImageLayout | None = None,
        shared_attn_ids: Sequence[int] | None = None,
        shared_ff_ids: Sequence[int] | None = None,
        reversible: bool = False,
        checkpoint_layers: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, heads=heads, dim_head=dim_head)
        check_choice("residual", residual, RESIDUALS)
        check_fraction(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        if ff_dropout and (feedforward is None or callable(feedforward)):
            raise ValueError(f"ff_dropout must be 0 beside feedforward={feedforward!r}, got {ff_dropout=}")
        if reversible and not RESIDUALS[residual].additive:
            raise ValueError(f"residual must add to the stream with reversible=True, got {residual=}")
        if reversible and checkpoint_layers:
            raise ValueError("checkpoint_layers must be False with reversible=True, which keeps no activations already")
        self.dim = dim
        self.causal = causal
        self.reversible = reversible
        self.checkpoint_layers = checkpoint_layers
        self.shifts = token_shift is not None
        wanted = {"heads": heads, "dim_head": dim_head, "dropout": attn_dropout or None, **shared}
        parts = {name: part for name, part in wanted.items() if part is not None}
        layers = parse_layers(attention)
        used: set[str] = set()
        rule = RESIDUALS[residual]
        made: dict[tuple[int, int], tuple[BlockSpec, nn.Module]] = {}
        feedforwards: dict[int, nn.Module] = {}

        def sublayer(block: nn.Module, layer: int, *, fresh: bool, tokenwise: bool = False) -> Sublayer:
            connection = rule(dim, norm=norm, depth=depth, scale=layer_scale_start(layer) if layer_scale else None)
            if fresh:
                connection.initialize(block)
            if token_shift is not None:
                block = TokenShift(block, dim, layout=token_shift)
            return Sublayer(block, connection, tokenwise=tokenwise and token_shift is None)

        self.layers = nn.ModuleList()
        attn_ids = shared_blocks("shared_attn_ids", shared_attn_ids, depth)
        ff_ids = shared_blocks("shared_ff_ids", shared_ff_ids, depth)
        for index, (attn_id, ff_id) in enumerate(zip(attn_ids, ff_ids, strict=True)):
            sublayers = []
            for place, spec in enumerate(layers[index % len(layers)]):
                key = (attn_id, place)
                fresh = key not in made
                if fresh:
                    block, taken = make_block(spec, dim, causal, parts)
                    used |= taken
                    made[key] = spec, block
                elif made[key][0] != spec:
                    raise ValueError(
                        f"shared_attn_ids must give one id to layers of one kind, got id {attn_id} for "
                        f"{made[key][0]!r} and {spec!r}"
                    )
                sublayers.append(sublayer(made[key][1], index, fresh=fresh))
            if feedforward is not None:
                fresh = ff_id not in feedforwards
                if fresh:
                    feedforwards[ff_id] = make_feedforward(feedforward, dim, mult=ff_mult, dropout=ff_dropout)
                sublayers.append(sublayer(feedforwards[ff_id], index, fresh=fresh, tokenwise=True))
            self.layers.append(Layer(sublayers))
        unused = sorted(set(parts) - used)
        if unused:
            name = "attn_dropout" if unused[0] == "dropout" else unused[0]
            raise ValueError(f"{name} must be taken by at least one block, but none of {attention!r} has it")
        self.norm = make_norm(norm, dim) if rule.final_norm else nn.Identity()
        self.takes_context = any("context" in sub.takes for sub in self.sublayers())
        if reversible and self.takes_context:
            raise ValueError("reversible must be False with blocks that read a context, got reversible=True")

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
        if self.reversible:
            x = self._run_reversible(x, inputs)
        else:
            saving = self.checkpoint_layers and torch.is_grad_enabled()
            for layer in self.layers:
                x = checkpoint(layer, x, inputs, use_reentrant=False) if saving else layer(x, inputs)
        out: Tensor = self.norm(x)
        return out

    @property
    def fsdp_wrap_classes(self) -> tuple[type[nn.Module], ...]:
        """The classes whose modules are to be sharded, compiled or checkpointed one by one: `Layer`.

        None with reversible streams, which run the parts of a layer and never the layer.
        """
        return () if self.reversible else (Layer,)

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
        streams = [x, x]
        for k, sub in enumerate(sublayers):
            block_state = None if sub.tokenwise else next(old)
            if self.reversible:
                delta, block_state = sub.step_delta(streams[1 - k % 2], block_state, inputs)
                streams[k % 2] = streams[k % 2] + delta
            else:
                x, block_state = sub.step(x, block_state, inputs)
            if not sub.tokenwise:
                new.append(block_state)
        if self.reversible:
            x = (streams[0] + streams[1]) / 2
        seen = count_tokens(None if state is None else state.seen, x.shape[1])
        return self.norm(x), StackState(new, seen)

    def _run_reversible(self, x: Tensor, inputs: Mapping[str, Tensor | None]) -> Tensor:
        sublayers = self.sublayers()
        functions = [partial(sub.delta, inputs=inputs) for sub in sublayers]
        first, second = run_reversible(functions, sublayers, x)
        return (first + second) / 2

    def sublayers(self) -> list[Sublayer]:
        """All sub-layers, in the order in which they run."""
        return [sub for layer in self.layers for sub in cast(Layer, layer).sublayers]  # type: ignore[misc]

    def _inputs(
        self, x: Tensor, mask: Tensor | None, context: Tensor | None, context_mask: Tensor | None
    ) -> dict[str, Tensor | None]:
        check_features(x, self.dim)
        check_padding(mask, x)
        if mask is not None:
            for sub in self.sublayers():
                if not sub.tokenwise and "mask" not in sub.takes:  # ignored padding would be a silent error
                    raise ValueError(
                        f"mask must be None with {type(sub.block).__name__}, whose forward takes no mask, "
                        f"got shape {tuple(mask.shape)}"
                    )
        if context is not None and not self.takes_context:
            raise ValueError("context must be read by a block of the stack, but none takes one")
        if context is None and context_mask is not None:
            raise ValueError("context_mask must come with a context, got context=None")
        return {"mask": mask, "context": context, "context_mask": context_mask}


def _describe(state: object) -> str:
    return f"one of {len(state.blocks)} blocks" if isinstance(state, StackState) else type(state).__name__
