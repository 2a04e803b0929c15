"""Base classes of models that are composed of stacks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from attention_zoo._arguments import takes_any_keyword
from attention_zoo.models.stack import Stack
from attention_zoo.saving import SavedModel
from attention_zoo.saving.encoding import is_plain

# The argument and its value without effect, by the part that it gives to the blocks of a stack.
UNUSED: dict[str, tuple[str, Any]] = {
    "heads": ("heads", None),
    "dim_head": ("dim_head", None),
    "dropout": ("attn_dropout", 0.0),
    "rotary": ("positions", None),
    "bias": ("positions", None),
}


class ComposedModel(SavedModel):
    """A model whose arguments for the blocks follow its stacks, so that they are right after `replace_block` too.

    Attributes:
        stacks: name of the attribute that holds a stack, by the argument that gives its attention.
    """

    stacks: ClassVar[Mapping[str, str]] = {"attention": "stack"}

    @property
    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments
        for name, stack in self._own_stacks().items():
            if stack.is_replaced:
                arguments[name] = _without_fixed(stack, stack.arguments["attention"])
                if len(self.stacks) == 1:
                    unused = [UNUSED[part] for part in stack.unused_parts() if part in UNUSED]
                    arguments |= {argument: value for argument, value in unused if argument in arguments}
        return arguments

    def saved_arguments(self) -> dict[str, Any]:
        arguments = self.arguments
        for name, stack in self._own_stacks().items():
            if not is_plain(arguments.get(name)):
                arguments[name] = _without_fixed(stack, stack.saved_attention())
        return arguments

    def _own_stacks(self) -> dict[str, Stack]:
        """The stacks that the model builds, by the argument that gives their attention."""
        recorded = super().arguments
        if recorded.get("stack") is not None:  # an argument itself
            return {}
        parameters = inspect.signature(type(self)).parameters
        # a subclass may have no `attention`
        names = [name for name in self.stacks if name in parameters or takes_any_keyword(parameters)]
        return {name: getattr(self, self.stacks[name]) for name in names if hasattr(self, self.stacks[name])}


def _without_fixed(stack: Stack, attention: list[Any]) -> list[Any]:
    """The blocks of each layer without those that the model adds."""
    if not stack.fixed_blocks:
        return attention
    layers = [layer[: -stack.fixed_blocks] for layer in attention]
    return [layer[0] if len(layer) == 1 else layer for layer in layers]
