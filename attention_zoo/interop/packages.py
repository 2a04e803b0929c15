"""The entry point: an upstream package and class, its state_dict and its arguments -> a module of this library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor, nn

from attention_zoo._checks import check_choice
from attention_zoo.interop import cosine, dalle, gateloop, memformer, quartic
from attention_zoo.interop.loader import Loader
from attention_zoo.interop.weights import Transfer, Weights

PACKAGES: dict[str, dict[str, type[Loader]]] = {
    "quartic-transformer": quartic.CLASSES,
    "flash-cosine-sim-attention": cosine.CLASSES,
    "gateloop-transformer": gateloop.CLASSES,
    "memformer": memformer.CLASSES,
    "DALLE-pytorch": dalle.CLASSES,
}


def from_upstream(package: str, cls: str, state_dict: Mapping[str, Tensor], **arguments: Any) -> nn.Module:
    """Build the module that computes what an upstream class computes with these weights.

    Every entry of the state_dict is used, repeats another entry (shared layers and tables; equality is checked), is a
    buffer that is recomputed, or is left out, because it belongs to an image autoencoder (`vae.`) or has no effect with
    these arguments (gates with ablate_state_transition=True, the memory update with num_mem_updates=0).

    What cannot be loaded: odd numbers of streams of quartic-transformer whose heads are mixed across streams, and its
    non-linear norm if it was trained for one length; data-dependent relative positions of gateloop-transformer without
    ablate_state_transition=True; block-sparse attention of DALLE-pytorch beyond 256 tokens; models without layers, and
    memories without slots.

    Args:
        package: a name in PACKAGES.
        cls: a class of that package.
        state_dict: its weights under their upstream names.
        arguments: arguments of its constructor by their upstream names; the others have their upstream defaults.
            Options of its `forward` that change the function (ablations of gateloop-transformer) are given here too.

    Returns:
        The module in eval mode, in the dtype of the weights.

    Raises:
        ValueError: the package, the class or an argument is unknown; a weight is missing, unexpected or does not fit;
            or the weights cannot be loaded, for the reason in the message.
        TypeError: `state_dict` is not a mapping from names to tensors.
    """
    loader = find_loader(package, cls)
    known = {field.name: field for field in fields(loader)}
    for name in arguments:
        check_choice(f"argument of {cls}", name, sorted(known))
    missing = [name for name, field in known.items() if field.default is MISSING and name not in arguments]
    if missing:
        raise ValueError(f"arguments must hold {missing} for {cls}, which have no default")
    weights = state_dict if isinstance(state_dict, Weights) else Weights(state_dict)
    built = loader(**arguments)
    module = built.build(weights)
    built.transfer(Transfer(weights, module))
    weights.finish()
    return module.eval()


def find_loader(package: str, cls: str) -> type[Loader]:
    """The loader of an upstream class.

    Raises:
        ValueError: the package or the class is unknown; the message proposes the nearest name.
    """
    plain = {name.lower().replace("_", "-"): name for name in PACKAGES}
    package = plain.get(str(package).lower().replace("_", "-"), package)
    check_choice("package", package, PACKAGES)
    check_choice("cls", cls, PACKAGES[package])
    return PACKAGES[package][cls]
