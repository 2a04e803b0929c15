"""An optimizer's state by the names of the parameters, which stay the same however these are spread over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, dict[str, Any]]  # by the name of a parameter, then by the optimizer's own names


def find_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, each once, as an optimizer has them.

    Asked for a state_dict, FSDP puts back the shards in whose place a forward without a backward left whole tensors.
    """
    found: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            found.setdefault(tensor, name)
    return {name: tensor for tensor, name in found.items()}


def name_groups(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups.

    Raises:
        ValueError: the optimizer has a parameter that the model has not.
    """
    names = {parameter: name for name, parameter in find_parameters(model).items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"optimizer must have the model's parameters as they are after sharding, and not split by a "
                    f"tensor-parallel plan, but it has another of shape {tuple(parameter.shape)}"
                )
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def split_state(model: nn.Module, optimizer: Optimizer) -> tuple[State, State]:
    """The tensors of the state, and all that is no tensor; nothing of a parameter that was never updated."""
    tensors: State = {}
    values: State = {}
    for name, parameter in find_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            place = tensors if isinstance(value, Tensor) else values
            place.setdefault(name, {})[key] = value
    return tensors, values


def room_for_state(model: nn.Module, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> State:
    """Tensors to read a state into; what has a parameter's shape is spread over processes as the parameter is.

    Args:
        found: dtype and shape by `name of the parameter.name in the optimizer`.
    """
    room: State = {}
    for name, parameter in find_parameters(model).items():
        for path, (dtype, shape) in found.items():
            owner, _, key = path.rpartition(".")
            if owner == name:
                like = parameter.detach()
                fits = shape == tuple(like.shape)
                value = torch.empty_like(like, dtype=dtype) if fits else torch.empty(shape, dtype=dtype)
                room.setdefault(name, {})[key] = value
    return room


def load_optimizer(optimizer: Optimizer, groups: list[list[str]], state: State, settings: list[dict[str, Any]]) -> None:
    """Give an optimizer its state, and the settings of its groups."""
    names = [name for group in groups for name in group]
    order = {name: k for k, name in enumerate(names)}
    optimizer.load_state_dict(
        {
            "state": {order[name]: values for name, values in state.items()},
            "param_groups": [
                {**setting, "params": [order[name] for name in group]}
                for setting, group in zip(settings, groups, strict=True)
            ],
        }
    )
