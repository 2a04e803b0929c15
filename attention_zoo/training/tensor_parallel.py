"""Tensor parallelism of attention and feedforward layers.

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

# Blocks with independent heads. User-defined subclasses may mix their heads and are replicated.
HEAD_PARALLEL = {BLOCKS[name] for name in ("full", "cosine_sim", "conv", "axial_row", "axial_col", "block_sparse")}


def tensor_parallel_plan(model: nn.Module, processes: int) -> dict[str, ParallelStyle]:
    """A plan for torch's `parallelize_module`: column-parallel QKV and hidden features, row-parallel outputs.

    Parallelized are feedforwards, and the blocks `full`, `cosine_sim`, `conv`, `axial_row`, `axial_col` and
    `block_sparse` without a position bias, a query-key norm or an output gate. All other modules are replicated
    (embeddings, norms, logits, recurrences, talking heads), so every rank must be given the same input and the same
    random seed.

    The state_dict keeps the names, shapes and row order of the plain model: `training.gather_weights` returns what the
    plain model loads, and `training.scatter_weights` loads what the plain model saved.

    The parameters are then DTensors and plain tensors, which torch's `clip_grad_norm_` and `foreach` optimizers do not
    accept together: use one parameter group for each kind, and clip them separately.

    Args:
        model: a module that contains blocks and feedforwards of this package.
        processes: size of the device mesh.

    Raises:
        ValueError: `processes` does not divide heads, kv_heads or hidden features; a module is already parallelized; or
            the model is itself a block or feedforward.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    check_positive(processes=processes)
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, SelfAttention)
            and type(module) in HEAD_PARALLEL
            and module.bias is None
            and module.q_norm is None  # its weight is shared by the heads
            and module.to_gate is None
        ):
            _check(name, module, processes, heads=module.heads, kv_heads=module.kv_heads)
            plan[name] = _heads_parallel()
        elif isinstance(module, FeedForward) and type(module) in FEEDFORWARDS.values():
            _check(name, module, processes, hidden_features=module.to_out.in_features)
            columns = ("to_hidden", "to_gate") if module.gated else ("to_hidden",)
            plan |= {f"{name}.{part}": ColwiseParallel() for part in columns}
            plan[f"{name}.to_out"] = RowwiseParallel()
    return plan


def _check(name: str, module: SelfAttention | FeedForward, processes: int, **sizes: int) -> None:
    if not name:
        raise ValueError("model must contain the modules to parallelize, not be one: wrap it in nn.Sequential")
    if hasattr(module.to_out.weight, "full_tensor"):
        raise ValueError(f"model must not be parallelized already, but {name} is")
    for what, size in sizes.items():
        if size % processes:
            raise ValueError(f"{what} must be a multiple of the {processes} processes, got {size} in {name}")


def _heads_parallel() -> ParallelStyle:
    """The parallel style of an attention block: each rank computes heads / processes heads."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    class HeadsParallel(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            block: Any = module
            rows = rows_by_process(block.to_qkv.sizes, device_mesh.size())

            def restore_order(projections: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
                for name, _parameter in projections.named_parameters():
                    state[prefix + name] = state[prefix + name].full_tensor()[rows.argsort()]

            def group_by_process(projections: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
                for name, _parameter in projections.named_parameters():
                    if prefix + name in state:
                        state[prefix + name] = distribute_tensor(state[prefix + name][rows], device_mesh, [Shard(0)])

            block.heads //= device_mesh.size()
            block.kv_heads //= device_mesh.size()
            for parameter in block.to_qkv.parameters():
                parameter.data = parameter.data[rows]
            parallelize_module(block.to_qkv, device_mesh, ColwiseParallel())
            parallelize_module(block.to_out, device_mesh, RowwiseParallel())
            block.to_qkv.register_state_dict_post_hook(restore_order)
            block.to_qkv.register_load_state_dict_pre_hook(group_by_process)
            return module

    return HeadsParallel()


def rows_by_process(sizes: dict[str, int], processes: int) -> Tensor:
    """The order of the rows of stacked projections in which each process's rows of all projections are contiguous."""
    ends = torch.tensor(list(sizes.values())).cumsum(0)
    shares = [part.chunk(processes) for part in torch.arange(int(ends[-1])).tensor_split(ends[:-1])]
    return torch.cat([share[process] for process in range(processes) for share in shares])
