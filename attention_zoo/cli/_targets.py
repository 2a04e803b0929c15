"""Attention layers and models named on the command line: a name in BLOCKS or MODELS, or `module:Class`."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attention_zoo._checks import check_choice
from attention_zoo.attention import BLOCKS
from attention_zoo.models import (
    LanguageModel,
    MemoryLanguageModel,
    MultiStreamTransformer,
    cosine_sim_lm,
    gate_loop_lm,
)
from attention_zoo.ops import TextImageLayout

Make = Callable[..., nn.Module]

# Models of one sequence of tokens.
MODELS: dict[str, Make] = {
    make.__name__: make
    for make in (LanguageModel, MemoryLanguageModel, MultiStreamTransformer, cosine_sim_lm, gate_loop_lm)
}


def find_block(name: str, known: Mapping[str, Make] = BLOCKS, kind: str = "block") -> Make:
    """The class or function called `name`. Modules are searched in the current directory as well.

    Args:
        name: a key of `known`, or `module:Class`.
        known: the names.
        kind: what the names are, for error messages.

    Raises:
        ValueError: unknown name, class or function.
        ImportError: the module cannot be imported.
    """
    if ":" not in name:
        check_choice(kind, name, known)
        return known[name]
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ImportError(f"{module_name} must import, but raised {type(error).__name__}: {error}") from error
    make: Make | None = getattr(module, attribute, None)
    if not callable(make):
        classes = {key: value for key, value in vars(module).items() if inspect.isclass(value)}
        modules = [key for key, value in classes.items() if issubclass(value, nn.Module)]
        raise ValueError(f"{name} must be a class or function, but {module_name} has none; its modules are {modules}")
    return make


def read_arguments(source: str | Path | None) -> dict[str, Any]:
    """Constructor arguments by name.

    Args:
        source: a JSON object, or a file that holds one. None: no arguments.

    Raises:
        ValueError: `source` is not a JSON object.
    """
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source or "{}"
        arguments = json.loads(text)
        if not isinstance(arguments, dict):
            raise ValueError(f"a value of type {type(arguments).__name__}")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError included
        example = '{"heads": 4}'
        raise ValueError(
            f"--arguments must be a JSON object such as {example!r}, got {str(source)!r}: {error}"
        ) from error
    return arguments


def accepted(make: Make, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that `make` has a parameter for."""
    parameters = inspect.signature(make).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def required(make: Make, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that `make` has a parameter without default for."""
    parameters = inspect.signature(make).parameters
    return {
        name: value for name, value in arguments.items() if name in parameters
        and parameters[name].default is inspect.Parameter.empty
    }  # fmt: skip


def make_block(make: Make, name: str, dim: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A new layer with `dim` features.

    Args:
        make: result of `find_block(name)`.
        name: name of the layer in error messages.
        dim: number of features.
        arguments: other constructor arguments; `layout` may be a mapping with the sizes of a `TextImageLayout`.

    Raises:
        ValueError: the constructor rejects the arguments, or the result is not a module.
    """
    given = {"dim": dim, **arguments}
    if isinstance(given.get("layout"), Mapping):
        given["layout"] = TextImageLayout(**given["layout"])
    first = next(iter(inspect.signature(make).parameters), "dim")
    # a constructor may have another name for its number of features
    return _call(make, name, given) if first in given else _call(make, name, given, given.pop("dim"))


def make_model(make: Make, name: str, num_tokens: int, dim: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A new model of `num_tokens` tokens, with `dim` features and a depth of 2 unless it has defaults or a stack.

    Raises:
        ValueError: the constructor rejects the arguments, or the result is not a module.
    """
    required = {"dim": dim, "depth": 2}
    parameters = inspect.signature(make).parameters.items()
    if "stack" in arguments:
        required = {}
    given = {key: required[key] for key, p in parameters if key in required and p.default in (p.empty, None)}
    return _call(make, name, {**accepted(make, num_tokens=num_tokens), **given, **arguments})


def _call(make: Make, name: str, arguments: Mapping[str, Any], *first: Any) -> nn.Module:
    try:
        block = make(*first, **arguments)
    except TypeError as error:
        raise ValueError(f"--arguments must fit {name}, got {error}") from error
    if not isinstance(block, nn.Module):
        raise ValueError(f"{name} must give an nn.Module, got {type(block).__name__}")
    return block


def layout_for(length: int) -> TextImageLayout:
    """Text and a square image with `length` tokens in total: about 256 of text, or a fifth if that is less."""
    side = max(1, math.isqrt(length - min(256, length // 5)))
    return TextImageLayout(length - side * side, side, side)


def reads_context(block: nn.Module) -> bool:
    """Whether `forward` takes a context sequence."""
    return "context" in inspect.signature(block.forward).parameters
