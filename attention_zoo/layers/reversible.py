"""Reversible residual streams: activations are recomputed from the output in backward and none are saved.

Paper: The Reversible Residual Network, https://arxiv.org/abs/1707.04585
Upstream: DALLE-pytorch, ReversibleSequence.
Differs: parameters are inputs of the autograd function, so that torch.autograd.grad and DDP handle them; eval mode and
autocast are supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


def reversible(functions: Sequence[Function], modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """Two residual streams x1 = x2 = x, updated in turn: x1 += f_0(x2), x2 += f_1(x1), ...

    Activation memory is that of one function, for any number of functions. Backward recomputes each function once, with
    the random state and the autocast settings of forward. Second derivatives raise; torch.compile cannot trace it.

    Args:
        functions: functions from (b, n, d) to (b, n, d). Only x and parameters of `modules` may require gradients.
        modules: the module that each function runs.
        x: (b, n, d).

    Returns:
        Both streams after all functions.
    """
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
    if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
        return run_forward(functions, x, x)
    owned = [[p for p in module.parameters() if p.requires_grad] for module in modules]
    first, second = _Reversible.apply(functions, owned, x, *parameters)  # type: ignore[no-untyped-call]
    return first, second


def run_forward(functions: Sequence[Function], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Run the functions in turn, recorded by autograd as usual."""
    streams = [first, second]
    for k, function in enumerate(functions):
        streams[k % 2] = streams[k % 2] + function(streams[1 - k % 2])
    return streams[0], streams[1]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, functions: Sequence[Function], owned: list[list[Tensor]], x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.functions, ctx.owned, ctx.parameters = functions, owned, parameters
        ctx.random, ctx.autocast = [], _autocast(x)
        streams = [x, x]
        for k, function in enumerate(functions):
            ctx.random.append(_random_state(x))
            streams[k % 2] = streams[k % 2] + function(streams[1 - k % 2])
        ctx.save_for_backward(*streams)
        return streams[0], streams[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the code below is not recorded
            raise RuntimeError("reversible streams have no second derivative: use reversible=False")
        streams, stream_grads = list(ctx.saved_tensors), list(grads)
        totals: dict[Tensor, Tensor] = {}  # gradients of the parameters
        for k in reversed(range(len(ctx.functions))):
            target, source = k % 2, 1 - k % 2
            x = streams[source].detach().requires_grad_()
            with torch.enable_grad(), _same_random_numbers(ctx.random[k], x), ctx.autocast():
                y = ctx.functions[k](x)
            leaves = [x, *ctx.owned[k]]
            input_grads = torch.autograd.grad(y, leaves, stream_grads[target].to(y.dtype), allow_unused=True)
            streams[target] = streams[target] - y.detach()
            if input_grads[0] is not None:
                stream_grads[source] = stream_grads[source] + input_grads[0]
            for parameter, grad in zip(ctx.owned[k], input_grads[1:], strict=True):
                if grad is not None:
                    totals[parameter] = totals[parameter] + grad if parameter in totals else grad
        return None, None, stream_grads[0] + stream_grads[1], *(totals.get(p) for p in ctx.parameters)


def _autocast(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """A function that returns a context with the current autocast settings."""
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _random_state(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None


@contextmanager
def _same_random_numbers(state: tuple[Tensor, Tensor | None], x: Tensor) -> Iterator[None]:
    """Repeat the random numbers drawn from `state`, and restore the random state afterwards."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], x.device)
        yield
