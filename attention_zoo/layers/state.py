"""What decoding remembers, as a value: a step returns a new state and never changes what an old one means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SMALLEST_ROOM = 64  # tokens; a growing buffer doubles from here


class State:
    """Base of all decoding states: a dataclass of tensors, registered as a pytree.

    In every tensor the batch is the first axis; a tensor without axes belongs to the whole batch.
    """

    @property
    def length(self) -> int:
        """Tokens seen so far, masked ones included."""
        raise TypeError(f"{type(self).__name__} must define length")

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of this state hold, room for later growth not counted."""
        return sum(leaf.nbytes for leaf in _tensors(self))

    def detach(self) -> Self:
        """The same state cut off from the graph that computed it."""
        detached: Self = pytree.tree_map_only(Tensor, torch.Tensor.detach, self)
        return detached

    def reorder(self, index: Tensor) -> Self:
        """The state of the rows `index`, (b',) int: what a beam search keeps, drops or repeats."""
        rows: Self = pytree.tree_map_only(Tensor, lambda t: t.index_select(0, index) if t.ndim else t, self)
        return rows


def register_state(cls: type[State]) -> None:
    """Make the dataclass `cls` a pytree whose children are the fields that its constructor takes.

    Called once, beside the class: torch.compile, torch.export and `tree_map` then see its tensors.
    """
    pytree.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class Room:
    """Storage behind the keys and values of a chain of states: the newest appends in place while there is room."""

    keys: Tensor
    values: Tensor
    used: int

    @classmethod
    def around(cls, keys: Tensor, values: Tensor, wanted: int) -> Room:
        """Copy keys and values into storage for at least `wanted` tokens."""
        used = keys.shape[2]
        size = max(SMALLEST_ROOM, 2 * wanted)
        room = cls(_empty(keys, size), _empty(values, size), used)
        room.keys[:, :, :used] = keys
        room.values[:, :, :used] = values
        return room


def _empty(like: Tensor, length: int) -> Tensor:
    return like.new_empty(*like.shape[:2], length, like.shape[3])


@dataclass
class KeyValueState(State):
    """The keys and values of all tokens so far. Size: 2 * b * kv_heads * n * dim_head numbers.

    Attributes:
        keys, values: (b, kv_h, n, e), as attention uses them: rotated, normalised.
        mask: (b, n) bool, True = a real token; None while no mask was ever given.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    _room: Room | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> KeyValueState:
        """The state after some more tokens; this one keeps its meaning.

        Args:
            keys, values: (b, kv_h, t, e) of the new tokens.
            mask: (b, t) bool, or None where all are real.
        """
        mask = self._longer_mask(mask, keys)
        # Concatenating is right everywhere. Growing in place saves the copy of all that came before, but a recorded
        # graph, a trace, or a buffer of another inference mode may not be written to.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return KeyValueState(torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2), mask)
        used, total = self.length, self.length + keys.shape[2]
        room = self._room
        if (
            room is None
            or room.used != used  # a newer state has already grown from this one: leave its tokens alone
            or total > room.keys.shape[2]
            or room.keys.is_inference() != torch.is_inference_mode_enabled()
        ):
            room = Room.around(self.keys, self.values, total)
        room.keys[:, :, used:total] = keys
        room.values[:, :, used:total] = values
        room.used = total
        state = KeyValueState(room.keys[:, :, :total], room.values[:, :, :total], mask)
        state._room = room
        return state

    def _longer_mask(self, mask: Tensor | None, keys: Tensor) -> Tensor | None:
        if mask is None and self.mask is None:
            return None
        old, new = self.mask, mask
        if old is None:
            old = torch.ones(keys.shape[0], self.length, dtype=torch.bool, device=keys.device)
        if new is None:
            new = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        return torch.cat((old, new), dim=1)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy or pickle holds the tensors, not the room
        return KeyValueState, (self.keys.clone(), self.values.clone(), self.mask)


register_state(KeyValueState)


def count_tokens(seen: Tensor | None, new: int) -> Tensor:
    """A count of tokens, `new` higher than `seen`: a tensor without axes on the CPU.

    A tensor, because a Python number would be a constant to torch.compile and torch.export.
    """
    return torch.tensor(new) if seen is None else seen + new
