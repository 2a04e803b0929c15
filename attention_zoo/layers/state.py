"""Decoding states. A state is a value: a step returns a new state and never changes an earlier one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attention_zoo._checks import check_integers
from attention_zoo.ops.window import Sinks, first_sinks

MIN_BUFFER = 64  # tokens in the smallest buffer; buffers grow by doubling


class State:
    """Base class of decoding states: dataclasses of tensors, registered as pytrees.

    The first axis of every tensor is the batch; a 0-d tensor belongs to the whole batch.

    Attributes:
        token_count: number of tokens so far, masked ones included, a 0-d tensor. A field of every state that does not
            define `length` itself.
    """

    token_count: Tensor

    @property
    def length(self) -> int:
        """Number of tokens so far, masked ones included."""
        return int(self.token_count)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of this state, without spare buffer space."""
        return sum(leaf.nbytes for leaf in pytree.tree_leaves(self) if isinstance(leaf, Tensor))

    def detach(self) -> Self:
        """The same state, detached from the graph that computed it."""
        return pytree.tree_map_only(Tensor, torch.Tensor.detach, self)

    def reorder(self, index: Tensor) -> Self:
        """The state of the rows `index`, (b',) int, as beam search selects, drops or repeats them.

        Raises:
            TypeError: `index` is not an integer tensor.
            ValueError: `index` is not (b',), or names a row that does not exist; the latter is checked on the CPU only.
        """
        check_integers(index=index)
        if index.ndim != 1:
            raise ValueError(f"index must be (b',), got shape {tuple(index.shape)}")
        if index.numel() and index.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = next(leaf.shape[0] for leaf in pytree.tree_leaves(self) if isinstance(leaf, Tensor) and leaf.ndim)
            low, high = (int(end) for end in index.aminmax())
            if low < 0 or high >= rows:
                raise ValueError(f"index must lie in 0 ... {rows - 1}, the rows of the state, got {low} ... {high}")
        return pytree.tree_map_only(Tensor, lambda t: t.index_select(0, index.long()) if t.ndim else t, self)


def register_state(cls: type[State]) -> None:
    """Register the dataclass `cls` as a pytree whose children are the fields of its constructor.

    Called once, next to the class: torch.compile, torch.export and `tree_map` then handle its tensors.
    """
    pytree.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")


def check_state(state: object, kind: type[State]) -> None:
    """Check that a state is None or of the class that the layer or model returns.

    Raises:
        TypeError: `state` is of another class.
    """
    if state is not None and not isinstance(state, kind):
        raise TypeError(f"state must be a {kind.__name__} of an earlier step, got {type(state).__name__}")


def check_state_shape(tensor: Tensor, axes: str, shape: tuple[int, ...]) -> None:
    """Check that a tensor of a state fits the layer and the batch.

    Args:
        tensor: the tensor.
        axes: names of its axes, for the error message.
        shape: the shape that it must have.

    Raises:
        ValueError: it has another shape.
    """
    if tensor.shape != shape:
        raise ValueError(f"state must come from this layer and batch: {axes} = {shape}, got {tuple(tensor.shape)}")


def check_state_dtype(tensor: Tensor, new: Tensor) -> None:
    """Check that a tensor of a state has the dtype that new tokens have.

    Raises:
        TypeError: it has another dtype.
    """
    if tensor.dtype != new.dtype:
        raise TypeError(
            f"state must be of the dtype of the new tokens, {new.dtype}, got {tensor.dtype}: run all steps with or all "
            "without autocast, in one dtype"
        )


def own_mask(mask: Tensor | None) -> Tensor | None:
    """A copy of a caller's mask for a state, which must not change when the caller changes the mask."""
    return None if mask is None else mask.clone()


