"""A copy of a module in eval mode that shares the tensors of the module and leaves its training mode alone.

Switching the mode of a model while it decodes would switch it for all threads, also for one that trains it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the registered modules of `model` in eval mode.

    The dicts of parameters and buffers are shared: the copy follows an optimizer, `load_state_dict` and `to`.
    Attributes that refer to a module refer to its copy, also through bound methods, closures, partials, lists, tuples,
    sets and dicts; objects of other types are shared as they are. Compiled modules and functions run uncompiled.

    Raises:
        TypeError: a TorchScript module is in training mode.
    """
    registered = set(model.modules())
    done: dict[int, Any] = {}  # converted values by id

    def convert(value: Any) -> Any:
        if id(value) in done:
            return done[id(value)]
        kind = type(value)
        if isinstance(value, nn.Module) and value in registered:
            return convert_registered(value)
        if isinstance(value, nn.Module):
            return replace(value, vars(value).values(), lambda new: _module(kind, zip(vars(value), new, strict=True)))
        if kind in (list, tuple, set, frozenset):
            return replace(value, value, kind)
        if kind in (dict, OrderedDict):
            return replace(value, value.values(), lambda new: kind(zip(value, new, strict=True)))
        if kind is MethodType:
            return replace(value, [value.__self__], lambda new: MethodType(value.__func__, *new))
        if kind is partial:
            parts = [value.func, value.args, value.keywords]
            return replace(value, parts, lambda new: partial(new[0], *new[1], **new[2]))
        if kind is FunctionType and hasattr(value, "_torchdynamo_orig_callable"):  # a result of torch.compile
            return replace(value, [value._torchdynamo_orig_callable], lambda new: new[0])
        if kind is FunctionType:
            return replace(value, value.__closure__ or (), lambda new: _function(value, tuple(new)))
        if kind is CellType:
            with suppress(ValueError):  # of an empty cell
                return replace(value, [value.cell_contents], lambda new: CellType(*new))
        return value

    def replace(value: Any, parts: Any, build: Callable[[list[Any]], Any]) -> Any:
        """`value`, or `build(converted parts)` if a part changes."""
        done[id(value)] = value  # a reference to itself stays
        parts = list(parts)
        new = [convert(part) for part in parts]
        if any(a is not b for a, b in zip(parts, new, strict=True)):
            done[id(value)] = build(new)
        return done[id(value)]

    def convert_registered(module: nn.Module) -> nn.Module:
        if "_orig_mod" in module._modules:  # a result of torch.compile
            done[id(module)] = convert(module._modules["_orig_mod"])
            return done[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            if module.training:
                raise TypeError("model must be in eval mode, call model.eval(): TorchScript modules cannot be copied")
            return module
        copy = done[id(module)] = _module(type(module), ())
        for name, value in list(vars(module).items()):
            vars(copy)[name] = value if name in ("_parameters", "_buffers") else convert(value)
        vars(copy).update(training=False, _compiled_call_impl=None)
        return copy

    return convert(model)


def _module(kind: type[nn.Module], attributes: Any) -> nn.Module:
    module = object.__new__(kind)
    vars(module).update(attributes)
    return module


def _function(like: FunctionType, closure: tuple[CellType, ...]) -> FunctionType:
    function = FunctionType(like.__code__, like.__globals__, like.__name__, like.__defaults__, closure)
    function.__kwdefaults__ = like.__kwdefaults__
    vars(function).update(vars(like))
    return function
