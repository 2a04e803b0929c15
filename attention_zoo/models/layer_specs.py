"""Layer specs: how a user names the blocks and feedforwards of a stack, how they are built, and how they are saved."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attention_zoo._arguments import RecordsArguments, takes_any_keyword
from attention_zoo._checks import check_choice, check_instance, is_builtin
from attention_zoo.attention import BLOCKS
from attention_zoo.layers.feedforward import FEEDFORWARDS

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
Make = Callable[..., nn.Module]
# What a stack gives to a block besides the features, if its `forward` has an argument of the name.
INPUTS = ("mask", "attn_mask", "context", "context_mask", "document_ids", "context_document_ids")
# One block: a name in BLOCKS, a class, a function of dim that returns a module, either with options, or a module.
BlockSpec = str | Make | nn.Module | tuple[str | Make, Mapping[str, Any]]
# One layer: a block, or a list of blocks.
LayerSpec = BlockSpec | Sequence[BlockSpec]
# The attention of a whole stack: one layer, or a list of layers cycled over the depth.
AttentionSpec = LayerSpec | Sequence[LayerSpec]
FeedForwardSpec = str | tuple[str, Mapping[str, Any]] | Make | None


@dataclass(frozen=True)
class Block:
    """A resolved `BlockSpec`.

    Attributes:
        spec: what the user wrote.
        name: of the block, for error messages.
        make: the constructor, or None for a module.
        options: arguments for the constructor.
        takes: names of the constructor's arguments besides `dim` and those that functools.partial has set.
        required: those of them without a default.
    """

    spec: Any
    name: str
    make: Make | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()

    @property
    def is_module(self) -> bool:
        return self.make is None

    @property
    def is_named(self) -> bool:
        """Whether the spec is a name, or a name with options."""
        return isinstance(self.spec, str) or (not self.is_module and has_options(self.spec) and self.spec[0] in BLOCKS)


def has_options(spec: object) -> bool:
    """Whether `spec` is (name or constructor, options), as a tuple or, read from JSON, a list."""
    return isinstance(spec, (tuple, list)) and len(spec) == 2 and isinstance(spec[1], Mapping)


def is_block(spec: object) -> bool:
    """Whether `spec` is one block rather than a list."""
    return isinstance(spec, str) or callable(spec) or has_options(spec)


def parse_layers(attention: AttentionSpec) -> list[list[Any]]:
    """The block specs of each layer of one cycle.

    Raises:
        TypeError: `attention` or an entry of it is not a spec.
        ValueError: a list is empty.
    """
    if is_block(attention):
        return [[attention]]
    if not isinstance(attention, Sequence):
        raise TypeError(f"attention must be a block or a list, {KINDS}, got {attention!r}")
    layers = [list(layer) if isinstance(layer, Sequence) and not is_block(layer) else [layer] for layer in attention]
    if not layers or not all(layers):
        raise ValueError(f"attention must name at least one block per layer, got {attention!r}")
    for spec in (spec for layer in layers for spec in layer):
        if not is_block(spec):
            raise TypeError(f"attention must be made of blocks, {KINDS}, got {spec!r}")
    return layers


KINDS = "each a name, a class, a function of dim, (one of these, options) or a module"


def resolve_layers(attention: AttentionSpec, depth: int) -> list[list[Block]]:
    """The resolved blocks of each of `depth` layers. A list without modules is cycled over the depth.

    Raises:
        TypeError, ValueError: see `parse_layers` and `resolve_block`; or a module occurs twice or a list with modules
            has another number of layers than `depth`, because a module is one layer and is not copied.
    """
    cycle = [[resolve_block(spec) for spec in layer] for layer in parse_layers(attention)]
    modules = [block.spec for layer in cycle for block in layer if block.is_module]
    if modules and len(cycle) != depth:
        raise ValueError(
            f"attention must have one layer per layer of the stack if it holds modules, which are not copied, got "
            f"{len(cycle)} for {depth=}"
        )
    for module in modules:
        if sum(module is other for other in modules) > 1:
            raise ValueError(f"attention must hold a module once, got the same {type(module).__name__} twice")
    return [cycle[layer % len(cycle)] for layer in range(depth)]


def resolve_block(spec: Any) -> Block:
    """The constructor and the options of a block spec.

    Raises:
        ValueError: a name or an option is unknown, or an argument without a default is missing.
        TypeError: a class is no module, or a module has no `forward`.
    """
    source, options = spec if has_options(spec) else (spec, {})
    if isinstance(source, nn.Module):
        if has_options(spec):
            raise TypeError(f"attention must have options for a class or a name only, got {spec!r}")
        if type(source).forward is nn.Module.forward:
            raise TypeError(f"attention must be made of modules with forward(x), got {type(source).__name__}")
        return Block(spec, type(source).__name__)
    if isinstance(source, str):
        check_choice("attention", source, BLOCKS)
        name, make = source, BLOCKS[source]
    elif callable(source):
        name, make = getattr(source, "__name__", type(source).__name__), source
        if isinstance(source, type) and not issubclass(source, nn.Module):
            raise TypeError(f"attention must be made of subclasses of nn.Module, got the class {name}")
    else:
        raise TypeError(f"attention must be made of blocks, {KINDS}, got {spec!r}")
    parameters = _parameters(make)
    if not takes_any_keyword(parameters):
        for option in options:
            check_choice(f"option of {name!r}", option, sorted(parameters))
    return Block(spec, name, make, options, frozenset(parameters), frozenset(_required(parameters) - options.keys()))


def check_shared(shared: Mapping[str, Any], layers: Sequence[Sequence[Block]], attention: AttentionSpec) -> None:
    """Check that every shared argument is taken by a block of the stack.

    Raises:
        ValueError: no block takes an argument.
    """
    for name in sorted(shared):
        if not any(name in block.takes for layer in layers for block in layer):
            name = "attn_dropout" if name == "dropout" else name
            raise ValueError(f"{name} must be taken by at least one block, but none of {attention!r} has it")


def takes_part(attention: AttentionSpec, part: str) -> bool:
    """Whether the constructor of a block has an argument called `part`."""
    return any(part in resolve_block(spec).takes for layer in parse_layers(attention) for spec in layer)


def make_block(block: Block, dim: int, *, causal: bool | None, shared: Mapping[str, Any]) -> nn.Module:
    """Build one block, or check a module. Its own options take precedence over shared arguments.

    Args:
        block: the resolved spec.
        dim: features d.
        causal: passed to a block that has the argument. A block with an attribute `causal` must agree with it; for
            recurrences in one direction see `check_directions`. None: neither.
        shared: parts and sizes; the block gets those that its constructor has an argument for.

    Raises:
        ValueError: an argument without a default is missing, the block has another `dim` or another output shape, it
            sees the future with causal=True, or it is always causal with causal=False.
        TypeError: a function returns no module.
    """
    if block.make is None:
        module = block.spec
    else:
        given = _given(block, shared, causal)
        if missing := sorted(block.required - given.keys()):
            example = f"({block.name!r}, {{{missing[0]!r}: ...}})"
            raise ValueError(f"attention {block.name!r} must be given {missing[0]}, such as {example}")
        module = block.make(dim, **{**given, **block.options})
        if not isinstance(module, nn.Module):
            raise TypeError(f"attention {block.name!r} must return an nn.Module, got {type(module).__name__}")
    if (own := getattr(module, "dim", dim)) != dim:
        raise ValueError(f"attention {block.name!r} must have the dim of the stack, {dim}, got dim={own}")
    if causal is not None and not takes(module, "context"):  # attention to a context is no attention to later tokens
        sees_future = not getattr(module, "causal", causal)
        if causal and sees_future:
            raise ValueError(
                f"attention {block.name!r} must be causal in a causal model, got causal={module.causal!r}, which sees "
                "later tokens"
            )
        if not causal and not sees_future and not _is_forward(module):
            raise ValueError(f"causal=False must be possible for every block, but {block.name!r} is causal")
    if not is_builtin(module):
        _check_output(module, block.name, dim)
    return module


def check_directions(blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Check the blocks of a bidirectional stack, with their names: recurrences need one that starts at the last token.

    Raises:
        ValueError: there is a block with `reverse = False`, and none with `reverse = True`.
    """
    forward = [name for name, module in blocks if _is_forward(module)]
    if forward and not any(getattr(module, "reverse", None) is True for _, module in blocks):
        raise ValueError(f"causal=False must be possible for every block, but {forward[0]!r} is causal")


