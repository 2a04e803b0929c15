"""Back-propagation through many segments at the activation memory of one.

Paper: Memformer's memory replay back-propagation, https://arxiv.org/abs/2010.06891
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from attention_zoo.ops.losses import masked_cross_entropy, next_token_loss
from attention_zoo.ops.precision import no_autocast
from attention_zoo.training.random_state import random_state, set_random_state

Loss = Callable[[Any, Any], Tensor]


class ModelWithMemory(Protocol):
    """A model that carries a memory from segment to segment.

    A model whose attribute `takes_target` is true also accepts `target=` and `target_mask=` in its call.
    """

    def initial_memory(self, batch: int) -> Tensor:
        """The memory before the first segment, (batch, m, d)."""

    def __call__(self, segment: Tensor, *, memory: Tensor, mask: Tensor | None) -> Any:
        """An output with the attribute `memory`, and with `logits` unless `memory_replay` is given a loss."""


class Replayed(NamedTuple):
    """Return value of `memory_replay`; gradients are accumulated into `.grad`.

    Attributes:
        loss: sum of the segments' losses, detached.
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
    """Accumulate the gradients of the summed loss of all segments, equal to full back-propagation through time.

    A first pass runs all segments without a graph and stores their memories. A second pass, from the last segment to
    the first, recomputes each segment with a graph and back-propagates its loss and the gradient of its memory. Dropout
    draws the same random numbers in both passes. Autocast around the call is respected.

    Cost: one additional forward pass; activations of one segment, and one memory per segment.

    Args:
        model: see `ModelWithMemory`.
        segments: (b, n) int each, in order.
        targets: one per segment, None for a segment without a loss; or a tensor, the target of the last segment only.
        masks: one per segment, (b, n) bool, True = a valid token, or None.
        target_masks: masks of `targets`, in the same form.
        memory: (b, m, d) to start from, which receives a gradient too. None: the model's initial memory.
        loss: `loss(output, target)`, a scalar; called for every segment if `targets` is None. None: cross entropy of
            `output.logits` with the target; for a model with `takes_target`, of each target token given those before
            it.
        scaler: gradient scaler for float16.

    Raises:
        TypeError: the model has no memory, or a segment is not a tensor.
        ValueError: `segments` is empty, the numbers of arguments per segment differ, or there is neither a target nor
            a loss.
    """
    if not callable(getattr(model, "initial_memory", None)):
        raise TypeError(f"model must have initial_memory, as models with memory do, got {type(model).__name__}")
    count = len(segments)
    if not count:
        raise ValueError("segments must hold at least one segment, got none")
    for index, segment in enumerate(segments):
        if not isinstance(segment, Tensor):
            raise TypeError(f"segments must be tensors, got {type(segment).__name__} as segments[{index}]")
    if targets is None and loss is None:
        raise ValueError("targets must be given, or a loss that needs none, got targets=None, loss=None")
    segment_masks = _per_segment("masks", masks, count)
    segment_targets = _per_segment("targets", targets, count)
    segment_target_masks = _per_segment("target_masks", target_masks, count)
    if targets is not None and all(target is None for target in segment_targets):
        raise ValueError("targets must hold at least one target, got None for every segment")
    initial = model.initial_memory(segments[0].shape[0]) if memory is None else memory
    takes_target = getattr(model, "takes_target", False)

    def run(index: int, before: Tensor) -> tuple[Any, Tensor | None]:
        inputs: dict[str, Any] = {"memory": before, "mask": segment_masks[index]}
        target, target_mask = segment_targets[index], segment_target_masks[index]
        if target is not None and takes_target:
            inputs.update(target=target, target_mask=target_mask)
        output = model(segments[index], **inputs)
        if target is None and targets is not None:
            return output, None
        if loss is not None:
            return output, loss(output, target)
        if getattr(output, "logits", None) is None:
            raise ValueError("loss must be given for a model that returns no logits, got loss=None")
        if takes_target:
            return output, next_token_loss(output.logits[:, :-1], target, target_mask)
        return output, masked_cross_entropy(output.logits, target, target_mask)

    cuda = [initial.get_device()] if initial.is_cuda else []
    memories, random_states = [initial.detach()], [random_state(cuda)]
    with torch.no_grad():
        for index in range(count - 1):
            memories.append(run(index, memories[-1])[0].memory)
            random_states.append(random_state(cuda))
    gradient: Tensor | None = None  # of the memory after the segment
    total, last = torch.zeros((), device=initial.device), memories[-1]
    for index in reversed(range(count)):
        # Autocast caches the cast weights of the pass without a graph, which would receive no gradient.
        torch.clear_autocast_cache()
        before = memories.pop().detach().requires_grad_()  # a model may return the memory that it was given
        # The generators end in the state after the last segment, which is recomputed first.
        with torch.random.fork_rng(devices=cuda, enabled=index < count - 1):
            set_random_state(random_states[index])
            output, part = run(index, before)
        if index == count - 1:
            last = output.memory.detach()
        roots: list[tuple[Tensor, Tensor | None]] = []
        if part is not None:
            total = total + part.detach()
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
    return Replayed(total, last)


def _per_segment(name: str, values: Sequence[Any] | Tensor | None, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, Tensor):
        return [None] * (count - 1) + [values]
    if len(values) != count:
        raise ValueError(f"{name} must hold one per segment, {count}, got {len(values)}")
    return list(values)