@dataclass
class Buffer:
    """Storage shared by a sequence of states: only the newest one appends its keys and values in place."""

    keys: Tensor
    values: Tensor
    used: int

    @classmethod
    def copy_of(cls, keys: Tensor, values: Tensor, capacity: int) -> Buffer:
        """Copy keys and values into storage for at least `capacity` tokens."""
        used, size = keys.shape[2], max(MIN_BUFFER, 2 * capacity)
        new_keys, new_values = (t.new_empty(*t.shape[:2], size, t.shape[3]) for t in (keys, values))
        buffer = cls(new_keys, new_values, used)
        buffer.keys[:, :, :used] = keys
        buffer.values[:, :, :used] = values
        return buffer

    @classmethod
    def append(
        cls, buffer: Buffer | None, end: int, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[Buffer, Tensor, Tensor]:
        """Append in place where that changes no other state, or else copy to a new buffer.

        Args:
            buffer: storage of the old keys and values, or None.
            end: where the old ones end in it.
            old, new: keys and values (b, kv_h, n, e) and (b, kv_h, t, e).

        Returns:
            The buffer, and views (b, kv_h, n + t, e) of the keys and values that end at its end.
        """
        held, count = old[0].shape[2], new[0].shape[2]
        if (
            buffer is None
            or buffer.used != end  # another state has appended to this one already: keep its tokens
            or end + count > buffer.keys.shape[2]
            or buffer.keys.is_inference() != torch.is_inference_mode_enabled()
        ):
            buffer, end = cls.copy_of(*old, held + count), held
        buffer.keys[:, :, end : end + count] = new[0]
        buffer.values[:, :, end : end + count] = new[1]
        buffer.used = end + count
        rows = slice(end - held, end + count)
        return buffer, buffer.keys[:, :, rows], buffer.values[:, :, rows]


@dataclass
class KeyValueState(State):
    """Key/value cache: keys and values of all tokens so far. Size: 2 n kv_heads dim_head elements per row.

    Attributes:
        keys, values: (b, kv_h, n, e), as the attention operation takes them: with positions and norms applied.
        mask: (b, n) bool, True = a valid token; None if no step had a mask.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    _buffer: Buffer | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> KeyValueState:
        """The state after further tokens; this one is not changed.

        Args:
            keys, values: (b, kv_h, t, e) of the new tokens.
            mask: (b, t) bool, True = a valid token. None: all are valid.

        Raises:
            TypeError: `keys` are of another dtype than those of this state.
        """
        check_state_dtype(self.keys, keys)
        mask = concat_masks(self.mask, mask, keys.shape[0], self.length, keys.shape[2], keys.device)
        # Concatenation is always correct. Appending in place saves copying the cache, but tensors of a recorded graph,
        # of a trace or of another inference mode must not be written to.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return KeyValueState(torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2), mask)
        held = (self.keys, self.values)
        buffer, all_keys, all_values = Buffer.append(self._buffer, self.length, held, (keys, values))
        state = KeyValueState(all_keys, all_values, mask)
        state._buffer = buffer
        return state

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles hold the tensors, not the buffer
        return KeyValueState, (self.keys.clone(), self.values.clone(), self.mask)


register_state(KeyValueState)


@dataclass
class WindowState(State):
    """Keys and values of the last tokens of a window and of the sinks, which decoding still reads.

    Size: 2 (min(n, window - 1) + min(n, sinks)) kv_heads dim_head elements per row, constant from window - 1 tokens on.

    Attributes:
        counter: (b, n, 0), no element for each of the n tokens so far: torch.compile and torch.export take a size for a
            variable, and a Python number for a constant.
        keys, values: (b, kv_h, w, e) of the last w = min(n, window - 1) tokens, with positions and norms applied.
        mask: (b, w) bool, True = a valid token; None if no step had a mask.
        sink_keys, sink_values: (b, kv_h, s, e) of the first valid tokens; None without sinks.
        sink_positions: (b, s) int64, see `Sinks`; None if no step had a mask.
    """

    counter: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None
    sink_positions: Tensor | None = None
    _buffer: Buffer | None = field(default=None, init=False, repr=False, compare=False)
    _end: int = field(default=0, init=False, repr=False, compare=False)

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor) -> WindowState:
        """The state before the tokens of `keys` and `values`, (b, kv_h, t, e)."""
        return cls(keys.new_empty(keys.shape[0], 0, 0), keys[:, :, :0], values[:, :, :0])

    @property
    def length(self) -> int:
        return self.counter.shape[1]

    @property
    def sinks(self) -> Sinks | None:
        """The sinks of all tokens so far."""
        if self.sink_keys is None or self.sink_values is None:
            return None
        return Sinks(self.sink_keys, self.sink_values, self.sink_positions)

    def append(
        self, keys: Tensor, values: Tensor, mask: Tensor | None, *, window: int, sinks: int
    ) -> tuple[Tensor, Tensor, Tensor | None, WindowState]:
        """The held and the new tokens, and the state after them; this one is not changed.

        Args:
            keys, values: (b, kv_h, t, e) of the new tokens.
            mask: (b, t) bool, True = a valid token. None: all are valid.
            window, sinks: sizes, see `window_attention`.

        Returns:
            Keys and values (b, kv_h, w + t, e) and their mask (b, w + t) or None; and the new state.

        Raises:
            TypeError: `keys` are of another dtype than those of this state.
        """
        check_state_dtype(self.keys, keys)
        held, new = self.keys.shape[2], keys.shape[2]
        valid = concat_masks(self.mask, mask, keys.shape[0], held, new, keys.device)
        first: tuple[Tensor | None, ...] = ()
        if sinks:
            first = first_sinks(keys, values, mask, sinks, start=self.length, old=self.sinks)
        buffer, end, drop = None, 0, max(held + new - window + 1, 0)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or new >= window:
            if held:
                keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
            kept = tuple(x[:, :, drop:].clone() for x in (keys, values))  # not the memory of all tokens
        else:
            old = (self.keys, self.values)
            buffer, keys, values = Buffer.append(self._buffer, self._end, old, (keys, values))
            kept, end = (keys[:, :, drop:], values[:, :, drop:]), buffer.used
        rest = None if valid is None else valid[:, drop:].clone()
        counter = keys.new_empty(keys.shape[0], self.length + new, 0)
        state = WindowState(counter, *kept, rest, *first)
        state._buffer, state._end = buffer, end
        return keys, values, valid, state

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles hold the tensors, not the buffer
        tensors = (getattr(self, name.name) for name in fields(self) if name.init)
        return WindowState, tuple(None if tensor is None else tensor.clone() for tensor in tensors)


register_state(WindowState)


def concat_masks(
    old: Tensor | None, new: Tensor | None, batch: int, old_length: int, new_length: int, device: torch.device
) -> Tensor | None:
    """Two padding masks (b, n) and (b, t) concatenated. None: all tokens are valid."""
    if old is None and new is None:
        return None
    old = torch.ones(batch, old_length, dtype=torch.bool, device=device) if old is None else old
    new = torch.ones(batch, new_length, dtype=torch.bool, device=device) if new is None else new
    return torch.cat((old, new), dim=1)


def count_tokens(count: Tensor | None, new: int, device: torch.device) -> Tensor:
    """`count` increased by `new`: a 0-d int64 tensor on the device of the state. None: 0.

    A tensor, because torch.compile and torch.export treat a Python number as a constant.
    """
    return torch.full((), new, device=device) if count is None else count + new
