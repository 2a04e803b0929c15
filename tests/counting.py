"""The operators that a call dispatches, as a stand-in for the kernels that it launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:  # a view launches nothing
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operators(function: Callable[[], object]) -> list[str]:
    """Names of the operators that `function` dispatches, views left out."""
    with _Record() as record:
        function()
    return record.names


def count_operators(function: Callable[[], object]) -> int:
    """The number of operators that `function` dispatches, views left out."""
    return len(operators(function))
