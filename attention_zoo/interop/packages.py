"""The door: a package's name, a class's name, its state_dict and its arguments, to a module of the zoo."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from attention_zoo._checks import check_choice
from attention_zoo.interop import cosine, dalle, gateloop, memformer, quartic
from attention_zoo.interop.weights import Weights

Loader = Callable[..., nn.Module]

PACKAGES: dict[str, dict[str, Loader]] = {
    "quartic-transformer": quartic.CLASSES,
    "flash-cosine-sim-attention": cosine.CLASSES,
    "gateloop-transformer": gateloop.CLASSES,
    "memformer": memformer.CLASSES,
    "DALLE-pytorch": dalle.CLASSES,
}


def from_upstream(package: str, cls: str, state_dict: Mapping[str, Tensor], **arguments: Any) -> nn.Module:
    """Build the zoo's module for old weights, computing what they computed where they were trained.

    Every entry of the state_dict is used, repeats one that is (shared layers and tables: their equality is checked), is
    a buffer that is rebuilt, or belongs to an image autoencoder (`vae.`), which is left out.

    Args:
        package: a name in PACKAGES.
        cls: a class of that package.
        state_dict: its weights under their old names.
        arguments: what its constructor was given, by its old names; the rest has its old defaults. Switches that its
            `forward` took and that change what a block is (GateLoop's ablations) go here as well.

    Returns:
        The module in eval mode, in the dtype of the weights.

    Raises:
        ValueError: an unknown package, class or argument, a weight that is missing, left over, or does not fit, or one
            that cannot be loaded at all; the message says why.
        TypeError: the state_dict is no mapping from names to tensors.
    """
    loader = find_loader(package, cls)
    known = {
        name: parameter
        for name, parameter in inspect.signature(loader).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in arguments:
        check_choice(f"argument of {cls}", name, sorted(known))
    missing = [name for name, one in known.items() if one.default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise ValueError(f"arguments must hold {missing} for {cls}, which have no default")
    weights = state_dict if isinstance(state_dict, Weights) else Weights(state_dict)
    module = loader(weights, **arguments)
    weights.finish()
    return module.eval()


def find_loader(package: str, cls: str) -> Loader:
    """What loads this class.

    Raises:
        ValueError: an unknown package or class; the nearest is proposed.
    """
    plain = {name.lower().replace("_", "-"): name for name in PACKAGES}
    package = plain.get(str(package).lower().replace("_", "-"), package)
    check_choice("package", package, PACKAGES)
    check_choice("cls", cls, PACKAGES[package])
    return PACKAGES[package][cls]
