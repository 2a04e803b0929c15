"""Transfer of upstream weights to the parameters of this library, with a record of every entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn


class Weights:
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
        self._tensors = dict(tensors)
        self.account: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self, prefix: str = "") -> list[str]:
        """The names that start with `prefix`."""
        return [name for name in self._tensors if name.startswith(prefix)]

    def take(self, name: str, becomes: str) -> Tensor:
        """Return an entry and record what it becomes.

        Raises:
            ValueError: the entry is missing.
        """
        if name not in self._tensors:
            raise ValueError(f"state_dict is missing key {name!r}")
        self.account[name] = becomes
        return self._tensors[name]

    def leave(self, name: str, reason: str) -> None:
        """Leave an entry out if it exists."""
        if name in self._tensors:
            self.account[name] = f"left out: {reason}"

    def repeat(self, name: str, of: str) -> None:
        """Check that an entry, if it exists, equals the entry `of`.

        Raises:
            ValueError: the entries differ, or `of` is missing.
        """
        if name not in self._tensors:
            return
        if of not in self._tensors:
            raise ValueError(f"state_dict is missing key {of!r}, which is shared with {name!r}")
        if not torch.equal(self._tensors[name], self._tensors[of]):
            raise ValueError(f"shared weights must be equal, but {name!r} and {of!r} in the state_dict differ")
        self.account[name] = f"repeats {of}"

    def finish(self) -> None:
        """Check that every entry is accounted for.

        Raises:
            ValueError: some are not; the message names them.
        """
        unexpected = [name for name in self._tensors if name not in self.account]
        if unexpected:
            raise ValueError(f"state_dict has unexpected keys {unexpected} for this class and its arguments")


class Transfer:
    """Copies upstream weights into the parameters of a module.

    Args:
        weights: the upstream weights.
        module: the module to fill.
        to, source: prefixes of the names in `module` and in `weights`.
    """

    def __init__(self, weights: Weights, module: nn.Module, *, to: str = "", source: str = "") -> None:
        self.weights = weights
        self.module = module
        self.to = to
        self.source = source

    def at(self, to: str, source: str) -> Transfer:
        """The same transfer with longer prefixes."""
        return Transfer(self.weights, self.module, to=self.to + to, source=self.source + source)

    def target(self, to: str = "") -> Any:
        """The attribute of the module at the prefix and `to`, usually a submodule."""
        return reduce(getattr, filter(None, (self.to + to).split(".")), self.module)

    @torch.no_grad()
    def put(self, to: str, *sources: str, change: Callable[..., Tensor] | None = None) -> None:
        """Fill one parameter, keeping the dtype of the weights; `change` maps the sources to one tensor.

        Raises:
            ValueError: a source is missing, or the shape does not fit.
        """
        name = self.to + to
        parameter = self.module.get_parameter(name)
        tensors = [self.weights.take(self.source + source, name) for source in sources]
        tensor = tensors[0] if change is None else change(*tensors)
        if tensor.shape != parameter.shape:
            given = ", ".join(f"{self.source}{s} {tuple(t.shape)}" for s, t in zip(sources, tensors, strict=True))
            raise ValueError(f"weights must fit the arguments: {given} cannot become {name} {tuple(parameter.shape)}")
        parameter.data = tensor.detach().clone().to(parameter.device)

    def fill(self, to: str, source: str, **names: str) -> None:
        """Fill the parameters of a submodule without children; nothing is done where the submodule is None.

        Args:
            to, source: the submodule and the upstream prefix.
            names: upstream names of parameters, where they differ.
        """
        submodule = self.target(to)
        for name, _ in () if submodule is None else submodule.named_parameters(recurse=False):
            self.put(f"{to}.{name}", f"{source}.{names.get(name, name)}")

    def qkv(self, *sources: str) -> None:
        """Fill the query, key and value projections from sources whose rows are queries, keys, values in this order."""
        parts = ("to_qkv",) if hasattr(self.target(), "to_qkv") else ("to_q", "to_k", "to_v")
        for index, part in enumerate(parts):
            for name, _ in self.target(part).named_parameters(recurse=False):
                tensors = [f"{source}.{name}" for source in sources]
                self.put(f"{part}.{name}", *tensors, change=partial(_share, index, len(parts)))


def _share(index: int, count: int, *rows: Tensor) -> Tensor:
    return torch.cat(rows).tensor_split(count)[index]
