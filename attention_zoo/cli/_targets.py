"""Blocks named on the command line: one of the zoo by its name, or a user's own as `module:Class`."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from attention_zoo._checks import check_choice
from attention_zoo.attention import BLOCKS
from attention_zoo.ops.sparse.image_layout import TextImageLayout

Make = Callable[..., nn.Module]


def find_block(name: str) -> Make:
    """What makes the block that `name` stands for; a module is looked for in the present folder too.

    Raises:
        ValueError: no such block, class or function.
        ImportError: the module cannot be imported.
    """
    if ":" not in name:
        check_choice("block", name, BLOCKS)
        return BLOCKS[name]
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        raise
    except Exception as error:
        raise ImportError(f"{module_name} must import, but raised {type(error).__name__}: {error}") from error
    make = getattr(module, attribute, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
        raise ValueError(f"{name} must be a class or function, but {module_name} has none; its modules are {known}")
    found: Make = make
    return found


def read_arguments(text: str | None) -> dict[str, Any]:
    """The arguments of a constructor, from a JSON object.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--arguments must be a JSON object such as '{{\"heads\": 4}}', got {text!r}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"--arguments must be a JSON object, got {text!r}")
    return found


def make_block(make: Make, name: str, dim: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A fresh block for features of size `dim`; a `layout` among the arguments is an object of its three sizes.

    Raises:
        ValueError: the constructor does not take the arguments, or gives no module.
    """
    given = {"dim": dim, **arguments}
    if isinstance(given.get("layout"), Mapping):
        given["layout"] = TextImageLayout(**given["layout"])
    first = next(iter(inspect.signature(make).parameters), None)
    try:
        named = first in (None, "dim") or first in given
        block = make(**given) if named else make(given.pop("dim"), **given)  # it calls its features something else
    except TypeError as error:
        raise ValueError(f"--arguments must fit {name}, got {error}") from error
    if not isinstance(block, nn.Module):
        raise ValueError(f"{name} must give an nn.Module, got {type(block).__name__}")
    return block
