"""Check 6: decoding step by step equals the whole pass, and an old state keeps its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attention_zoo.testing.subject import FLOAT32_ERROR, GRADIENT_ERROR, Subject, expect_close, expect_equal


def check_steps(subject: Subject) -> None:
    """`step` over any split equals `forward`, padded too, with gradients; older states can be stepped again."""
    block = subject.block()
    subject.needs_step(block)
    for n in subject.lengths:
        others = subject.others(n)
        for name, mask in subject.masks(n).items():
            extra = dict(others) if mask is None else {**others, "mask": mask}
            x = subject.x(n)
            for splits in _splits(n, singly=mask is None or n < 70):
                with torch.no_grad():
                    whole = block(x, **extra)
                    pieces = subject.steps(block, x, splits, mask=mask, others=others)
                what = f"step over pieces {_short(splits)} differs from forward (n={n}, {name})"
                expect_close(_real(pieces, mask), _real(whole, mask), FLOAT32_ERROR, what)
            _rollback(subject, block, x, mask, others, f"n={n}, {name}")
        _gradients(subject, block, n, others)


def _splits(n: int, *, singly: bool) -> list[list[int]]:
    """All at once, one by one, and uneven pieces."""
    splits = [[n], [1] * n] if singly else [[n]]
    if n > 2:
        third = max(1, n // 3)
        splits += [[1, n - 1], [n - 1, 1], [third, 1, n - third - 1] if n - third - 1 > 0 else [third, n - third]]
    return splits


def _short(splits: list[int]) -> str:
    return f"{splits}" if len(splits) <= 4 else f"of 1 x {len(splits)}"


def _real(out: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs at masked tokens set to 0: they mean nothing."""
    if mask is None:
        return out
    shape = (mask.shape[0], *(1,) * (out.ndim - 3), mask.shape[1], 1)
    return torch.where(mask.view(shape), out, torch.zeros_like(out))


def _rollback(
    subject: Subject, block: nn.Module, x: Tensor, mask: Tensor | None, others: Mapping[str, Tensor], where: str
) -> None:
    """Step an older state twice, once into another future, and look at what it holds and gives afterwards."""
    n = x.shape[-2]
    if n < 4:
        return
    half = n // 2
    other = torch.cat((x[..., :half, :], 10 * subject.x(n, seed=9)[..., half:, :]), dim=-2)
    with torch.no_grad():
        _, older = subject.step(block, x, 0, half - 1, None, mask=mask, others=others)
        _, old = subject.step(block, x, half - 1, 1, older, mask=mask)
        held = [leaf.clone() for leaf in _tensors(old)]
        first, newer = subject.step(block, x, half, 1, old, mask=mask)
        subject.step(block, other, half, 1, old, mask=mask)
        again, _ = subject.step(block, x, half, 1, old, mask=mask)
        onwards, _ = subject.step(block, x, half + 1, 1, newer, mask=mask)
        straight = subject.steps(block, x, [half, 1, 1], mask=mask, others=others)
    for leaf, was in zip(_tensors(old), held, strict=True):
        expect_equal(leaf, was, f"a newer step changed what an older state holds ({where})")
    what = f"an older state, stepped again after newer steps, gives another output ({where})"
    expect_close(again, first, FLOAT32_ERROR, what)
    expect_close(_real(onwards, _cut(mask, half + 1)), _real(straight[..., -1:, :], _cut(mask, half + 1)), 1e-5, what)


def _cut(mask: Tensor | None, at: int) -> Tensor | None:
    return None if mask is None else mask[:, at : at + 1]


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def _gradients(subject: Subject, block: nn.Module, n: int, others: Mapping[str, Tensor]) -> None:
    if n < 2:
        return
    x = subject.x(n).requires_grad_()
    weight = subject.x(n, seed=5)
    whole = torch.autograd.grad((block(x, **others) * weight).sum(), x)[0]
    pieces = subject.steps(block, x, [n // 2, n - n // 2], others=others)
    through_state = torch.autograd.grad((pieces * weight).sum(), x)[0]
    expect_close(through_state, whole, GRADIENT_ERROR, f"the gradient through two steps differs from forward's (n={n})")