def saved_spec(block: Block, module: nn.Module, *, causal: bool | None, shared: Mapping[str, Any]) -> Any:
    """The spec under which a block is saved: its name in BLOCKS, with options that build the same block.

    Args:
        block, causal, shared: as in `make_block`.
        module: the block that was built.

    Raises:
        TypeError: the class of the block is not in BLOCKS, or an argument of its constructor is not known.
    """
    cls = type(module)
    name = block.name if block.is_named else next((name for name, known in BLOCKS.items() if known is cls), None)
    if name is None:
        raise TypeError(
            f"attention must be made of registered blocks to be saved, got {cls.__name__}: call "
            f"attention_zoo.register_block({cls.__name__.lower()!r}, {cls.__name__}) before saving and loading"
        )
    if block.is_named or block.make is cls:
        options = dict(block.options)
    else:
        given = {**_defaults(cls), **_given(resolve_block(name), shared, causal)}
        options = {
            argument: value
            for argument, value in constructor_arguments(module).items()
            if argument not in given
            or (value is not given[argument] and (isinstance(value, nn.Module) or value != given[argument]))
        }
    options = {argument: _live_part(module, argument, value) for argument, value in options.items()}
    return (name, options) if options else name


def constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments of a block's constructor besides `dim`: those recorded, or the attributes of the same names.

    Raises:
        TypeError: an argument has no default, and the module no such attribute.
    """
    parameters = _parameters(type(module))
    if isinstance(module, RecordsArguments):
        first = next(name for name in inspect.signature(type(module)).parameters if name not in parameters)
        return {name: value for name, value in module.arguments.items() if name not in (first, "dim")}
    if missing := sorted(name for name in _required(parameters) if not hasattr(module, name)):
        raise TypeError(
            f"{type(module).__name__} must keep its argument {missing[0]} as an attribute to be saved, or be given as "
            f"(name, {{{missing[0]!r}: ...}})"
        )
    return {name: getattr(module, name) for name in parameters if hasattr(module, name)}


def make_feedforward(spec: FeedForwardSpec, dim: int, **defaults: Any) -> nn.Module:
    """Build one feedforward. The options of `(name, options)` take precedence over `defaults`.

    Raises:
        TypeError: `spec` is not a feedforward spec.
        ValueError: a name or an option is unknown.
    """
    if callable(spec) and not isinstance(spec, nn.Module):
        made = spec(dim)
        check_instance(nn.Module, feedforward=made)
        return made
    if not isinstance(spec, str) and not has_options(spec):
        raise TypeError(f"feedforward must be a name, (name, options), a callable or None, got {spec!r}")
    name, options = (spec, {}) if isinstance(spec, str) else spec  # type: ignore[misc]
    check_choice("feedforward", name, FEEDFORWARDS)
    for option in options:
        check_choice(f"option of {name!r}", option, sorted(_parameters(FEEDFORWARDS[name])))
    return FEEDFORWARDS[name](dim, **{**defaults, **options})


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
    if not isinstance(ids, Sequence) or not all(isinstance(key, int) for key in ids):
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


def takes(block: nn.Module | type[nn.Module], name: str) -> bool:
    """Whether `forward` of a block has a parameter called `name`."""
    return name in inspect.signature(block.forward).parameters


def _is_forward(module: nn.Module) -> bool:
    """Whether a block is a recurrence from the first token to the last that could run in the other direction."""
    return getattr(module, "reverse", None) is False


def _given(block: Block, shared: Mapping[str, Any], causal: bool | None) -> dict[str, Any]:
    given = dict(shared) if causal is None else {**shared, "causal": causal}
    return {name: value for name, value in given.items() if name in block.takes}


def _live_part(module: nn.Module, name: str, value: Any) -> Any:
    """An option, or the part that the block made of it, such as a `Rotary` of another library's embedding."""
    part = getattr(module, name, None)
    return part if isinstance(value, nn.Module) and isinstance(part, RecordsArguments) else value


