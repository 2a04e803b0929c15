"""Constructor arguments of modules, recorded so that a saved model can be built again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


class RecordsArguments:
    """Mixin of modules whose constructor arguments are recorded, defaults included. Subclasses need no code for it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name: `type(self)(**self.arguments)` builds the module again."""
        return dict(vars(self)["_arguments"])

    def saved_arguments(self) -> dict[str, Any]:
        """`arguments` with all parts in a form that can be saved.

        Raises:
            TypeError: an argument cannot be saved.
        """
        return self.arguments


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_arguments" not in vars(self):  # the constructor that was called, not one that it calls
            vars(self)["_arguments"] = _by_name(signature, self, args, kwargs)
        init(self, *args, **kwargs)

    return wrapper


def _by_name(signature: inspect.Signature, self: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        bound = signature.bind(self, *args, **kwargs)
    except TypeError:  # the constructor itself raises a better error
        return {}
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:  # it has no name to be given by
            continue
        value = own_copy(bound.arguments[name])
        named |= value if parameter.kind is parameter.VAR_KEYWORD else {name: value}
    return named


def own_copy(value: Any) -> Any:
    """A copy of nested lists and mappings, which later changes by the caller do not reach."""
    if isinstance(value, Mapping):
        return {key: own_copy(item) for key, item in value.items()}
    return type(value)(own_copy(item) for item in value) if type(value) in (list, tuple) else value


def takes_any_keyword(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a signature has `**kwargs`."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
