"""The base class of loaders: one loader describes one upstream class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from attention_zoo.interop.weights import Transfer, Weights


@dataclass(frozen=True, kw_only=True)
class Loader:
    """An upstream class; the fields are the arguments of its constructor with their upstream names and defaults."""

    def build(self, weights: Weights) -> nn.Module:
        """The module for these arguments, before the transfer of weights.

        Raises:
            ValueError: weights with these arguments cannot be loaded.
        """
        raise NotImplementedError

    def transfer(self, move: Transfer) -> None:
        """Copy the weights into the module.

        Raises:
            ValueError: the weights do not fit the arguments.
        """
        raise NotImplementedError

    def same(self, *names: str) -> dict[str, Any]:
        """The arguments that have the same name and meaning in this library, by name."""
        return {name: getattr(self, name) for name in names}
