"""Data-parallel training of a model's loss with DDP or FSDP.

    with training.join_world() as world:                          # the process group started by torchrun
        loss_fn = training.DataParallelLoss(model, world, strategy="fsdp")
        optimizer = torch.optim.AdamW(model.parameters())         # after sharding, which replaces the parameters
        loss = loss_fn(tokens, mask=mask)                         # the global batch; each rank computes its rows
        loss.backward()

Papers: DDP, https://arxiv.org/abs/2006.15704; FSDP, https://arxiv.org/abs/2304.11277
"""

from __future__ import annotations

import gc
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from attention_zoo._checks import check_choice, check_flag
from attention_zoo.ops.losses import LossTerm, count_next_tokens

CPU = torch.device("cpu")
STRATEGIES = ("single", "ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process in the default process group.

    Methods described as collective must be called by every rank.

    Attributes:
        rank: rank of this process.
        size: number of processes.
        device: device of the tensors of this rank.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    wrapped: list[Any] = field(default_factory=list, repr=False, compare=False)  # DDP losses, released at exit

    @classmethod
    def current(cls) -> Self:
        """The world of the default process group; a world of size 1 if there is none."""
        if not dist.is_initialized():
            return cls()
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and writes."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a global batch (b, ...); the ranks' rows partition the batch.

        Raises:
            ValueError: the batch has fewer rows than there are processes.
        """
        if batch.shape[0] < self.size:
            raise ValueError(
                f"batch must have at least one row for each of {self.size} processes, got {batch.shape[0]}"
            )
        return batch.tensor_split(self.size)[self.rank]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks, without gradient. Collective."""
        total = value.detach().to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Collective."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in order of rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0; every rank returns its result or raises its exception. Collective."""
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:  # any exception: the other ranks are waiting for the broadcast
                outcome[1] = _picklable(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the arguments of its constructor differ from `error.args`
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def join_world(device: str | torch.device = "cpu") -> Iterator[World]:
    """Context manager that joins the process group started by torchrun; without torchrun, a world of size 1.

    Args:
        device: "cpu" (gloo backend) or "cuda" (NCCL backend, the GPU of the local rank).
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
        # A process aborts at exit while a DDP reducer still references gloo's threads.
        for loss in world.wrapped:
            loss.unwrap()
        world.wrapped.clear()
        gc.collect()
        dist.destroy_process_group()


class DataParallelLoss(nn.Module):
    """Data-parallel `model.loss`: the value and gradients of one process on the global batch.

    Every rank is given the global batch and computes the loss of its rows. The loss is a sum of terms, each a mean over
    some targets (see `LossTerm`); each term is averaged over the targets of all ranks, however unevenly they are
    distributed. Dropout draws different random numbers on each rank.

    Args:
        model: module on `world.device` with `loss_terms(...)`, as every trainable model of this package has, or with
            `loss(tokens, *, mask)`, a mean over next tokens. Must be initialized equally on every rank.
        world: the world returned by `join_world`.
        strategy: "single" (one process); "ddp" (replicated model, averaged gradients); "fsdp" (sharded parameters,
            gradients and optimizer state). FSDP wraps modules of the classes in `fsdp_wrap_classes`, an attribute of
            the model or else of its submodules, and turns parameters into DTensors: create the optimizer afterwards.
        unused_parameters: with "ddp", whether a step may leave parameters without a gradient, as a Memformer on one
            segment does. Slower.

    Raises:
        ValueError: `strategy` is unknown or does not fit the number of processes.
        TypeError: the model has neither `loss_terms` nor `loss`, or `unused_parameters` is not a bool.
    """

    def __init__(
        self, model: nn.Module, world: World, *, strategy: str = "ddp", unused_parameters: bool = False
    ) -> None:
        super().__init__()
        check_choice("strategy", strategy, STRATEGIES)
        check_flag(unused_parameters=unused_parameters)
        if not any(callable(getattr(model, name, None)) for name in ("loss_terms", "loss")):
            raise TypeError(f"model must have a method loss_terms or loss, got {type(model).__name__}")
        if strategy == "single" and world.size > 1:
            raise ValueError(f"strategy must be 'ddp' or 'fsdp' with {world.size} processes, got {strategy=}")
        if strategy != "single" and not dist.is_initialized():
            raise ValueError(f"strategy must be 'single' without a process group, got {strategy=}")
        self.world = world
        self.local: nn.Module = _LossTerms(model)
        if strategy == "ddp":
            world.wrapped.append(self)
            self.local = DistributedDataParallel(self.local, find_unused_parameters=unused_parameters)
        elif strategy == "fsdp":
            _shard(self.local, find_units(model), world)
        if world.rank:
            torch.manual_seed((torch.initial_seed() + world.rank) % 2**63)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The loss of the global batch, the same scalar on every rank.

        Args:
            inputs, options: the arguments of `model.loss`. Each tensor in them has a batch axis first, with at least
                one row per process; scalar tensors are passed on as they are.

        Raises:
            ValueError: there are fewer rows than processes, or tensors differ in the batch axis.
        """
        if self.world.size > 1:
            inputs, options = self._rows(inputs, options)
        terms: list[LossTerm] = self.local(*inputs, **options)
        means = torch.stack([term.mean for term in terms])
        weights = means.new_tensor([term.weight for term in terms])
        if self.world.size == 1:
            return (weights * means).sum()
        counts = torch.stack([torch.as_tensor(term.count, device=means.device) for term in terms])
        # DDP and FSDP average gradients over the ranks: the factor `size` turns the average into a sum.
        shares = weights * means * counts * self.world.size / self.world.sum(counts).clamp(min=1)
        share = shares.sum()
        return share - share.detach() + self.world.sum(share) / self.world.size

    def _rows(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        batches = {leaf.shape[0] for leaf in tree_leaves((inputs, options)) if isinstance(leaf, Tensor) and leaf.ndim}
        if len(batches) > 1:
            raise ValueError(f"inputs must have one size of the batch axis, got {sorted(batches)}")
        return tree_map_only(Tensor, lambda x: self.world.rows(x) if x.ndim else x, (inputs, options))

    def unwrap(self) -> None:
        """Release the process group; the loss is then that of a single process."""
        if isinstance(self.local, DistributedDataParallel):
            self.local, self.world = self.local.module, World(device=self.world.device)


class _LossTerms(nn.Module):
    """The loss terms as `forward`, the only method that DDP and FSDP wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, *inputs: Any, **options: Any) -> list[LossTerm]:
        return getattr(self.model, "loss_terms", self._next_token_terms)(*inputs, **options)

    def _next_token_terms(self, tokens: Tensor, *, mask: Tensor | None = None) -> list[LossTerm]:
        return [LossTerm(self.model.loss(tokens, mask=mask), count_next_tokens(tokens, mask))]


def _shard(model: nn.Module, units: list[nn.Module], world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # these imports take half a second
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # The root reshards after forward, too: after an evaluation without backward its parameters would otherwise stay
    # unsharded and be missed by an optimizer created or stepped then.
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def find_units(model: nn.Module) -> list[nn.Module]:
    """Modules for FSDP to wrap: in each outermost module with `fsdp_wrap_classes`, those of its classes.

    Modules that share a parameter with another one are excluded and belong to the root, since FSDP manages each
    parameter in one group.
    """

    def find(module: nn.Module) -> list[nn.Module]:
        kinds = getattr(module, "fsdp_wrap_classes", None)
        if kinds is None:
            return [unit for child in module.children() for unit in find(child)]
        return [unit for unit in module.modules() if isinstance(unit, tuple(kinds))]

    units = list(dict.fromkeys(find(model)))
    owners = Counter(parameter for unit in units for parameter in unit.parameters())
    return [unit for unit in units if all(owners[parameter] == 1 for parameter in unit.parameters())]


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter or buffer is a DTensor."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in model.state_dict().values())


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The full state_dict of a model that may be sharded, on the CPU of rank 0; empty on other ranks. Collective.

    A plain model of the same configuration can load it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict[str, Any](get_model_state_dict(model, options=options))


def scatter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the full state_dict of a plain model, given on every rank, into a model that may be sharded. Collective.

    Raises:
        ValueError: a key is missing or unexpected, or a shape differs.
    """
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        want = tuple(wanted[name].shape) if name in wanted else "none"
        got = tuple(weights[name].shape) if name in weights else "none"
        if want != got:
            raise ValueError(f"weights must have {want} as {name!r}, got {got}")
    model.load_state_dict({name: spread(weights[name], tensor) for name, tensor in wanted.items()})


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor, equal on every rank, distributed like a DTensor of the same shape. Collective."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
