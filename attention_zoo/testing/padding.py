"""Masked tokens have no effect, whatever they hold, and rows without valid tokens are harmless."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo.testing.expect import (
    FLOAT32_ERROR,
    GRADIENT_ERROR,
    expect,
    expect_close,
    expect_equal,
    expect_gradients_close,
    expect_zero,
    gradients,
)
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, Padding, Subject, seeded


def check_padding_ignored(subject: Subject) -> None:
    """Outputs at valid tokens do not depend on masked tokens, and padded rows equal unpadded ones.

    In eval and in training mode, for gradients of x and of parameters, and for a batch of one row. A mask of valid
    tokens only equals no mask.
    """
    block = subject.block()
    subject.need_mask(block)
    for n in [*subject.lengths, *subject.long_lengths[3::4]]:
        x, other, paddings = subject.x(n), subject.other(n), subject.paddings(n)
        for name, padding in paddings.items():
            if padding.mask is None:
                _check_all_valid(block, x, padding)
                continue
            _check_masked_content(subject, block, x, other, padding, gradient=n not in subject.long_lengths)
            if subject.shift_invariant and name in ("left padding", "right padding"):
                _check_unpadded(block, x, padding.mask, padding)
        if "a mask with holes" in paddings and n in subject.sampled_lengths:
            holes = paddings["a mask with holes"]
            for row in range(BATCH):
                one = slice(row, row + 1)
                alone = holes.rows(one)._replace(where=f"{holes.where}, batch of 1")
                _check_masked_content(subject, block, x[one], other[one], alone, gradient=False)
            block.train()
            training = holes._replace(where=f"{holes.where}, training mode")
            _check_masked_content(subject, block, x, other, training, gradient=False)
            block.eval()
        _check_masked_context(block, x, subject.others(n))


def _check_all_valid(block: nn.Module, x: Tensor, padding: Padding) -> None:
    mask = torch.ones(x.shape[0], x.shape[-2], dtype=torch.bool, device=x.device)
    with torch.no_grad():
        out, want = block(x, mask=mask, **padding.others), block(x, **padding.others)
    expect_close(out, want, FLOAT32_ERROR, f"a mask of valid tokens only changes the output (n={x.shape[-2]})")


def _check_masked_content(
    subject: Subject, block: nn.Module, x: Tensor, other: Tensor, padding: Padding, *, gradient: bool = True
) -> None:
    changed = padding.replace_masked(x, other)
    outs = []
    for features in (x, changed):
        with torch.no_grad(), seeded(6):
            out = block(features, **padding.extra)
        outs.append(padding.replace_masked(out, 0.0))
        finite = (out if subject.is_strict(block) else outs[-1]).isfinite().all()
        expect(finite, f"an output is not finite ({padding.where})")
    expect_equal(outs[1], outs[0], f"outputs at valid tokens change with masked ones ({padding.where})")
    if not gradient:
        return
    found = []
    for features in (x, changed):
        features = features.clone().requires_grad_()
        found.append(gradients(block, _valid_total(block, features, padding), features))
        to_masked = padding.replace_masked(torch.zeros_like(x), found[-1].pop("x"))
        expect_zero(to_masked, f"outputs at valid tokens have a gradient of {{}} to masked ones ({padding.where})")
    what = f"the gradient of outputs at valid tokens to {{}} changes with masked ones ({padding.where})"
    expect_gradients_close(found[1], found[0], GRADIENT_ERROR, what)


def _valid_total(block: nn.Module, x: Tensor, padding: Padding) -> Tensor:
    return padding.replace_masked(block(x, **padding.extra).square(), 0.0).sum()


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


def check_not_finite(subject: Subject) -> None:
    """NaN, inf and 1e30 in masked tokens have no effect, and NaN in a valid token gives NaN in its output.

    For a user's block a violation is a note.
    """
    block = subject.block()
    subject.need_mask(block)
    with subject.note_unless_strict(block):
        for n in subject.sampled_lengths:
            x = subject.x(n)
            out = block(x[..., -1:, :].clone().fill_(float("nan")), **subject.others(1))
            expect(out.isnan().any(-1).all(), "NaN in a token gives an output without NaN (n=1)")
            for padding in subject.paddings(n).values():
                if padding.mask is not None:
                    _check_masked_extremes(block, x, padding)
            poisoned = x.clone()
            poisoned[..., n // 2, :] = float("nan")
            with torch.no_grad():
                out = block(poisoned, **subject.others(n))[..., n // 2, :]
            expect(out.isnan().any(-1).all(), f"NaN in token {n // 2} gives an output without NaN there (n={n})")


def _check_masked_extremes(block: nn.Module, x: Tensor, padding: Padding) -> None:
    with torch.no_grad():
        want = padding.replace_masked(block(padding.replace_masked(x, 0.0), **padding.extra), 0.0)
    for value in (1e30, float("inf"), float("nan")):
        features = padding.replace_masked(x, value)
        with torch.no_grad():
            out = padding.replace_masked(block(features, **padding.extra), 0.0)
        expect_equal(out, want, f"outputs at valid tokens change with {value} in masked ones ({padding.where})")
        features = features.requires_grad_()
        found = gradients(block, _valid_total(block, features, padding), features)
        bad = [name for name, gradient in found.items() if not gradient.isfinite().all()]
        expect(not bad, f"the gradient to {bad[:1]} is not finite for {value} in masked tokens ({padding.where})")


def check_empty_rows(subject: Subject) -> None:
    """A row without valid tokens gives no NaN, the same output for any content, and a gradient of exactly 0.

    For a user's block all but NaN is a note; a token-wise block has no such rows.
    """
    block = subject.block()
    subject.need_mask(block)
    if _is_tokenwise(subject, block):
        raise NotApplicable("the block is token-wise: no output depends on another token")
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
        full = [row for row in range(BATCH) if row != 1]
        what = f"a row without valid tokens changes other rows (n={n})"
        expect_close(out[full], block(x, **others)[full], FLOAT32_ERROR, what)
        finite = torch.autograd.grad(out.sum(), x, retain_graph=True)[0].isfinite().all()
        expect(finite, f"a row without valid tokens gives a gradient that is not finite (n={n})")
        with subject.note_unless_strict(block):
            own = torch.autograd.grad(out[1].square().sum() + out[1].sum(), x)[0]
            expect_zero(own, f"a row without valid tokens has a gradient of {{}} to x (n={n})")
            if zero:
                expect_zero(out[1], f"a row without valid tokens gives {{}} where it must give exactly 0 (n={n})")
            changed = x.detach().clone()
            changed[1] = subject.other(n)[1]
            what = f"the output of a row without valid tokens changes with its content (n={n})"
            expect_equal(block(changed, mask=mask, **others)[1], out[1], what)
    for dtype in (torch.bfloat16, torch.float16):
        half, narrow = (
            subject.block(dtype=dtype),
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in others.items()},
        )
        with torch.no_grad():
            out = half(x.detach().to(dtype), mask=mask, **narrow)
        expect(
            out.isfinite().all(), f"a row without valid tokens gives an output that is not finite in {dtype} (n={n})"
        )


def _is_tokenwise(subject: Subject, block: nn.Module) -> bool:
    """Whether the output in the middle depends on no other token, nor any output on the context."""
    n = max(subject.lengths)
    if n <= 2 or subject.inputs is not None:
        return False
    x, changed, middle = subject.x(n), subject.other(n), n // 2
    changed[..., middle, :] = x[..., middle, :]
    with torch.no_grad():
        return torch.equal(block(x)[..., middle, :], block(changed)[..., middle, :])
