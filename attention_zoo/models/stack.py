"""The body of a transformer: layers of attention blocks and feedforwards, each in a residual connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_zoo._arguments import RecordsArguments
from attention_zoo._checks import (
    check_choice,
    check_features,
    check_flag,
    check_fraction,
    check_instance,
    check_int,
    check_padding,
    check_positive,
    is_builtin,
)
from attention_zoo.layers.layer_scale import layer_scale_start
from attention_zoo.layers.norms import make_norm
from attention_zoo.layers.positions import as_rotary
from attention_zoo.layers.residual import RESIDUALS, Norm, Residual
from attention_zoo.layers.reversible import reversible as run_reversible
from attention_zoo.layers.state import State, count_tokens, register_state
from attention_zoo.layers.token_shift import TokenShift
from attention_zoo.models.layer_specs import (
    AttentionSpec,
    Block,
    FeedForwardSpec,
    check_directions,
    check_shared,
    first_with_same_id,
    make_block,
    make_feedforward,
    resolve_layers,
    run_block,
    saved_spec,
    takes,
)
from attention_zoo.models.over_streams import OverStreams
from attention_zoo.ops import TextImageLayout
from attention_zoo.ops.documents import Documents, as_documents
from attention_zoo.ops.masks import hide_masked
from attention_zoo.saving.compare import is_foreign
from attention_zoo.saving.encoding import PARTS, is_plain

DEEPEST = 2**16  # layers; more would take hours to build


class BlockInputs(NamedTuple):
    """Inputs of a block besides the features. A block gets those that its `forward` has a parameter for.

    Attributes:
        mask: (b, n) bool, True = a valid token.
        attn_mask: (n, n), (b, n, n) or (b, h, n, n), boolean (True = may attend) or additive; see `SelfAttention`.
        context: (b, j, context_dim), the sequence that cross-attention attends to.
        context_mask: (b, j) bool, True = a valid token of the context.
        document_ids: the documents of packed rows. Blocks of other packages get the tensor (b, n).
        context_document_ids: (b, j) int, the documents of the context.
    """

    mask: Tensor | None = None
    attn_mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    document_ids: Documents | None = None
    context_document_ids: Tensor | None = None


@dataclass
class StackState(State):
    """Decoding state of a stack.

    Attributes:
        blocks: the state of each block that has one, in the order of the layers.
        token_count: number of tokens so far, a 0-d tensor.
    """

    blocks: list[Any]
    token_count: Tensor


register_state(StackState)


class Sublayer(nn.Module):
    """A block in its residual connection: `residual.merge(x, block(residual.branch(x)))`.

    Args:
        block: an attention block or a feedforward.
        residual: the residual connection.
        tokenwise: whether the block treats every token by itself, so that decoding needs no state for it.
        spec: the spec of an attention block; None for a feedforward.
    """

    def __init__(self, block: nn.Module, residual: Residual, *, tokenwise: bool, spec: Block | None = None) -> None:
        super().__init__()
        self.tokenwise = tokenwise
        self.set_block(block, spec)
        self.residual = residual

    def set_block(self, block: nn.Module, spec: Block | None) -> None:
        """Set the block and its spec."""
        self.block: Any = block
        self.spec = spec
        names = [name for name in BlockInputs._fields if not self.tokenwise and takes(block, name)]
        # an attention mask is over the tokens of the stack, not over a context
        self.takes = tuple(name for name in names if name != "attn_mask" or "context" not in names)

    @property
    def attention(self) -> nn.Module | None:
        """The attention block without wrappers; None for a feedforward."""
        if self.spec is None:
            return None
        block = self.block
        while isinstance(block, (TokenShift, OverStreams)):
            block = block.block
        return block

    def forward(self, x: Tensor, inputs: BlockInputs, into: Tensor | None = None) -> Tensor:
        """Run the sub-layer.

        Args:
            x: (b, n, d), the residual stream that the block reads.
            inputs: the other inputs of the block.
            into: (b, n, d), the residual stream that the block's output is added to. None: x.

        Returns:
            (b, n, d).
        """
        y = self.block(self.residual.branch(x), **self._keywords(inputs))
        return self.residual.merge(x if into is None else into, y)

    def step(self, x: Tensor, state: Any, inputs: BlockInputs, into: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run the sub-layer on new tokens (b, t, d). Returns the features and the block's new state."""
        y = self.residual.branch(x)
        if self.tokenwise:
            y = self.block(y)
        elif hasattr(self.block, "step"):
            y, state = self.block.step(y, state, **self._keywords(inputs, decoding=True))
        else:
            raise TypeError(f"every block must have step to decode, but {type(self.block).__name__} has none")
        return self.residual.merge(x if into is None else into, y), state

    def attention_map(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """The attention map (b, h, i, j) of the block."""
        if not callable(getattr(self.attention, "attention_map", None)):
            raise TypeError(f"every block must have attention_map, but {type(self.attention).__name__} has none")
        return self.block.attention_map(self.residual.branch(x), **self._keywords(inputs))

    def delta(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """What the sub-layer adds to a stream, for `layers.reversible`, which does the addition itself."""
        return self.residual.delta(self.block(self.residual.branch(x), **self._keywords(inputs)))

    def _keywords(self, inputs: BlockInputs, *, decoding: bool = False) -> dict[str, Any]:
        names = (name for name in self.takes if not (decoding and "document" in name))  # a decoded row is one document
        keywords = {name: getattr(inputs, name) for name in names}
        if inputs.document_ids is not None and not is_builtin(self.block):
            keywords["document_ids"] = inputs.document_ids.ids
        return keywords


class Layer(nn.Module):
    """The sub-layers of one layer, in order: the unit of sharding, compilation and activation checkpointing."""

    def __init__(self, sublayers: Sequence[Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        for sublayer in self.sublayers:
            x = sublayer(x, inputs)
        return x


class Stack(RecordsArguments, nn.Module):
    """`depth` layers, each one or several attention blocks followed by a feedforward, and a final norm where needed.

    A block is one of

    - a name in BLOCKS, a class, or a function of dim that returns a module with `forward(x)`;
    - `(one of these, options)`, with arguments for the constructor;
    - a module, which is used as it is. Modules are not copied: a list that holds one has an entry for every layer.

    Shared arguments. `heads`, `dim_head`, `attn_dropout` (as `dropout`), `causal` and every keyword argument in
    `shared` (such as `rotary=`, `bias=`, `qkv_bias=`, `layout=`) are given to each block whose constructor has an
    argument of that name. All these blocks get the same object, so a module passed here has one set of weights. The
    options in `(name, options)` and arguments set by functools.partial take precedence. An argument that no block
    takes is an error, except for `causal`.

    Args:
        dim: features d.
        depth: number of layers.
        attention: the block of every layer, or a list cycled over the depth. A layer with several blocks is a list of
            them within the list: `[["full", "cross"]]`.
        feedforward: a name in FEEDFORWARDS, `(name, options)`, a function of dim, or None for no feedforward.
        norm: a name in NORMS, or a function of dim.
        residual: a name in RESIDUALS: "pre", "post", "sandwich" or "deepnorm".
        heads, dim_head: number and size of the heads of every block that takes them. None: the defaults of each block.
        causal: whether the blocks are causal. A block with an attribute `causal` that differs is an error, but for
            recurrences in a stack that is not causal and holds one with reverse=True. None: every block is as it says.
        attn_dropout: dropout probability of the attention weights.
        ff_dropout: dropout probability of the hidden features of the feedforwards.
        ff_mult: hidden features of the feedforward as a multiple of dim.
        layer_scale: whether every sub-layer's output has learned factors, small at the start; see `LayerScale`.
        token_shift: layout of text and image for token shift before every sub-layer; see `TokenShift`. None: no shift.
        shared_attn_ids, shared_ff_ids: an id per layer, cycled over the depth. Layers with the same id share the
            weights of their blocks, or of their feedforward; norms and layer scales are never shared.
        reversible: two residual streams, to which the sub-layers add in turn, each reading the other stream. The
            output is their mean. Activations are recomputed in backward, so that training keeps those of one
            sub-layer. No second derivative and no torch.compile.
        checkpoint_layers: activation checkpointing: only the input of every layer is kept, and the layer is
            recomputed in backward with the same dropout. Costs about a third more time.
        defaults: like `shared`, but it is no error if no block takes an argument.
        shared: see above.

    Raises:
        ValueError: an unknown name or option, a size below 1, options that exclude each other, an argument that no
            block takes, a block that sees the future with causal=True, of another dim or with another output shape.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        attention: AttentionSpec = "full",
        feedforward: FeedForwardSpec = "gelu",
        norm: Norm = "layer",
        residual: str = "pre",
        heads: int | None = None,
        dim_head: int | None = None,
        causal: bool | None = True,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        ff_mult: float = 4,
        layer_scale: bool = False,
        token_shift: TextImageLayout | None = None,
        shared_attn_ids: Sequence[int] | None = None,
        shared_ff_ids: Sequence[int] | None = None,
        reversible: bool = False,
        checkpoint_layers: bool = False,
        defaults: Mapping[str, Any] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__()
        check_int(1, dim=dim, depth=depth)
        check_positive(heads=heads, dim_head=dim_head)
        if depth > DEEPEST:
            raise ValueError(f"depth must be at most {DEEPEST}, got {depth=}")
        check_flag(layer_scale=layer_scale, reversible=reversible, checkpoint_layers=checkpoint_layers)
        check_instance(Mapping, type(None), defaults=defaults)
        check_instance(TextImageLayout, type(None), token_shift=token_shift)
        check_choice("residual", residual, RESIDUALS)
        check_fraction(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        if ff_dropout and (feedforward is None or callable(feedforward)):
            raise ValueError(f"ff_dropout must be 0 with feedforward={feedforward!r}, got {ff_dropout=}")
        if reversible and not RESIDUALS[residual].additive:
            raise ValueError(f"residual must add to the stream with reversible=True, got {residual=}")
        if reversible and checkpoint_layers:
            raise ValueError("checkpoint_layers must be False with reversible=True, which keeps no activations already")
        self.dim = dim
        self.causal = causal
        self.reversible = reversible
        self.checkpoint_layers = checkpoint_layers
        self.token_shift = token_shift
        shared = {"heads": heads, "dim_head": dim_head, "dropout": attn_dropout or None, **shared}
        shared = {name: part for name, part in shared.items() if part is not None}
        if "rotary" in shared:
            shared["rotary"] = as_rotary(shared["rotary"])  # once, not in every block
        specs = resolve_layers(attention, depth)
        check_shared(shared, specs, attention)
        self._shared = {**(defaults or {}), **shared}
        self._explicit = frozenset(shared)  # those that at least one block must take
        self.fixed_blocks = 0  # blocks at the end of every layer that a model adds, for itself
        self._replaced = False  # whether a block was replaced after construction
        attn_from = first_with_same_id(
            "shared_attn_ids", shared_attn_ids, [[block.spec for block in layer] for layer in specs]
        )
        ff_from = first_with_same_id("shared_ff_ids", shared_ff_ids, [feedforward] * depth)

        self.layers = nn.ModuleList()
        blocks: dict[tuple[str, int, int], nn.Module] = {}  # by the layer and place where the weights first occur
        for layer in range(depth):
            entries: dict[tuple[str, int, int], Block | None] = {
                ("attention", attn_from[layer], place): spec for place, spec in enumerate(specs[layer])
            }
            if feedforward is not None:
                entries["feedforward", ff_from[layer], 0] = None
            scale = layer_scale_start(layer) if layer_scale else None
            sublayers = []
            for key, spec in entries.items():
                connection = RESIDUALS[residual](dim, norm=norm, depth=depth, scale=scale)
                if key not in blocks and spec is not None:
                    blocks[key] = self.make_block(spec, connection)
                elif key not in blocks:
                    block = make_feedforward(feedforward, dim, mult=ff_mult, dropout=ff_dropout)
                    connection.initialize(block)
                    blocks[key] = block if token_shift is None else TokenShift(block, dim, layout=token_shift)
                tokenwise = spec is None and token_shift is None
                sublayers.append(Sublayer(blocks[key], connection, tokenwise=tokenwise, spec=spec))
            self.layers.append(Layer(sublayers))
        self._check_directions()
        self.norm = make_norm(norm, dim) if RESIDUALS[residual].final_norm else nn.Identity()
        self.takes_context = any("context" in sublayer.takes for sublayer in self.sublayers())
        if reversible and self.takes_context:
            raise ValueError("reversible must be False with blocks that read a context, got reversible=True")

    def make_block(self, spec: Block, connection: Residual) -> nn.Module:
        """A block of this stack: built, initialised for its residual connection, and wrapped where needed."""
        block = make_block(spec, self.dim, causal=self.causal, shared=self._shared)
        if not spec.is_module:
            connection.initialize(block)
        streams, own = self._shared.get("streams", 1), getattr(block, "streams", 1)
        if own not in (1, streams):
            raise ValueError(
                f"attention {spec.name!r} must have the streams of the model, {streams}, got streams={own}"
            )
        block = block if own == 1 else OverStreams(block)
        return block if self.token_shift is None else TokenShift(block, self.dim, layout=self.token_shift)

    def replace(self, sublayer: Sublayer, block: nn.Module, spec: Block) -> None:
        """Set the block of a sub-layer; `arguments` have its spec from then on. See `replace_block`."""
        before = sublayer.block, sublayer.spec
        sublayer.set_block(block, spec)
        try:
            self._check_directions()
        except ValueError:
            sublayer.set_block(*before)
            raise
        self._replaced = True

    def _check_directions(self) -> None:
        if self.causal is False:
            check_directions([(sub.spec.name, sub.attention) for sub in self.sublayers() if sub.spec is not None])

    @property
    def is_replaced(self) -> bool:
        """Whether a block was replaced after construction."""
        return self._replaced

    @property
    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments
        if self._replaced:
            arguments["attention"] = self._per_layer(lambda sub: sub.spec.spec)
            for name in self.unused_parts():
                if name in ("heads", "dim_head"):
                    arguments[name] = None
                elif name == "dropout":
                    arguments["attn_dropout"] = 0.0
                else:
                    del arguments[name]
        return arguments

    def unused_parts(self) -> list[str]:
        """The shared arguments that no block takes any more, because blocks were replaced."""
        taken = {name for sub in self.sublayers() if sub.spec is not None for name in sub.spec.takes}
        return sorted(self._explicit - taken)

    def saved_arguments(self) -> dict[str, Any]:
        arguments = self.arguments
        arguments |= {name: part for name, part in self._shared.items() if name in arguments}
        return arguments if is_plain(arguments["attention"]) else {**arguments, "attention": self.saved_attention()}

    def saved_attention(self) -> list[Any]:
        """The argument `attention` that builds the present blocks, made of names and options, an entry per layer.

        Raises:
            TypeError: a block cannot be saved; see `saved_spec`.
        """
        options: dict[str, Any] = {"causal": self.causal, "shared": self._shared}
        return self._per_layer(lambda sub: saved_spec(sub.spec, sub.attention, **options))

    def _per_layer(self, of: Callable[[Any], Any]) -> list[Any]:
        """A list with `of(sublayer)` for the attention of every layer, or a list of them if there are several."""
        layers = [[of(sub) for sub in layer.sublayers if sub.spec is not None] for layer in self.layers]  # type: ignore
        return [layer[0] if len(layer) == 1 else layer for layer in layers]

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        context_document_ids: Tensor | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            x: (b, n, d).
            mask: (b, n) bool, True = a valid token.
            attn_mask: which keys each query may attend to, besides causality and padding; see `SelfAttention`.
            context: (b, j, context_dim), for the blocks that read one.
            context_mask: (b, j) bool, True = a valid token of the context.
            document_ids: (b, n) int, for packed rows: a document is a maximal run of equal ids, and gets what it would
                get alone.
            context_document_ids: (b, j) int, where there is a context: a token attends to the part with its own id.

        Returns:
            (b, n, d).

        Raises:
            ValueError: a mask or document ids that a block does not take, a context that no block takes, a missing
                context, or a wrong shape.
        """
        documents = as_documents(document_ids, x)
        inputs = BlockInputs(mask, attn_mask, context, context_mask, documents, context_document_ids)
        self._check_inputs(x, inputs)
        x = hide_masked(x, mask)
        if self.takes_context and context is None:
            raise ValueError("context must be given to a stack with blocks that read one, got None")
        if self.reversible:
            sublayers = self.sublayers()
            first, second = run_reversible([partial(sub.delta, inputs=inputs) for sub in sublayers], sublayers, x)
            return self.norm((first + second) / 2)
        recompute = self.checkpoint_layers and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, inputs, use_reentrant=False) if recompute else layer(x, inputs)
        return self.norm(x)

    def step(
        self,
        x: Tensor,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """Run all layers on new tokens.

        Args:
            x: (b, t, d), t >= 1 new tokens.
            state: the state returned by the previous step; None for the first. It is not modified.
            mask: (b, t) bool, True = a valid token.
            attn_mask: the rows of the new tokens, with a column for every token so far.
            context, context_mask: see `forward`; only in the first step.

        Returns:
            (b, t, d) and the new state.

        Raises:
            TypeError: `state` is of another stack, or a block has no `step`.
            ValueError: see `forward`.
        """
        inputs = BlockInputs(mask, attn_mask, context, context_mask)
        self._check_inputs(x, inputs)
        x = hide_masked(x, mask)
        sublayers = self.sublayers()
        count = sum(not sub.tokenwise for sub in sublayers)
        if state is not None and (not isinstance(state, StackState) or len(state.blocks) != count):
            got = f"one of {len(state.blocks)} blocks" if isinstance(state, StackState) else type(state).__name__
            raise TypeError(f"state must be a StackState of {count} blocks, got {got}")
        old = iter([None] * count if state is None else state.blocks)
        new = []
        other = x  # the second stream of reversible layers
        for sub in sublayers:
            block_state = None if sub.tokenwise else next(old)
            y, block_state = sub.step(x, block_state, inputs, into=other if self.reversible else x)
            other, x = x, y
            if not sub.tokenwise:
                new.append(block_state)
        if self.reversible:
            x = (x + other) / 2
        token_count = count_tokens(None if state is None else state.token_count, x.shape[1], x.device)
        return self.norm(x), StackState(new, token_count)

    def attention_maps(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        context_document_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """The attention map (b, h, i, j) of the first block of every layer. Arguments as in `forward`.

        Raises:
            TypeError: a block has no `attention_map`.
        """
        documents = as_documents(document_ids, x)
        inputs = BlockInputs(mask, attn_mask, context, context_mask, documents, context_document_ids)
        self._check_inputs(x, inputs)
        maps = []
        other = x  # the second stream of reversible layers
        for layer in self.layers:
            for place, sub in enumerate(layer.sublayers):  # type: ignore[arg-type]
                if place == 0:
                    maps.append(sub.attention_map(x, inputs))
                y = sub(x, inputs, into=other if self.reversible else x)
                other, x = x, y
        return maps

    def output_difference(self, twin: Stack) -> str | None:
        """The first block of another package that has not the output of that of `twin`, given its weights, or None.

        A block is run on two tokens. The weights of the blocks of `twin` are overwritten.
        """
        for index, layer in enumerate(self.layers):
            for place, sub in enumerate(layer.sublayers):  # type: ignore[arg-type]
                block: Any = sub.attention
                if block is None or not is_foreign(block) or "context" in sub.takes:
                    continue
                other: Any = twin.layers[index].sublayers[place].attention  # type: ignore[index, union-attr]
                x, output = run_block(block, self.dim)
                other.to(x.device).load_state_dict(block.state_dict(), assign=True)
                try:
                    torch.testing.assert_close(run_block(other, self.dim)[1], output, equal_nan=True)
                except AssertionError:
                    return f"layers.{index}.sublayers.{place}.block, a {type(block).__name__}"
        return None

    def sublayers(self) -> list[Sublayer]:
        """All sub-layers, in the order in which they run."""
        return [sub for layer in self.layers for sub in layer.sublayers]  # type: ignore[union-attr]

    @property
    def fsdp_wrap_classes(self) -> tuple[type[nn.Module], ...]:
        """The classes of the modules to shard, compile or checkpoint one by one: `Layer`.

        Empty with reversible streams, which run the sub-layers without calling the layers.
        """
        return () if self.reversible else (Layer,)

    def _check_inputs(self, x: Tensor, inputs: BlockInputs) -> None:
        check_features(x, self.dim)
        check_padding(inputs.mask, x)
        if inputs.document_ids is not None and self.reversible:
            raise ValueError("document_ids must be None with reversible=True")
        for name in ("mask", "attn_mask", "document_ids"):
            for sub in self.sublayers() if getattr(inputs, name) is not None else ():
                # an ignored mask would be a silent error; a feedforward sees one token
                if sub.tokenwise or name in sub.takes:
                    continue
                if name != "attn_mask" or (sub.attention is not None and "context" not in sub.takes):
                    raise ValueError(
                        f"{name} must be None with {type(sub.block).__name__}, whose forward takes no {name}"
                    )
        if inputs.context is not None and not self.takes_context:
            raise ValueError("context must be None for a stack without blocks that read one")
        if inputs.context is None and inputs.context_mask is not None:
            raise ValueError("context_mask must come with a context, got context=None")


PARTS["Stack"] = Stack
