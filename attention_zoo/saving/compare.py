"""The first difference of two modules other than the values of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from attention_zoo._checks import is_builtin
from attention_zoo.ops import TextImageLayout

# Attributes that do not change what a module computes, or that are compared as weights and submodules.
IGNORED = {*vars(nn.Module())}
SCALARS = (bool, int, float, str)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is neither of this package nor of torch."""
    return not (is_builtin(module) or type(module).__module__.startswith("torch."))


def first_difference(model: nn.Module, twin: nn.Module) -> str | None:
    """What differs first between a model and the one built from its configuration, or None.

    Compared are the classes of all submodules, the names, shapes and sharing of parameters and buffers, forward hooks,
    and the attributes that are numbers, names, functions and collections of them. A module with a method
    `output_difference` is asked as well, if the twin has memory; the weights of the twin may then be overwritten.
    """
    pairs: dict[int, Tensor] = {}  # by the id of a tensor of the model, that of the twin
    compared: set[tuple[int, int]] = set()

    def compare(path: str, one: nn.Module, other: nn.Module) -> str | None:
        if (id(one), id(other)) in compared:
            return None
        compared.add((id(one), id(other)))
        where = path or "the model"
        if type(one) is not type(other):
            return f"{where} is {_name(one)}, configured is {_name(other)}"
        for hooks in HOOKS:
            if len(getattr(one, hooks)) != len(getattr(other, hooks)):
                return f"{where} has {len(getattr(one, hooks))} hooks in {hooks}, which cannot be saved"
        return (
            compare_attributes(where, one, other)
            or compare_tensors(path, one, other)
            or compare_children(path, one, other)
            or compare_outputs(path, one, other)
        )

    def compare_attributes(where: str, one: nn.Module, other: nn.Module) -> str | None:
        ours, theirs = vars(one), vars(other)
        for name in sorted((ours.keys() | theirs.keys()) - IGNORED):
            if "cache" in name:
                continue
            if name.startswith("_") and not (is_foreign(one) and type(theirs.get(name)) in SCALARS):
                continue
            if name not in theirs:
                if callable(ours[name]) or hasattr(type(one), name):
                    return f"{where}.{name} was set to {ours[name]!r}"
                continue  # an attribute that the class does not read
            value, want = _comparable(ours.get(name, _MISSING)), _comparable(theirs[name])
            if want is not _UNKNOWN and value != want:
                return f"{where}.{name} is {ours.get(name, 'missing')!r}, configured is {theirs[name]!r}"
        return None

    def compare_tensors(path: str, one: nn.Module, other: nn.Module) -> str | None:
        for kind in ("_parameters", "_buffers"):
            ours, theirs = getattr(one, kind), getattr(other, kind)
            for name in [*ours, *(name for name in theirs if name not in ours)]:
                where, a, b = _join(path, name), ours.get(name), theirs.get(name)
                shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (a, b)]
                if shapes[0] != shapes[1]:
                    return f"{where} has shape {shapes[0]}, configured is {shapes[1]}"
                if a is not None and b is not None and pairs.setdefault(id(a), b) is not b:
                    return f"{where} shares its values with another tensor, configured is one of its own"
                if a is not None and b is not None and shared.setdefault(id(b), a) is not a:
                    return f"{where} has its own values, configured are those of another tensor"
        return None

    def compare_outputs(path: str, one: Any, other: nn.Module) -> str | None:
        on_meta = any(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])
        found = None if on_meta or not hasattr(one, "output_difference") else one.output_difference(other)
        return found and f"{_join(path, found)}, has another output than the configured one with the same weights"

    def compare_children(path: str, one: nn.Module, other: nn.Module) -> str | None:
        ours, theirs = one._modules, other._modules
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            a, b = ours.get(name), theirs.get(name)
            if a is None or b is None:
                if a is not b:
                    return f"{_join(path, name)} is {_name(a)}, configured is {_name(b)}"
            elif difference := compare(_join(path, name), a, b):
                return difference
        return None

    shared: dict[int, Tensor] = {}  # by the id of a tensor of the twin, that of the model
    return compare("", model, twin)


_UNKNOWN = object()  # a value that is not compared
_MISSING = object()


def _comparable(value: Any) -> Any:
    """A value that == compares by content, or _UNKNOWN for one of another kind, such as a tensor or a module."""
    if value is _MISSING or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_comparable(item) for item in value]
        return _UNKNOWN if any(item is _UNKNOWN for item in items) else items
    if isinstance(value, Mapping):
        return _comparable([*value.items()])
    if isinstance(value, partial):
        return _comparable([value.func, value.args, value.keywords])
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, TextImageLayout) else _UNKNOWN


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(module: nn.Module | None) -> str:
    return "None" if module is None else type(module).__name__
