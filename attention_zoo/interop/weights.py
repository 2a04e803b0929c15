"""Transfer of upstream weights to the parameters of this library, with a record of every entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn


class Weights(dict[str, Tensor]):
    """An upstream state_dict of which every entry must be used, repeat another entry, or be left out for a reason.

    Args:
        tensors: the state_dict.

    Attributes:
        account: what became of each entry, as text: a parameter's name, "repeats ..." or "left out: ...".

    Raises:
        TypeError: `tensors` is not a mapping from names to tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(tensors, Mapping):
            raise TypeError(f"state_dict must map names to tensors, got {type(tensors).__name__}")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise TypeError(f"state_dict must map names to tensors, got {name!r}: {type(tensor).__name__}")
        super().__init__(tensors)
        self.account: dict[str, str] = {}

    def take(self, name: str, becomes: str) -> Tensor:
        """Return an entry and record what it becomes.

        Raises:
            ValueError: the entry is missing.
        """
        if name not in self:
            raise ValueError(f"state_dict is missing key {name!r}")
        self.account[name] = becomes
        return self[name]

    def leave(self, prefix: str, reason: str) -> None:
        """Leave out the entries whose names start with `prefix`."""
        self.account |= {name: f"left out: {reason}" for name in self if name.startswith(prefix)}

    def repeat(self, prefix: str, of: str) -> None:
        """Check that the entries whose names start with `prefix` equal those that start with `of` instead.

        Raises:
            ValueError: two entries differ, or the repeated one is missing.
        """
        for name in filter(lambda name: name.startswith(prefix), self):
            other = of + name.removeprefix(prefix)
            if other not in self:
                raise ValueError(f"state_dict is missing key {other!r}, which is shared with {name!r}")
            if not torch.equal(self[name], self[other]):
                raise ValueError(f"shared weights must be equal, but {name!r} and {other!r} in the state_dict differ")
            self.account[name] = f"repeats {other}"

    def finish(self) -> None:
        """Check that every entry is accounted for.

        Raises:
            ValueError: some are not; the message names them.
        """
        unexpected = [name for name in self if name not in self.account]
        if unexpected:
            raise ValueError(f"state_dict has unexpected keys {unexpected} for this class and its arguments")


@dataclass(frozen=True)
class Transfer:
    """Copies upstream weights into the parameters of a module.

    Args:
        weights: the upstream weights.
        module: the module to fill.
        to, source: prefixes of the names in `module` and in `weights`.
    """

    weights: Weights
    module: nn.Module
    to: str = ""
    source: str = ""

    def at(self, to: str, source: str) -> Transfer:
        """The same transfer with longer prefixes."""
        return replace(self, to=self.to + to, source=self.source + source)

    def target(self, to: str = "") -> Any:
        """The attribute of the module at the prefix and `to`, usually a submodule."""
        return reduce(getattr, filter(None, (self.to + to).split(".")), self.module)

    def put(self, to: str, *sources: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Fill one parameter with the concatenated rows of the sources, keeping the dtype of the weights.

        Args:
            to: the parameter.
            sources: upstream names.
            change: applied to the concatenated sources. Axes of size 1 are added and removed without it.

        Raises:
            ValueError: a source is missing, or the shape does not fit.
        """
        name = self.to + to
        parameter = self.module.get_parameter(name)
        tensors = [self.weights.take(self.source + source, name).detach() for source in sources]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        tensor = tensor if change is None else change(tensor)
        if tensor.squeeze().shape != parameter.squeeze().shape:
            given = ", ".join(f"{self.source}{s} {tuple(t.shape)}" for s, t in zip(sources, tensors, strict=True))
            raise ValueError(f"weights must fit the arguments: {given} cannot become {name} {tuple(parameter.shape)}")
        parameter.data = tensor.reshape(parameter.shape).clone().to(parameter.device)

    def fill(self, submodules: Mapping[str, str], **names: str) -> None:
        """Fill the parameters of submodules without children. A submodule that is None is skipped.

        Args:
            submodules: the upstream prefix of each submodule.
            names: upstream names of parameters, where they differ.
        """
        for to, source in submodules.items():
            submodule = self.target(to)
            for name, _ in () if submodule is None else submodule.named_parameters(recurse=False):
                self.put(f"{to}.{name}", f"{source}.{names.get(name, name)}")

    def split(self, submodules: Sequence[str], *sources: str) -> None:
        """Fill submodules with equal shares, in their order, of the concatenated rows of the sources."""
        for index, to in enumerate(submodules):
            for name, _ in self.target(to).named_parameters(recurse=False):
                rows = [f"{source}.{name}" for source in sources]
                self.put(f"{to}.{name}", *rows, change=partial(_share, index, len(submodules)))

    def qkv(self, *sources: str) -> None:
        """Fill the query, key and value projections from sources whose rows are queries, keys, values in this order."""
        self.split(("to_qkv",) if hasattr(self.target(), "to_qkv") else ("to_q", "to_k", "to_v"), *sources)


def _share(index: int, count: int, rows: Tensor) -> Tensor:
    return rows.tensor_split(count)[index]
