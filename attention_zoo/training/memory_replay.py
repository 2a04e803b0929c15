"""Back-propagation through many segments at the activation memory of one.

Paper: Memformer's memory replay back-propagation, https://arxiv.org/abs/2010.06891
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from attention_zoo.ops.losses import masked_cross_entropy
from attention_zoo.ops.precision import no_autocast

Loss = Callable[[Any, Any], Tensor]


class ModelWithMemory(Protocol):
    """The memory contract. A model with `takes_target` also takes `target=`, `target_mask=` and returns a `loss`."""

    def initial_memory(self, batch: int) -> Tensor:
        """The memory before the first segment."""

    def __call__(self, segment: Tensor, *, memory: Tensor, mask: Tensor | None) -> Any:
        """Anything with `.memory`, and what the loss needs."""


class Replayed(NamedTuple):
    """What `memory_replay` returns; the gradients are where `backward` leaves them.

    Attributes:
        loss: the sum of the segments' losses, detached.
        memory: (b, m, d) after the last segment, detached.
    """

    loss: Tensor
    memory: Tensor


def memory_replay(
    model: ModelWithMemory,
    segments: Sequence[Tensor],
    targets: Sequence[Any] | Tensor | None = None,
    *,
    masks: Sequence[Tensor | None] | None = None,
    target_masks: Sequence[Tensor | None] | Tensor | None = None,
    memory: Tensor | None = None,
    loss: Loss | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Replayed:
    """Add the gradients of the sum of all segments' losses, exactly those of full back-propagation through time.

    All segments are run once without a graph, keeping their memories; then, from the last to the first, each is run
    again with one, and the memory's gradient handed back. Dropout draws the same random numbers both times. Time: one
    more forward pass; activation memory: one segment's, and a memory per segment. Autocast around the call holds in it.

    Args:
        model: keeps the memory contract.
        segments: (b, n) int each, in order.
        targets: one per segment, None for a segment without a loss; or a tensor, the target of the last segment alone.
        masks: (b, n) bool per segment, True = a real token; None where all are.
        target_masks: as `targets`.
        memory: (b, m, d) to start from, which gets its gradient too; None for the model's initial one.
        loss: `loss(output, target)`, a scalar of what the model returned; called for every segment where no targets are
            given. None: the output's own `loss`, or cross entropy of its `logits` with the target where it has none.
        scaler: scales the gradients, for float16.

    Raises:
        ValueError: no segments, counts that differ, or nothing to take a loss of.
    """
    count = len(segments)
    if not count:
        raise ValueError("segments must hold at least one segment, got none")
    if targets is None and loss is None:
        raise ValueError("targets must be given, or a loss that needs none, got targets=None, loss=None")
    padding = _per_segment("masks", masks, count)
    wanted = _per_segment("targets", targets, count)
    wanted_masks = _per_segment("target_masks", target_masks, count)
    free = targets is None
    if not free and all(target is None for target in wanted):
        raise ValueError("targets must hold at least one target, got None for every segment")
    initial = model.initial_memory(segments[0].shape[0]) if memory is None else memory

    def run(index: int, before: Tensor) -> tuple[Any, Tensor | None]:
        inputs: dict[str, Any] = {"memory": before, "mask": padding[index]}
        target, mask = wanted[index], wanted_masks[index]
        if target is not None and getattr(model, "takes_target", False):
            inputs.update(target=target, target_mask=mask)
        output = model(segments[index], **inputs)
        if target is None and not free:
            return output, None
        return output, _loss_of(output, target, mask) if loss is None else loss(output, target)

    memories, randomness = [initial.detach()], [RandomState(initial.device)]
    with torch.no_grad():
        for index in range(count - 1):
            memories.append(run(index, memories[-1])[0].memory)
            randomness.append(RandomState(initial.device))
    gradient: Tensor | None = None
    total, last = None, memories[-1]
    for index in reversed(range(count)):
        # Autocast keeps the copies of weights that it made without a graph: they would get no gradient.
        torch.clear_autocast_cache()
        before = memories.pop().requires_grad_()
        with randomness[index].restored(afterwards=index < count - 1):
            output, part = run(index, before)
        if index == count - 1:
            last = output.memory.detach()
        roots: list[tuple[Tensor, Tensor | None]] = []
        if part is not None:
            total = part.detach() if total is None else total + part.detach()
            roots.append((part if scaler is None else scaler.scale(part), None))
        if gradient is not None:
            roots.append((output.memory, gradient))
        roots = [(root, seed) for root, seed in roots if root.requires_grad]
        if roots:
            tensors, seeds = zip(*roots, strict=True)
            with no_autocast(initial):
                torch.autograd.backward(tensors, seeds)
        gradient = before.grad
    if gradient is not None and initial.requires_grad:
        torch.autograd.backward(initial, gradient)
    return Replayed(cast(Tensor, total), last)


def _loss_of(output: Any, target: Tensor, mask: Tensor | None) -> Tensor:
    own: Tensor | None = getattr(output, "loss", None)
    if own is not None:
        return own
    if getattr(output, "logits", None) is None:
        raise ValueError("loss must be given for a model that returns neither a loss nor logits, got loss=None")
    return masked_cross_entropy(output.logits, target, mask)


def _per_segment(name: str, values: Sequence[Any] | Tensor | None, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, Tensor):
        return [None] * (count - 1) + [values]
    if len(values) != count:
        raise ValueError(f"{name} must hold one per segment, {count}, got {len(values)}")
    return list(values)


class RandomState:
    """The random number generators of the CPU and of one device, as they stand."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = [device] if device.type == "cuda" else []
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = [torch.cuda.get_rng_state(device) for device in self.cuda]

    @contextmanager
    def restored(self, *, afterwards: bool) -> Iterator[None]:
        """Draw again from this state, and go back to the present one where `afterwards` says so."""
        with torch.random.fork_rng(devices=self.cuda, enabled=afterwards):
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.cuda, self.cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
