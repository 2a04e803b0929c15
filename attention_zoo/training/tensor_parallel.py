"""Attention and feedforwards split over processes, each with some of the heads and some of the hidden features.

    mesh = init_device_mesh("cuda", (world_size,))
    parallelize_module(model, mesh, tensor_parallel_plan(model, mesh.size()))

Paper: Megatron-LM, https://arxiv.org/abs/1909.08053
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_positive
from attention_zoo.attention import BLOCKS, SelfAttention
from attention_zoo.layers.feedforward import FEEDFORWARDS, FeedForward

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

# Blocks whose heads know nothing of each other. Subclasses of one's own may be otherwise, and are left whole.
SPLIT = {BLOCKS[name] for name in ("full", "cosine_sim", "conv", "axial_row", "axial_col", "block_sparse")}


def tensor_parallel_plan(model: nn.Module, processes: int) -> dict[str, ParallelStyle]:
    """A plan for torch's `parallelize_module`: queries, keys, values and hidden features by column, outputs by row.

    Split are `full`, `cosine_sim`, `conv`, `axial_row`, `axial_col` and `block_sparse`, where no relative bias belongs
    to their heads, and the zoo's feedforwards. All else every process computes whole: embeddings, norms, logits,
    recurrences, talking heads. So every process must get the same input, and draw the same random numbers.

    The state_dict keeps the names of the plain model and the order of its rows: `training.gather_weights` gives what
    the plain model loads, and `training.scatter_weights` loads what the plain model has.

    Parameters are of two kinds then, DTensors and plain ones, which torch's `clip_grad_norm_` and its optimizers with
    `foreach` do not take together: give each kind a group of its own, and clip each alone.

    Args:
        model: any module with blocks and feedforwards of the zoo in it.
        processes: how many share them, the size of the mesh.

    Raises:
        ValueError: heads, kv_heads or hidden features cannot be divided among the processes, or are already.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    check_positive(processes=processes)
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention) and type(module) in SPLIT and module.bias is None:
            check_whole(name, module.to_qkv.weight)
            check_divides(name, processes, heads=module.heads, kv_heads=module.kv_heads)
            plan[name] = _heads_parallel()
        elif isinstance(module, FeedForward) and type(module) in FEEDFORWARDS.values():
            check_whole(name, module.to_out.weight)
            check_divides(name, processes, hidden_features=module.to_out.in_features)
            columns = ("to_hidden", "to_gate") if module.gated else ("to_hidden",)
            plan |= {f"{name}.{part}": ColwiseParallel() for part in columns}
            plan[f"{name}.to_out"] = RowwiseParallel()
    return plan


def check_divides(name: str, processes: int, **sizes: int) -> None:
    """Refuse a module that cannot be shared evenly.

    Raises:
        ValueError: naming the module and the size.
    """
    for what, size in sizes.items():
        if size % processes:
            raise ValueError(f"{what} must be a multiple of the {processes} processes, got {size} in {name or 'model'}")


def check_whole(name: str, weight: Tensor) -> None:
    """Refuse a module that is split already, or that stands alone, whose plan would have no name.

    Raises:
        ValueError: naming it.
    """
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"model must be whole, but {name} is split already")
    if not name:
        raise ValueError("model must contain the modules to split, and not be one: put it into an nn.Sequential")


def _heads_parallel() -> ParallelStyle:
    """The style of a block of attention: every process has its share of the heads."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module

    class HeadsParallel(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            block: Any = module
            block.heads //= device_mesh.size()
            block.kv_heads //= device_mesh.size()
            rows = rows_by_process(block.to_qkv.sizes, device_mesh.size())

            def split(name: str, projections: nn.Module, mesh: DeviceMesh) -> None:
                for key, parameter in list(projections.named_parameters(recurse=False)):
                    spread = distribute_tensor(parameter.detach()[rows], mesh, [Shard(0)])
                    projections.register_parameter(key, nn.Parameter(spread, parameter.requires_grad))

            def enter(projections: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> Tensor:
                return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

            def leave(projections: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
                local: Tensor = output.to_local()
                return local

            def show(projections: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
                for key, parameter in projections.named_parameters(recurse=False):
                    whole: Any = parameter.detach()
                    state[prefix + key] = whole.full_tensor()[rows.argsort()]

            def take(projections: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
                for key, _parameter in projections.named_parameters(recurse=False):
                    if prefix + key in state:
                        state[prefix + key] = distribute_tensor(state[prefix + key][rows], device_mesh, [Shard(0)])

            distribute_module(block.to_qkv, device_mesh, split, enter, leave)  # type: ignore[arg-type]
            block.to_qkv.register_state_dict_post_hook(show)
            block.to_qkv.register_load_state_dict_pre_hook(take)
            parallelize_module(block.to_out, device_mesh, RowwiseParallel())
            return module

    return HeadsParallel()


def rows_by_process(sizes: dict[str, int], processes: int) -> Tensor:
    """The rows of projections one below the other, so that those of each process, of every projection, are together."""
    ends = torch.tensor(list(sizes.values())).cumsum(0)
    shares = [part.chunk(processes) for part in torch.arange(int(ends[-1])).tensor_split(ends[:-1])]
    return torch.cat([share[process] for process in range(processes) for share in shares])
