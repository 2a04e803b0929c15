"""Checks 4 and 5: masked tokens do not matter, and a row with nothing to see is harmless."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, FLOAT32_ERROR, Subject, expect, expect_close, expect_equal


def check_padding_ignored(subject: Subject) -> None:
    """At real tokens the content of masked ones never matters, and padded rows equal the unpadded ones."""
    block = subject.block()
    for n in subject.lengths:
        for name, mask in subject.masks(n).items():
            if mask is not None:
                _content_never_matters(subject, block, n, mask, name)
                if subject.shift_invariant and name in ("left padding", "right padding"):
                    _equals_unpadded(subject, block, n, mask, name)
        _context_content_never_matters(subject, block, n)


def _content_never_matters(subject: Subject, block: nn.Module, n: int, mask: Tensor, name: str) -> None:
    others = subject.others(n)
    real = _like_x(mask, subject)
    x = subject.x(n)
    changed = torch.where(real[..., None], x, 10 * subject.x(n, seed=9))
    with torch.no_grad():
        out, moved = block(x, mask=mask, **others), block(changed, mask=mask, **others)
    expect(bool(out.isfinite().all()), f"an output is not finite (n={n}, {name})")
    what = f"outputs at real tokens change with the content of masked ones (n={n}, {name})"
    expect_equal(moved[real.expand(out.shape[:-1])], out[real.expand(out.shape[:-1])], what)

    leaf = x.clone().requires_grad_()
    out = block(leaf, mask=mask, **others)
    weighted = torch.where(real[..., None], out.square(), torch.zeros_like(out)).sum()
    gradient = torch.autograd.grad(weighted, leaf)[0]
    size = float(torch.where(real[..., None], torch.zeros_like(gradient), gradient).abs().max())
    expect(size == 0, f"outputs at real tokens have a gradient of {size:.2g} to masked ones (n={n}, {name})")


def _equals_unpadded(subject: Subject, block: nn.Module, n: int, mask: Tensor, name: str) -> None:
    x, others = subject.x(n), subject.others(n)
    with torch.no_grad():
        out = block(x, mask=mask, **others)
        for row in range(BATCH):
            real = mask[row]
            alone = block(x[row : row + 1][..., real, :], **{k: v[row : row + 1] for k, v in others.items()})
            what = f"row {row} with {name} differs from the same row without padding (n={n})"
            expect_close(out[row : row + 1][..., real, :], alone, FLOAT32_ERROR, what)


def _context_content_never_matters(subject: Subject, block: nn.Module, n: int) -> None:
    others = subject.others(n)
    if "context_mask" not in others:
        return
    hidden = ~others["context_mask"][..., None]
    moved = {**others, "context": others["context"].masked_fill(hidden, 7.0)}
    with torch.no_grad():
        what = f"outputs change with the content of the masked context (n={n})"
        expect_equal(block(subject.x(n), **moved), block(subject.x(n), **others), what)


def check_empty_rows(subject: Subject) -> None:
    """A row with nothing to see: no NaN, the same output whatever it holds, exactly no gradient to it."""
    block = subject.block()
    biased = any(name.rpartition(".")[-1] == "bias" for name, _ in block.named_parameters())
    zero = not biased if subject.empty_is_zero is None else subject.empty_is_zero
    for n in subject.lengths:
        mask = torch.ones(BATCH, n, dtype=torch.bool, device=subject.device)
        mask[1] = False
        others = subject.others(n)
        if subject.inputs is not None:
            if "context_mask" not in others:
                raise NotApplicable("the inputs have no context_mask that could hide everything")
            others["context_mask"][1] = False
        x = subject.x(n).requires_grad_()
        out = block(x, mask=mask, **others)
        expect(bool(out.isfinite().all()), f"a row with nothing to see gives an output that is not finite (n={n})")
        gradient = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
        expect(
            bool(gradient.isfinite().all()), f"a row with nothing to see gives a gradient that is not finite (n={n})"
        )
        own = float(torch.autograd.grad(out[1].square().sum() + out[1].sum(), x)[0].abs().max())
        expect(own == 0, f"a row with nothing to see has a gradient of {own:.2g} to x (n={n})")
        if zero:
            size = float(out[1].detach().abs().max())
            expect(size == 0, f"a row with nothing to see gives {size:.2g} where it must give exactly 0 (n={n})")
        changed = x.detach().clone()
        changed[1] = 10 * subject.x(n, seed=9)[1]
        what = f"a row with nothing to see changes its output with its content (n={n})"
        expect_equal(block(changed, mask=mask, **others)[1], out[1], what)


def _like_x(mask: Tensor, subject: Subject) -> Tensor:
    return mask if subject.streams is None else mask[:, None].expand(-1, subject.streams, -1)
