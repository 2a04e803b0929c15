"""Check 6: incremental decoding equals the full forward pass, and older states stay valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attention_zoo.testing.expect import FLOAT32_ERROR, GRADIENT_ERROR, expect_close, expect_equal
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import Padding, Subject


def check_steps(subject: Subject) -> None:
    """`step` over any split equals `forward`, with padding and with gradients; older states can be stepped again."""
    if not subject.causal:
        raise NotApplicable(f"the {subject.noun} is not causal")
    block = subject.block()
    if not callable(getattr(block, "step", None)):
        raise NotApplicable(f"the {subject.noun} has no step")
    for n in subject.lengths:
        x, paddings = subject.x(n), subject.paddings(n)
        for padding in paddings.values():
            with torch.no_grad():
                whole = padding.replace_masked(block(x, **padding.extra), 0.0)  # undefined there
                for sizes in _splits(n, singly=padding.mask is None or n < 70):
                    pieces = padding.replace_masked(_steps(block, x, sizes, padding), 0.0)
                    size = f"{sizes}" if len(sizes) <= 4 else f"of 1 x {len(sizes)}"
                    what = f"step over pieces {size} differs from forward ({padding.where})"
                    expect_close(pieces, whole, FLOAT32_ERROR, what)
                if n >= 4:
                    _check_rollback(block, x, subject.other(n), padding)
        if n >= 2:
            _check_gradients(block, x, subject.weight(n), paddings["no mask"])


def _splits(n: int, *, singly: bool) -> list[list[int]]:
    """All at once, one by one, and uneven pieces."""
    splits = [[n], [1] * n] if singly else [[n]]
    return [*splits, [1, n - 1], [n - 1, 1], [n // 3, 1, n - n // 3 - 1]] if n > 2 else splits


def _step(block: Any, x: Tensor, start: int, size: int, state: Any, padding: Padding) -> tuple[Tensor, Any]:
    """One step over the tokens start ... start + size - 1; the other arguments are given with the first step."""
    extra = dict(padding.others) if state is None else {}
    if padding.mask is not None:
        extra["mask"] = padding.mask[:, start : start + size]
    return block.step(x[..., start : start + size, :], state, **extra)


def _steps(block: nn.Module, x: Tensor, sizes: Sequence[int], padding: Padding) -> Tensor:
    """The concatenated outputs of `step` over consecutive pieces of x of these sizes."""
    outs, state, start = [], None, 0
    for size in sizes:
        out, state = _step(block, x, start, size, state, padding)
        outs.append(out)
        start += size
    return torch.cat(outs, dim=-2)


def _check_rollback(block: nn.Module, x: Tensor, other: Tensor, padding: Padding) -> None:
    """Step an older state twice, once into another future, and compare what it holds and gives afterwards."""
    half = x.shape[-2] // 2
    _, older = _step(block, x, 0, half - 1, None, padding)
    _, old = _step(block, x, half - 1, 1, older, padding)
    held = [leaf.clone() for leaf in _tensors(old)]
    first, newer = _step(block, x, half, 1, old, padding)
    _step(block, other, half, 1, old, padding)
    again, _ = _step(block, x, half, 1, old, padding)
    following, _ = _step(block, x, half + 1, 1, newer, padding)
    straight = _steps(block, x, [half, 1, 1], padding)[..., -1:, :]
    for leaf, before in zip(_tensors(old), held, strict=True):
        expect_equal(leaf, before, f"a newer step changed the content of an older state ({padding.where})")
    what = f"an older state, stepped again after newer steps, gives another output ({padding.where})"
    expect_close(again, first, FLOAT32_ERROR, what)
    last = padding if padding.mask is None else padding._replace(mask=padding.mask[:, half + 1 : half + 2])
    expect_close(last.replace_masked(following, 0.0), last.replace_masked(straight, 0.0), FLOAT32_ERROR, what)


def _tensors(state: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def _check_gradients(block: nn.Module, x: Tensor, weight: Tensor, padding: Padding) -> None:
    x, n = x.clone().requires_grad_(), x.shape[-2]
    whole = torch.autograd.grad((block(x, **padding.others) * weight).sum(), x, materialize_grads=True)[0]
    pieces = _steps(block, x, [n // 2, n - n // 2], padding)
    through_state = torch.autograd.grad((pieces * weight).sum(), x, materialize_grads=True)[0]
    expect_close(through_state, whole, GRADIENT_ERROR, f"the gradient through two steps differs from forward's (n={n})")
