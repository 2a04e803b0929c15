"""Check 6: incremental decoding equals the full forward pass, and older states stay valid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attention_zoo.testing.subject import FLOAT32_ERROR, GRADIENT_ERROR, Padding, Subject, expect_close, expect_equal


def check_steps(subject: Subject) -> None:
    """`step` over any split equals `forward`, with padding and with gradients; older states can be stepped again."""
    block = subject.block()
    subject.require_step(block)
    for n in subject.lengths:
        others, x = subject.others(n), subject.x(n)
        for padding in subject.paddings(n).values():
            mask = padding.mask
            with torch.no_grad():
                whole = block(x, **padding.extra)
                for splits in _splits(n, singly=mask is None or n < 70):
                    pieces = subject.steps(block, x, splits, mask=mask, others=others)
                    size = f"{splits}" if len(splits) <= 4 else f"of 1 x {len(splits)}"
                    what = f"step over pieces {size} differs from forward ({padding.where})"
                    expect_close(_valid(pieces, mask), _valid(whole, mask), FLOAT32_ERROR, what)
                if n >= 4:
                    _check_rollback(subject, block, x, others, padding)
        if n >= 2:
            _check_gradients(subject, block, n, others)


def _splits(n: int, *, singly: bool) -> list[list[int]]:
    """All at once, one by one, and uneven pieces."""
    splits = [[n], [1] * n] if singly else [[n]]
    if n > 2:
        third = max(1, n // 3)
        splits += [[1, n - 1], [n - 1, 1], [third, 1, n - third - 1] if n - third - 1 > 0 else [third, n - third]]
    return splits


def _valid(out: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs with 0 at masked tokens, where they are undefined."""
    if mask is None:
        return out
    return torch.where(mask.view(mask.shape[0], *(1,) * (out.ndim - 3), mask.shape[1], 1), out, 0.0)


def _check_rollback(
    subject: Subject, block: nn.Module, x: Tensor, others: Mapping[str, Tensor], padding: Padding
) -> None:
    """Step an older state twice, once into another future, and compare what it holds and gives afterwards."""
    mask, half = padding.mask, x.shape[-2] // 2
    other = 10 * subject.x(x.shape[-2], seed=9)
    _, older = subject.step(block, x, 0, half - 1, None, mask=mask, others=others)
    _, old = subject.step(block, x, half - 1, 1, older, mask=mask)
    held = [leaf.clone() for leaf in _tensors(old)]
    first, newer = subject.step(block, x, half, 1, old, mask=mask)
    subject.step(block, other, half, 1, old, mask=mask)
    again, _ = subject.step(block, x, half, 1, old, mask=mask)
    following, _ = subject.step(block, x, half + 1, 1, newer, mask=mask)
    straight = subject.steps(block, x, [half, 1, 1], mask=mask, others=others)[..., -1:, :]
    for leaf, before in zip(_tensors(old), held, strict=True):
        expect_equal(leaf, before, f"a newer step changed the content of an older state ({padding.where})")
    what = f"an older state, stepped again after newer steps, gives another output ({padding.where})"
    expect_close(again, first, FLOAT32_ERROR, what)
    last = None if mask is None else mask[:, half + 1 : half + 2]
    expect_close(_valid(following, last), _valid(straight, last), FLOAT32_ERROR, what)


def _tensors(state: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def _check_gradients(subject: Subject, block: nn.Module, n: int, others: Mapping[str, Tensor]) -> None:
    x = subject.x(n).requires_grad_()
    weight = subject.x(n, seed=5)
    whole = torch.autograd.grad((block(x, **others) * weight).sum(), x)[0]
    pieces = subject.steps(block, x, [n // 2, n - n // 2], others=others)
    through_state = torch.autograd.grad((pieces * weight).sum(), x)[0]
    expect_close(through_state, whole, GRADIENT_ERROR, f"the gradient through two steps differs from forward's (n={n})")
