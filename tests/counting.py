"""Operators that a function runs: on a GPU each is at least one kernel launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators that read the values of a tensor, for which the host waits for a device
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero", "equal")


class OperatorCounter(TorchDispatchMode):
    """Records the names of the operators that run inside it, except views and allocations.

    The operators of this package are opened: what runs inside them is recorded in their place, on the meta device too.

    Attributes:
        names: the operators in order, such as "mm".
        largest: numbers in the largest tensor that an operator returned.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "attention_zoo":
            with self:
                return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach", "lift_fresh")):
            self.names.append(name)
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def largest_tensor(function: Callable[[], object]) -> int:
    """Numbers in the largest tensor that `function` allocates."""
    with OperatorCounter() as counter:
        function()
    return counter.largest


def operators_of(function: Callable[[], object]) -> list[str]:
    """The names of the operators that `function` runs, in order, such as "mm", without views and allocations."""
    with OperatorCounter() as counter:
        function()
    return counter.names


def count_operators(function: Callable[[], object]) -> int:
    """The number of operators that `function` runs, without views and allocations."""
    return len(operators_of(function))


def check_no_synchronisation(function: Callable[[], object]) -> None:
    """Raise AssertionError if `function` reads the values of a tensor on the host."""
    found = {name for name in operators_of(function) if name in SYNCHRONISING}
    assert not found, f"synchronising operators: {sorted(found)}"
