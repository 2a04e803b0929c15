"""Checks 4 and 5: masked tokens have no effect, and rows without valid tokens are harmless."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import (
    BATCH,
    FLOAT32_ERROR,
    Padding,
    Subject,
    expect,
    expect_close,
    expect_equal,
    expect_zero,
)


def check_padding_ignored(subject: Subject) -> None:
    """Outputs at valid tokens do not depend on masked tokens, and padded rows equal unpadded ones."""
    block = subject.block()
    for n in subject.lengths:
        for name, padding in subject.paddings(n).items():
            if padding.mask is not None:
                _check_masked_content(subject, block, n, padding.mask, padding)
                if subject.shift_invariant and name in ("left padding", "right padding"):
                    _check_unpadded(subject, block, n, padding.mask, padding)
        _check_masked_context(subject, block, n)


def _check_masked_content(subject: Subject, block: nn.Module, n: int, mask: Tensor, padding: Padding) -> None:
    valid = (mask if subject.streams is None else mask[:, None].expand(-1, subject.streams, -1))[..., None]
    x = subject.x(n)
    changed = torch.where(valid, x, 10 * subject.x(n, seed=9))
    with torch.no_grad():
        out, other = block(x, **padding.extra), block(changed, **padding.extra)
    expect(bool(out.isfinite().all()), f"an output is not finite ({padding.where})")
    at = valid[..., 0]
    expect_equal(other[at], out[at], f"outputs at valid tokens change with masked ones ({padding.where})")

    x.requires_grad_()
    out = block(x, **padding.extra)
    loss = torch.where(valid, out.square(), 0.0).sum()
    gradient = torch.autograd.grad(loss, x)[0].masked_fill(valid, 0.0)
    expect_zero(gradient, f"outputs at valid tokens have a gradient of {{}} to masked ones ({padding.where})")


def _check_unpadded(subject: Subject, block: nn.Module, n: int, mask: Tensor, padding: Padding) -> None:
    x, others = subject.x(n), subject.others(n)
    with torch.no_grad():
        out = block(x, **padding.extra)
        for row in range(BATCH):
            one = slice(row, row + 1)
            alone = block(x[one][..., mask[row], :], **{name: value[one] for name, value in others.items()})
            what = f"row {row} differs from the same row without padding ({padding.where})"
            expect_close(out[one][..., mask[row], :], alone, FLOAT32_ERROR, what)


def _check_masked_context(subject: Subject, block: nn.Module, n: int) -> None:
    others = subject.others(n)
    if "context_mask" not in others:
        return
    changed = {**others, "context": others["context"].masked_fill(~others["context_mask"][..., None], 7.0)}
    with torch.no_grad():
        what = f"outputs change with the masked context (n={n})"
        expect_equal(block(subject.x(n), **changed), block(subject.x(n), **others), what)


def check_empty_rows(subject: Subject) -> None:
    """A row without valid tokens gives no NaN, the same output for any content, and a gradient of exactly 0."""
    block = subject.block()
    biased = any(name.rpartition(".")[-1] == "bias" for name, _ in block.named_parameters())
    zero = not biased if subject.empty_is_zero is None else subject.empty_is_zero
    for n in subject.lengths:
        mask = torch.ones(BATCH, n, dtype=torch.bool, device=subject.device)
        mask[1] = False
        others = subject.others(n)
        if subject.inputs is not None:
            if "context_mask" not in others:
                raise NotApplicable("the inputs have no context_mask that could mask the whole context")
            others["context_mask"][1] = False
        x = subject.x(n).requires_grad_()
        out = block(x, mask=mask, **others)
        expect(bool(out.isfinite().all()), f"a row without valid tokens gives an output that is not finite (n={n})")
        finite = torch.autograd.grad(out.sum(), x, retain_graph=True)[0].isfinite().all()
        expect(bool(finite), f"a row without valid tokens gives a gradient that is not finite (n={n})")
        own = torch.autograd.grad(out[1].square().sum() + out[1].sum(), x)[0]
        expect_zero(own, f"a row without valid tokens has a gradient of {{}} to x (n={n})")
        if zero:
            expect_zero(out[1], f"a row without valid tokens gives {{}} where it must give exactly 0 (n={n})")
        changed = x.detach().clone()
        changed[1] = 10 * subject.x(n, seed=9)[1]
        what = f"the output of a row without valid tokens changes with its content (n={n})"
        expect_equal(block(changed, mask=mask, **others)[1], out[1], what)
