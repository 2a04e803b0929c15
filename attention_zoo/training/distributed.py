"""Training in many processes: torch's own data parallelism around a model's loss, with the numbers of one process.

    with training.join_world() as world:                          # the processes that torchrun started
        loss_of = training.DataParallelLoss(model, world, strategy="fsdp")
        optimizer = torch.optim.AdamW(model.parameters())         # after the line above, which may shard them
        loss = loss_of(tokens, mask=mask)                         # the whole batch; each process reads its rows
        loss.backward()

Papers: DDP, https://arxiv.org/abs/2006.15704; fully sharded data parallelism, https://arxiv.org/abs/2304.11277
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attention_zoo._checks import check_choice, check_padding
from attention_zoo.ops.losses import count_next_tokens

CPU = torch.device("cpu")
STRATEGIES = ("single", "ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """This process among those that train together. What has a collective in it, all processes must call.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: where its tensors live.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    wrapped: list[Any] = field(default_factory=list, repr=False, compare=False)  # losses that hold a process group

    @classmethod
    def current(cls) -> Self:
        """This process among those of torch's default process group; alone where there is none."""
        if not dist.is_initialized():
            return cls()
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """The rows of a batch (b, ...) that are this process's; all together have each row once.

        Raises:
            ValueError: there are more processes than rows.
        """
        if batch.shape[0] < self.size:
            raise ValueError(
                f"batch must have at least one row for each of {self.size} processes, got {batch.shape[0]}"
            )
        return batch.tensor_split(self.size)[self.rank]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, without gradient: a collective."""
        total = value.detach().to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process: a collective."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank: a collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, action: Callable[[], Any]) -> Any:
        """Let the first process act while the others wait; what it returns or raises, all do: a collective."""
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:  # whatever it is, the others must not wait for ever
                outcome[1] = _sendable(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its constructor takes something else than it keeps
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def join_world(device: str | torch.device = "cpu") -> Iterator[World]:
    """Join the processes that torchrun started, for the time of a `with`; without torchrun, a world of one.

    Args:
        device: "cpu" (they talk by gloo) or "cuda" (by NCCL, each process with the GPU of its local rank).
    """
    place = torch.device(device)
    if not dist.is_torchelastic_launched():
        yield World(device=place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    world = World.current()
    try:
        yield world
    finally:
        # gloo's threads abort a process that ends while something still holds them.
        for loss in world.wrapped:
            loss.unwrap()
        world.wrapped.clear()
        gc.collect()
        dist.destroy_process_group()


class DataParallelLoss(nn.Module):
    """`model.loss(tokens, mask)` over a batch whose rows the processes share.

    Its value, the same in every process, and its gradients are those of one process with the whole batch: the mean
    over the real targets of all, however unevenly they fall. Where dropout draws, each process draws its own.

    Args:
        model: a module with `loss(tokens, mask)`, a mean over next tokens; on `world.device`. Build it from the same
            seed in every process. With "fsdp" its parameters become DTensors, so make the optimizer afterwards.
        world: what `join_world` gave.
        strategy: "single", one process; "ddp", the model in every process, gradients averaged; "fsdp", parameters,
            gradients and optimizer state in shards, the parameters of one layer at a time gathered to be used. What a
            layer is the model says in `fsdp_wrap_classes`, a tuple of classes that any of its modules may have.

        unused_parameters: with "ddp", whether a step may leave parameters without a gradient, at some cost in time.

    Raises:
        ValueError: an unknown strategy, or one that does not fit the number of processes.
        TypeError: the model has no `loss`.
    """

    def __init__(
        self, model: nn.Module, world: World, *, strategy: str = "ddp", unused_parameters: bool = False
    ) -> None:
        super().__init__()
        check_choice("strategy", strategy, STRATEGIES)
        if not callable(getattr(model, "loss", None)):
            raise TypeError(f"model must have a method loss(tokens, mask), got {type(model).__name__}")
        if strategy == "single" and world.size > 1:
            raise ValueError(f"strategy must be 'ddp' or 'fsdp' with {world.size} processes, got {strategy=}")
        if strategy != "single" and not dist.is_initialized():
            raise ValueError(f"strategy must be 'single' without torchrun's processes, got {strategy=}")
        self.world = world
        self.local: nn.Module = _Loss(model)
        if strategy == "ddp":
            world.wrapped.append(self)
            self.local = DistributedDataParallel(self.local, find_unused_parameters=unused_parameters)
        elif strategy == "fsdp":
            _shard(self.local, find_units(model), world)
        if world.rank:
            torch.manual_seed((torch.initial_seed() + world.rank) % 2**63)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean loss, in nats, over all real targets of a batch that every process is given whole.

        Args:
            tokens: (b, n) int, at least one row for each process.
            mask: (b, n) bool, True = a real token.

        Raises:
            ValueError: fewer rows than processes, or a mask of another shape.
            TypeError: a mask that is not boolean.
        """
        check_padding(mask, tokens)
        rows = self.world.rows(tokens)
        real = None if mask is None else self.world.rows(mask)
        loss: Tensor = self.local(rows, real)
        if self.world.size == 1:
            return loss
        count = count_next_tokens(rows, real)
        # The processes' gradients are averaged: scaled by their number they are summed.
        share = loss * (count * self.world.size / self.world.sum(count).clamp(min=1))
        return share - share.detach() + self.world.sum(share) / self.world.size

    def unwrap(self) -> None:
        """Let go of the other processes: what is left is the model's own loss."""
        if isinstance(self.local, DistributedDataParallel):
            self.local, self.world = self.local.module, World(device=self.world.device)


class _Loss(nn.Module):
    """torch's wrappers see what goes through `forward` alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        loss: Tensor = self.model.loss(tokens, mask)
        return loss


def _shard(whole: nn.Module, units: list[nn.Module], world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # importing these costs half a second
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # The whole, too, puts its shards back after every forward: gathered weights that an evaluation left in their place
    # would hide them from an optimizer made or stepped then.
    for unit in (*units, whole):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def find_units(model: nn.Module) -> list[nn.Module]:
    """The modules to shard one by one: those of the classes in `fsdp_wrap_classes`, of the model or of any module in it.

    One that shares parameters with another is left to the whole model, since a parameter has one place.
    """
    kinds = tuple({kind for module in model.modules() for kind in getattr(module, "fsdp_wrap_classes", ())})
    units = [module for module in model.modules() if isinstance(module, kinds)]
    owners: dict[Tensor, int] = {}
    for unit in units:
        for parameter in unit.parameters():
            owners[parameter] = owners.get(parameter, 0) + 1
    return [unit for unit in units if all(owners[parameter] == 1 for parameter in unit.parameters())]


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is spread over processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in model.state_dict().values())


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state_dict of a model whose parameters may be sharded, on the CPU of the first process: a collective.

    The other processes get an empty dict. A plain model of the same arguments loads it, and saves itself as ever.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def scatter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a plain model's whole state_dict, which every process has, where parameters are spread: a collective.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        want = tuple(wanted[name].shape) if name in wanted else "none"
        got = tuple(weights[name].shape) if name in weights else "none"
        if want != got:
            raise ValueError(f"weights must have {want} as {name!r}, got {got}")
    model.load_state_dict({name: spread(weights[name], tensor) for name, tensor in wanted.items()})


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, spread over them as another one of its shape is: a collective."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
