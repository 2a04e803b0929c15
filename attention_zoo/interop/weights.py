"""Moving weights from old names to new ones, with an account of both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class Weights:
    """An old state_dict of which every entry must be used, repeat one that is, or be left out for a reason.

    Attributes:
        account: for each old name what became of it, for people.

    Args:
        tensors: the state_dict.

    Raises:
        TypeError: it is no mapping from names to tensors.
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
        """The names that begin with `prefix`."""
        return [name for name in self._tensors if name.startswith(prefix)]

    def take(self, name: str, becomes: str) -> Tensor:
        """The tensor of this name, which becomes `becomes`.

        Raises:
            ValueError: there is none.
        """
        if name not in self._tensors:
            raise ValueError(f"state_dict must hold {name!r}, but it is missing")
        self.account[name] = becomes
        return self._tensors[name]

    def leave(self, name: str, reason: str) -> None:
        """Leave this entry out, where there is one."""
        if name in self._tensors:
            self.account[name] = f"left out: {reason}"

    def repeat(self, name: str, of: str) -> None:
        """Check that this entry, where there is one, equals another.

        Raises:
            ValueError: it differs.
        """
        if name not in self._tensors:
            return
        if of not in self._tensors:
            raise ValueError(f"state_dict must hold {of!r}, which {name!r} repeats, but it is missing")
        if not torch.equal(self._tensors[name], self._tensors[of]):
            raise ValueError(f"state_dict must hold the same numbers in {name!r} and {of!r}, which share them")
        self.account[name] = f"repeats {of}"

    def finish(self) -> None:
        """Refuse entries of which nothing became anything.

        Raises:
            ValueError: naming them.
        """
        rest = [name for name in self._tensors if name not in self.account]
        if rest:
            raise ValueError(f"state_dict must hold only weights of this class and its arguments, but also has {rest}")


class Transfer:
    """Fills the parameters of a module with old weights.

    Args:
        weights: where they come from.
        module: where they go.
        to, source: prefixes of the names on either side.
    """

    def __init__(self, weights: Weights, module: nn.Module, *, to: str = "", source: str = "") -> None:
        self.weights = weights
        self.module = module
        self.to = to
        self.source = source

    def at(self, to: str, source: str) -> Transfer:
        """The same transfer, deeper on either side."""
        return Transfer(self.weights, self.module, to=self.to + to, source=self.source + source)

    @torch.no_grad()
    def put(self, to: str, *sources: str, change: Callable[..., Tensor] | None = None) -> None:
        """Fill one parameter with old weights, changed where their shapes differ, in the dtype that they have.

        Raises:
            ValueError: one is missing, or does not fit.
        """
        name = self.to + to
        parameter = self.module.get_parameter(name)
        tensors = [self.weights.take(self.source + source, name) for source in sources]
        tensor = tensors[0] if change is None else change(*tensors)
        if tensor.shape != parameter.shape:
            told = ", ".join(f"{self.source}{s} {tuple(t.shape)}" for s, t in zip(sources, tensors, strict=True))
            raise ValueError(f"weights must fit the arguments: {told} cannot become a {tuple(parameter.shape)} {name}")
        parameter.data = tensor.detach().clone().to(parameter.device)

    def affine(self, to: str, source: str, *, bias: bool = True) -> None:
        """Fill the weight, and the bias, of a linear map or a norm."""
        self.put(f"{to}.weight", f"{source}.weight")
        if bias:
            self.put(f"{to}.bias", f"{source}.bias")

    def qkv(self, *sources: str, bias: bool = False) -> None:
        """Fill queries, keys and values from old maps whose rows follow each other in this order."""
        for kind in ("weight", "bias")[: 1 + bias]:
            names = [f"{source}.{kind}" for source in sources]
            block = self.module.get_submodule(self.to.rstrip("."))
            if hasattr(block, "to_qkv"):
                self.put(f"to_qkv.{kind}", *names, change=lambda *rows: torch.cat(rows))
                continue
            for index, part in enumerate(("to_q", "to_k", "to_v")):
                self.put(f"{part}.{kind}", *names, change=lambda *rows, i=index: _third(torch.cat(rows), i))


def _third(rows: Tensor, index: int) -> Tensor:
    """The queries', keys' or values' rows of all."""
    if rows.shape[0] % 3:
        raise ValueError(f"weights of queries, keys and values must be equally many, got {rows.shape[0]} rows")
    return rows.chunk(3)[index]
