"""The memory of a model: its start, and the update that the argument `memory_update` names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention_zoo._checks import check_choice
from attention_zoo.layers.memory_update import BiasedMemoryUpdate, InitialMemory, MemoryUpdate
from attention_zoo.models.layer_specs import has_options

MEMORY_UPDATES: dict[str, type[MemoryUpdate | BiasedMemoryUpdate]] = {"gru": MemoryUpdate, "paper": BiasedMemoryUpdate}
# A name in MEMORY_UPDATES, or (name, options).
MemoryUpdateSpec = str | tuple[str, Mapping[str, Any]]


class MemoryMixin:
    """What models with a memory have in common.

    Attributes:
        memory: the memory before the first segment; None where the update has it.
        update: the memory update.
    """

    memory: InitialMemory | None
    update: Any

    @property
    def _start(self) -> InitialMemory:
        """The module of the memory before the first segment."""
        return self.update.initial if self.memory is None else self.memory

    def initial_memory(self, batch: int) -> Tensor:
        """The learned memory before the first segment, (batch, m, d)."""
        return self._start(batch)


def make_initial_memory(spec: MemoryUpdateSpec, slots: int, dim: int) -> InitialMemory | None:
    """The memory before the first segment; None where the update has it. Raises: see `make_memory_update`."""
    cls, _ = _resolve(spec)
    return None if issubclass(cls, BiasedMemoryUpdate) else InitialMemory(slots, dim)


def make_memory_update(spec: MemoryUpdateSpec, dim: int, **shared: Any) -> MemoryUpdate | BiasedMemoryUpdate:
    """Build a memory update from its options and the arguments in `shared` that it takes. The options take precedence.

    Raises:
        TypeError: `spec` is not a name or (name, options).
        ValueError: the name or an option is unknown, or the update does not accept a value.
    """
    cls, options = _resolve(spec)
    takes = inspect.signature(cls).parameters
    return cls(dim, **{**{name: value for name, value in shared.items() if name in takes}, **options})


def _resolve(spec: MemoryUpdateSpec) -> tuple[type[MemoryUpdate | BiasedMemoryUpdate], Mapping[str, Any]]:
    if not isinstance(spec, str) and not has_options(spec):
        raise TypeError(f"memory_update must be a name or (name, options), got {spec!r}")
    name, options = (spec, {}) if isinstance(spec, str) else spec
    check_choice("memory_update", name, MEMORY_UPDATES)
    known = inspect.signature(MEMORY_UPDATES[name]).parameters.keys() - {"dim", "memory_slots"}
    for option in options:
        check_choice(f"option of {name!r}", option, sorted(known))
    return MEMORY_UPDATES[name], options
