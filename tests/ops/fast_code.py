"""Proof that a reference runs no code of the fast implementations."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch


def forbid(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Make all functions and autograd functions that the modules define raise AssertionError, and torch's SDPA too."""

    def fast_code_ran(*args: object, **kwargs: object) -> None:
        raise AssertionError("fast code ran")

    functions = []
    for module in modules:
        for value in vars(module).values():
            if getattr(value, "__module__", None) != module.__name__:
                continue  # imported
            if inspect.isclass(value) and issubclass(value, torch.autograd.Function):
                monkeypatch.setattr(value, "forward", staticmethod(fast_code_ran))
            elif inspect.isfunction(value):
                functions.append(value)
    for name, module in list(sys.modules.items()):  # functions are bound in the importing modules too
        if name.startswith("attention_zoo.ops"):
            for attribute, value in list(vars(module).items()):
                if any(value is function for function in functions):
                    monkeypatch.setattr(module, attribute, fast_code_ran)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fast_code_ran)
