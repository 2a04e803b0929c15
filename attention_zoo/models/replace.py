"""Replace a block of a model by another, and keep the model's configuration true."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_at_least, check_choice
from attention_zoo.layers.projections import Projections
from attention_zoo.models.layer_specs import BlockSpec, resolve_block, takes
from attention_zoo.models.stack import Stack, Sublayer


class Replacement(NamedTuple):
    """Result of `replace_block`.

    Attributes:
        copied: parameters of the new block that were copied from the old one. Projections that a block computes
            together are listed one by one: "to_q.weight", "to_k.weight", ...
        new: the other parameters of the new block.
    """

    copied: list[str]
    new: list[str]


def replace_block(
    model: nn.Module, layer: int, spec: BlockSpec, *, sublayer: int = 0, init: str | None = None
) -> Replacement:
    """Replace a block of a stack in place. The model's `arguments` and its next `save` have the new block.

    The new block gets the shared arguments of the stack, and the dtype, device and training mode of the old one.

    Args:
        model: a `Stack`, or a model with one attribute that is a stack.
        layer: index of the layer, 0 ... depth - 1.
        spec: the new block; see `Stack`.
        sublayer: index of the block among the attention blocks of the layer.
        init: "copy": parameters of the same name and shape are copied from the old block. The projections of queries,
            keys and values are matched one by one, whether a block computes them together or not. None: the new block
            is as initialised, and a module as it is.

    Returns:
        The parameters that were copied and those that were not.

    Raises:
        TypeError: `model` has no stack, or an index is not an int.
        ValueError: an index is out of range, the new block does not fit (see `Stack`), it reads a context and the old
            one does not or the reverse, or the old one shares its weights with another layer.
    """
    stack = _find_stack(model)
    if init is not None:
        check_choice("init", init, ("copy",))
    _check_index("layer", layer, len(stack.layers))
    blocks = [sub for sub in stack.layers[layer].sublayers if sub.attention is not None]  # type: ignore[union-attr]
    _check_index("sublayer", sublayer, len(blocks) - stack.fixed_blocks)
    old: Sublayer = blocks[sublayer]
    if sum(sub.block is old.block for sub in stack.sublayers()) > 1:
        raise ValueError(f"layer must not share its block with another layer to be replaced, got {layer=}")
    resolved = resolve_block(spec)
    if init is not None and resolved.is_module:
        raise ValueError(f"init must be None for a module, which is used as it is, got {init=}")
    if any(resolved.spec is sub.attention for sub in stack.sublayers()):
        raise ValueError(f"spec must not be a block of the model already, got the same {resolved.name} twice")
    block = stack.make_block(resolved, old.residual)
    if takes(block, "context") != ("context" in old.takes):
        raise ValueError(
            f"spec must read a context exactly if the old block does, got {resolved.name!r} for "
            f"{type(old.attention).__name__}"
        )
    like = next((tensor for tensor in old.block.parameters() if tensor.is_floating_point()), None)
    if like is not None:
        block.to(like.device, like.dtype)
    block.train(old.block.training)
    old_attention: Any = old.attention
    stack.replace(old, block, resolved)
    target = _parameters(old.attention)  # type: ignore[arg-type]  # it is not a feedforward
    source = _parameters(old_attention) if init == "copy" else {}
    copied = [name for name in target if name in source and _fits(source[name], target[name])]
    with torch.no_grad():
        for name in copied:
            target[name][1].copy_(source[name][1])
    return Replacement(copied, [name for name in target if name not in copied])


def _fits(source: tuple[type, Tensor], target: tuple[type, Tensor]) -> bool:
    """Whether two parameters have one shape and meaning: the scale of a head is no weight of a feature."""
    return source[0] is target[0] and source[1].shape == target[1].shape


def _parameters(block: nn.Module) -> dict[str, tuple[type, Tensor]]:
    """The class of the module and the parameter, by its name in a block, with those of each of the `Projections` apart:
    "to_q.weight", ..."""
    parameters: dict[str, tuple[type, Tensor]] = {}
    for path, module in block.named_modules():
        prefix = path.rpartition(".")[0]
        for kind, tensor in module.named_parameters(path, recurse=False):
            if isinstance(module, Projections):
                kind = kind.rpartition(".")[2]
                names = {f"{prefix}.to_{part}.{kind}".lstrip("."): part for part in module.sizes}
                parameters |= {name: (nn.Linear, module.part(part, kind)) for name, part in names.items()}
            else:
                parameters[kind] = type(module), tensor
    return parameters


def _find_stack(model: nn.Module) -> Stack:
    if isinstance(model, Stack):
        return model
    stacks = [(name, child) for name, child in model.named_children() if isinstance(child, Stack)]
    if len(stacks) == 1:
        return stacks[0][1]
    if stacks:
        names = " or ".join(f"model.{name}" for name, _ in stacks)
        raise TypeError(f"model must be a stack where it has several, got {type(model).__name__}: pass {names}")
    raise TypeError(f"model must be a Stack or have one as an attribute, got {type(model).__name__}")


def _check_index(name: str, index: int, count: int) -> None:
    check_at_least(0, **{name: index})
    if index >= count:
        raise ValueError(f"{name} must be below {count}, got {name}={index}")