def _parameters(make: Make) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor besides the first, `dim`, that no functools.partial has set."""
    parameters = inspect.signature(make).parameters
    fixed = getattr(make, "keywords", {})
    first = "dim" if "dim" in parameters else next(iter(parameters), None)
    return {name: parameter for name, parameter in parameters.items() if name != first and name not in fixed}


def _required(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    return {name for name, one in parameters.items() if one.default is one.empty and one.kind not in VARIADIC}


def _defaults(make: Make) -> dict[str, Any]:
    """The arguments of a constructor that have a default, besides `dim`."""
    return {name: one.default for name, one in _parameters(make).items() if one.default is not one.empty}


def _check_output(module: nn.Module, name: str, dim: int) -> None:
    """Run a block that is not of this package on two tokens and check the shape of its output.

    Raises:
        TypeError: the output is no tensor, or the block needs an input that a stack does not have.
        ValueError: the block does not accept features (b, n, dim), or the output has another shape.
    """
    required = [parameter.name for parameter in _arguments_after_x(module) if parameter.default is parameter.empty]
    if unknown := sorted(set(required) - set(INPUTS)):
        raise TypeError(f"attention {name!r} must need no input besides x and {', '.join(INPUTS)}, got {unknown[0]!r}")
    if required:
        return  # it needs a context or packed rows
    try:
        x, out = run_block(module, dim)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"attention {name!r} must accept features (b, n, dim) with {dim=}, got {error}") from error
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"attention {name!r} must return a tensor, got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(
            f"attention {name!r} must keep the shape of its input, (b, n, dim), got {tuple(out.shape)} for "
            f"{tuple(x.shape)}"
        )


def run_block(module: nn.Module, dim: int) -> tuple[torch.Tensor, Any]:
    """Fixed features (1, 2, d) or (1, s, 2, d) of two tokens, and what a block returns for them in eval mode."""
    parameter = next(module.parameters(), torch.empty(0))
    modes = {part: part.training for part in module.modules()}
    streams = (module.streams,) if getattr(module, "streams", 1) != 1 else ()
    x = torch.linspace(-1, 1, 2 * dim, device=parameter.device, dtype=parameter.dtype).view(2, dim)
    x = x.expand(1, *streams, 2, dim)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return x, module.eval()(x)
    finally:
        for part, training in modes.items():
            part.training = training


def _arguments_after_x(module: nn.Module) -> Iterator[inspect.Parameter]:
    parameters = iter(inspect.signature(module.forward).parameters.values())
    next(parameters, None)
    return (parameter for parameter in parameters if parameter.kind not in VARIADIC)
