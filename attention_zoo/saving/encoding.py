"""Constructor arguments as JSON: names, numbers and lists as they are, parts as their class and arguments."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from attention_zoo.layers.feedforward import FEEDFORWARDS
from attention_zoo.layers.norms import NORMS
from attention_zoo.layers.positions import ALiBi, RelativeBias, Rotary, TextImageRotary
from attention_zoo.ops import TextImageLayout

# The classes that a configuration may name. Decoding builds no other class.
PARTS: dict[str, Any] = {
    part.__name__: part for part in (TextImageLayout, Rotary, TextImageRotary, RelativeBias, ALiBi)
}
for parts in (FEEDFORWARDS, NORMS):
    PARTS |= {part.__name__: part for part in parts.values()}


def is_plain(value: Any) -> bool:
    """Whether a value is made of names, numbers, lists and mappings only."""
    if isinstance(value, Mapping):
        return all(is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (str, numbers.Real))


def encode(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments as JSON. A part that occurs twice has an `id`, and is decoded once.

    Raises:
        TypeError: JSON cannot hold an argument; the message names it.
    """
    found: dict[int, dict[str, Any]] = {}  # the encoded parts, by the id of the module

    def encode_value(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: encode_value(f"{name}[{key!r}]", item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [encode_value(f"{name}[{index}]", item) for index, item in enumerate(value)]
        if value is None or isinstance(value, (str, bool)):
            return value
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        cls = value if isinstance(value, type) else type(value)
        if PARTS.get(cls.__name__) is not cls:
            raise TypeError(
                f"{name} must be made of names, numbers, lists and parts ({', '.join(PARTS)}) for the model to be "
                f"saved, got {value!r}"
            )
        if value is cls:
            return {"class": cls.__name__}
        if id(value) in found:
            return {"same_as": found[id(value)].setdefault("id", list(found).index(id(value)))}
        part = found[id(value)] = {"class": cls.__name__, "arguments": {}}
        inner = asdict(value) if isinstance(value, TextImageLayout) else value.saved_arguments()
        part["arguments"] = encode_value(name, inner)
        return part

    return {name: encode_value(name, value) for name, value in arguments.items()}


def decode(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from the result of `encode`.

    Raises:
        ValueError, TypeError: a part has an unknown class or does not accept its arguments.
    """
    made: dict[int, Any] = {}

    def decode_value(value: Any) -> Any:
        if isinstance(value, list):
            return [decode_value(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"same_as"}:
            return made[value["same_as"]]
        if not {"class"} <= value.keys() <= {"class", "arguments", "id"}:
            return {key: decode_value(item) for key, item in value.items()}
        if value["class"] not in PARTS:
            raise ValueError(f"class must be one of {', '.join(PARTS)}, got {value['class']!r}")
        part = PARTS[value["class"]]
        if "arguments" in value:
            part = part(**decode_value(value["arguments"]))
        if "id" in value:
            made[value["id"]] = part
        return part

    return {name: decode_value(value) for name, value in arguments.items()}
