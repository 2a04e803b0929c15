"""Checks 4 and 5: masked tokens have no effect, and rows without valid tokens are harmless."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo.testing.expect import FLOAT32_ERROR, expect, expect_close, expect_equal, expect_zero
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, Padding, Subject


def check_padding_ignored(subject: Subject) -> None:
    """Outputs at valid tokens do not depend on masked tokens, and padded rows equal unpadded ones."""
    block = subject.block()
    subject.need_mask(block)
    for n in subject.lengths:
        x, other = subject.x(n), subject.other(n)
        for name, padding in subject.paddings(n).items():
            if padding.mask is not None:
                _check_masked_content(block, x, other, padding)
                if subject.shift_invariant and name in ("left padding", "right padding"):
                    _check_unpadded(block, x, padding.mask, padding)
        _check_masked_context(block, x, subject.others(n))


def _check_masked_content(block: nn.Module, x: Tensor, other: Tensor, padding: Padding) -> None:
    with torch.no_grad():
        out, changed = (block(features, **padding.extra) for features in (x, padding.replace_masked(x, other)))
    expect(out.isfinite().all(), f"an output is not finite ({padding.where})")
    what = f"outputs at valid tokens change with masked ones ({padding.where})"
    expect_equal(padding.replace_masked(changed, 0.0), padding.replace_masked(out, 0.0), what)

    x = x.clone().requires_grad_()
    out = block(x, **padding.extra)
    valid = padding.replace_masked(out.square(), 0.0).sum()
    gradient = torch.autograd.grad(valid, x, materialize_grads=True)[0]
    to_masked = padding.replace_masked(torch.zeros_like(x), gradient)
    expect_zero(to_masked, f"outputs at valid tokens have a gradient of {{}} to masked ones ({padding.where})")


def _check_unpadded(block: nn.Module, x: Tensor, mask: Tensor, padding: Padding) -> None:
    with torch.no_grad():
        out = block(x, **padding.extra)
        for row in range(BATCH):
            one = slice(row, row + 1)
            others = {name: value[one] for name, value in padding.others.items()}
            alone = block(x[one][..., mask[row], :], **others)
            what = f"row {row} differs from the same row without padding ({padding.where})"
            expect_close(out[one][..., mask[row], :], alone, FLOAT32_ERROR, what)


def _check_masked_context(block: nn.Module, x: Tensor, others: dict[str, Tensor]) -> None:
    if "context_mask" in others:
        changed = {**others, "context": others["context"].masked_fill(~others["context_mask"][..., None], 7.0)}
        with torch.no_grad():
            what = f"outputs change with the masked context (n={x.shape[-2]})"
            expect_equal(block(x, **changed), block(x, **others), what)


def check_empty_rows(subject: Subject) -> None:
    """A row without valid tokens gives no NaN, the same output for any content, and a gradient of exactly 0."""
    block = subject.block()
    subject.need_mask(block)
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
        expect(out.isfinite().all(), f"a row without valid tokens gives an output that is not finite (n={n})")
        finite = torch.autograd.grad(out.sum(), x, retain_graph=True)[0].isfinite().all()
        expect(finite, f"a row without valid tokens gives a gradient that is not finite (n={n})")
        own = torch.autograd.grad(out[1].square().sum() + out[1].sum(), x)[0]
        expect_zero(own, f"a row without valid tokens has a gradient of {{}} to x (n={n})")
        if zero:
            expect_zero(out[1], f"a row without valid tokens gives {{}} where it must give exactly 0 (n={n})")
        changed = x.detach().clone()
        changed[1] = subject.other(n)[1]
        what = f"the output of a row without valid tokens changes with its content (n={n})"
        expect_equal(block(changed, mask=mask, **others)[1], out[1], what)
