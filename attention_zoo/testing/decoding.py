"""Incremental decoding equals the full forward pass, and states are values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attention_zoo.testing.expect import (
    FLOAT32_ERROR,
    GRADIENT_ERROR,
    expect_close,
    expect_equal,
    expect_gradients_close,
    gradients,
)
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import Padding, Subject


def check_steps(subject: Subject) -> None:
    """`step` over any split equals `forward`: with padding, masks in some steps only, gradients, a batch of one row.

    States are values: several branches can go on from one state, and changing the tensors that the caller has passed
    or received changes nothing.
    """
    if not subject.causal:
        raise NotApplicable(f"the {subject.noun} is not causal")
    block = subject.block()
    if not subject.has_step(block):
        raise NotApplicable(f"the {subject.noun} has no step")
    for n in [*subject.lengths, *subject.long_lengths]:
        long = n in subject.long_lengths
        x, paddings = subject.x(n), subject.paddings(n)
        for name, padding in paddings.items():
            if long and name != "no mask":
                continue
            with torch.no_grad():
                whole = padding.replace_masked(block(x, **padding.extra), 0.0)  # undefined there
                for sizes in _splits(n, singly=padding.mask is None or n < 70, long=long):
                    size = f"{sizes}" if len(sizes) <= 4 else f"of 1 x {len(sizes)}"
                    what = f"step over pieces {size} differs from forward ({padding.where})"
                    _expect_steps(block, x, sizes, padding, whole, what)
                if n >= 4 and n in subject.sampled_lengths:
                    for several in {1, n // 3} if subject.thorough else {2}:
                        _check_branches(block, x, subject.other(n), several, padding)
                    _check_aliasing(block, x, padding, whole)
                    _check_partial_masks(block, x, padding)
                    _check_one_row(block, x, padding, whole)
        if 2 <= n < 70 and (subject.thorough or n == max(m for m in subject.lengths if m < 70)):
            _check_gradients(block, x, subject.weight(n), paddings["no mask"])


def _splits(n: int, *, singly: bool, long: bool) -> list[list[int]]:
    """All at once, one by one, and uneven pieces."""
    if long:
        return [[n // 3, 1, n - n // 3 - 1], [n - 1, 1]]
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


def _expect_steps(
    block: nn.Module, x: Tensor, sizes: Sequence[int], padding: Padding, whole: Tensor, what: str
) -> None:
    pieces = padding.replace_masked(_steps(block, x, sizes, padding), 0.0)
    expect_close(pieces, whole, FLOAT32_ERROR, what)


def _check_branches(block: nn.Module, x: Tensor, other: Tensor, several: int, padding: Padding) -> None:
    """Continue one state in two ways, in turns, and once more; compare with forward, and what the old state holds."""
    n = x.shape[-2]
    half = min(n // 2, n - several - 1)
    _, older = _step(block, x, 0, half - 1, None, padding) if half > 1 else (None, None)
    _, old = _step(block, x, half - 1, 1, older, padding)
    held, given = [leaf.clone() for leaf in _tensors(old)], x.clone()
    branch = torch.cat((x[..., :half, :], other[..., half:, :]), dim=-2)
    first, state = _step(block, x, half, several, old, padding)
    other_first, other_state = _step(block, branch, half, several, old, padding)
    second, _ = _step(block, x, half + several, 1, state, padding)
    other_second, _ = _step(block, branch, half + several, 1, other_state, padding)
    again, _ = _step(block, x, half, several, old, padding)
    for leaf, before in zip(_tensors(old), held, strict=True):
        expect_equal(leaf, before, f"a newer step changed the content of an older state ({padding.where})")
    expect_equal(x, given, f"step modified its input x in place ({padding.where})")
    stop = half + several + 1
    part = padding if padding.mask is None else padding._replace(mask=padding.mask[:, :stop])
    for features, outs in ((x, (first, second)), (branch, (other_first, other_second)), (x, (again, second))):
        want = part.replace_masked(block(features[..., :stop, :], **part.extra), 0.0)[..., half:, :]
        last = padding if padding.mask is None else padding._replace(mask=padding.mask[:, half:stop])
        got = last.replace_masked(torch.cat(outs, dim=-2), 0.0)
        what = f"an older state, stepped again after newer steps of {several}, gives another output ({padding.where})"
        expect_close(got, want, FLOAT32_ERROR, what)


def _check_aliasing(block: nn.Module, x: Tensor, padding: Padding, whole: Tensor) -> None:
    """Overwrite every tensor passed to and returned by the first step before the second."""
    n = x.shape[-2]
    half = n // 2
    mine = Padding(padding.where, None, {name: value.clone() for name, value in padding.others.items()})
    if padding.mask is not None:
        mine = mine._replace(mask=padding.mask[:, :half].clone())
    start = x[..., :half, :].clone()
    returned, state = _step(block, start, 0, half, None, mine)
    out = returned.clone()
    for tensor in (start, returned, *mine.others.values(), *(() if mine.mask is None else (mine.mask,))):
        tensor.fill_(False if tensor.dtype == torch.bool else 3)
    second, _ = _step(block, x, half, n - half, state, padding)
    what = f"changing tensors passed to or returned by the first step changes the second ({padding.where})"
    expect_close(padding.replace_masked(torch.cat((out, second), dim=-2), 0.0), whole, FLOAT32_ERROR, what)


def _check_partial_masks(block: Any, x: Tensor, padding: Padding) -> None:
    """Give a mask with the first or with the second step only."""
    if padding.mask is None:
        return
    n = x.shape[-2]
    half = n // 2
    for name, part in (("first", slice(0, half)), ("second", slice(half, n))):
        mask = torch.ones_like(padding.mask)
        mask[:, part] = padding.mask[:, part]
        given = padding._replace(mask=mask)
        masks = {"first": {}, "second": {}, name: {"mask": mask[:, part]}}
        first, state = block.step(x[..., :half, :], **padding.others, **masks["first"])
        second, _ = block.step(x[..., half:, :], state, **masks["second"])
        got = given.replace_masked(torch.cat((first, second), dim=-2), 0.0)
        want = given.replace_masked(block(x, **given.extra), 0.0)
        what = f"step with a mask in the {name} of two steps only differs from forward ({padding.where})"
        expect_close(got, want, FLOAT32_ERROR, what)


def _check_one_row(block: nn.Module, x: Tensor, padding: Padding, whole: Tensor) -> None:
    n, one = x.shape[-2], slice(1, 2)
    what = f"step over a batch of 1 differs from forward ({padding.where})"
    _expect_steps(block, x[one], [n // 2, 1, n - n // 2 - 1], padding.rows(one), whole[one], what)


def _tensors(state: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def _check_gradients(block: nn.Module, x: Tensor, weight: Tensor, padding: Padding) -> None:
    """Gradients to x and the parameters through the states of three steps equal those of forward."""
    x, n = x.clone().requires_grad_(), x.shape[-2]
    sizes = [n // 2, 1, n - n // 2 - 1] if n > 2 else [1, 1]
    whole = gradients(block, (block(x, **padding.others) * weight).sum(), x)
    through_states = gradients(block, (_steps(block, x, sizes, padding) * weight).sum(), x)
    what = f"the gradient to {{}} through {len(sizes)} steps differs from forward's (n={n})"
    expect_gradients_close(through_states, whole, GRADIENT_ERROR, what)
