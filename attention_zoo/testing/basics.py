"""Checks 1 to 3: shapes and side effects, causality, independence of batch rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, Subject, expect, expect_equal


def check_shapes(subject: Subject) -> None:
    """Shape, dtype and device are kept, the input is not modified, and eval mode is deterministic."""
    block = subject.block()
    declared = getattr(block, "causal", subject.causal)
    expect(declared == subject.causal, f"the block says causal={declared}, but causal={subject.causal} was expected")
    for n in subject.lengths:
        x, others = subject.x(n), subject.others(n)
        before = {name: value.clone() for name, value in {"x": x, **others}.items()}
        versions = {name: value._version for name, value in {"x": x, **others}.items()}
        out = block(x, **others)
        for name, value in {"x": x, **others}.items():
            same = torch.equal(value, before[name]) and value._version == versions[name]
            expect(same, f"forward modified its input {name} in place (n={n})")
        expect(isinstance(out, Tensor), f"forward returned {type(out).__name__}, not a tensor")
        expect(out.shape == x.shape, f"output shape {tuple(out.shape)} differs from input {tuple(x.shape)} (n={n})")
        expect(out.dtype == x.dtype, f"output dtype {out.dtype} differs from input {x.dtype} (n={n})")
        expect(out.device == x.device, f"output device {out.device} differs from input {x.device} (n={n})")
        expect_equal(block(x, **others), out, f"two runs in eval mode differ (n={n})")
    wide = subject.block(dtype=torch.float64)
    n = min(subject.lengths[-1], 7)
    out = wide(subject.x(n, dtype=torch.float64), **subject.others(n, dtype=torch.float64))
    expect(out.dtype == torch.float64, f"output dtype is {out.dtype} for a float64 block and input")


def check_causality(subject: Subject) -> None:
    """No output depends on a later token: exactly no gradient, and not one bit of change."""
    if not subject.causal:
        raise NotApplicable("the block is not causal")
    block = subject.block()
    for n in subject.lengths:
        moments = _moments(n)
        if not moments:
            continue
        others = subject.others(n, batch=len(moments))
        for name, mask in subject.masks(n, batch=len(moments)).items():
            extra = others if mask is None else {**others, "mask": mask}
            _no_gradient_from_the_future(subject, block, n, moments, extra, f"n={n}, {name}")
            _no_change_from_the_future(subject, block, n, moments, extra, f"n={n}, {name}")


def _moments(n: int) -> list[int]:
    """Tokens whose future is looked at, a batch row each: the ends, the middle, either side of usual tile edges."""
    edges = [e + d for e in (16, 32, 64, 128) for d in (-1, 0)]
    return sorted({t for t in (0, n // 3, n // 2, n - 2, *edges) if 0 <= t < n - 1})


def _no_gradient_from_the_future(
    subject: Subject, block: nn.Module, n: int, moments: list[int], extra: dict[str, Tensor], where: str
) -> None:
    x = subject.x(n, batch=len(moments)).requires_grad_()
    out = block(x, **extra)
    picked = torch.stack([out[row, ..., t, :] for row, t in enumerate(moments)])
    gradient = torch.autograd.grad(picked.square().sum() + picked.sum(), x)[0]
    for row, t in enumerate(moments):
        late = gradient[row, ..., t + 1 :, :].abs().nan_to_num(nan=float("inf"))
        size = float(late.max())
        worst = t + 1 + int(late.amax(-1).flatten(0, -2).amax(0).argmax() if late.ndim > 2 else late.amax(-1).argmax())
        expect(size == 0, f"output {t} has a gradient of {size:.2g} to the later token {worst} ({where})")


def _no_change_from_the_future(
    subject: Subject, block: nn.Module, n: int, moments: list[int], extra: dict[str, Tensor], where: str
) -> None:
    x, other = (subject.x(n, batch=len(moments), seed=seed) for seed in (1, 9))
    changed = x.clone()
    for row, t in enumerate(moments):
        changed[row, ..., t + 1 :, :] = 10 * other[row, ..., t + 1 :, :]
    with torch.no_grad():
        before, after = block(x, **extra), block(changed, **extra)
    for row, t in enumerate(moments):
        what = f"outputs up to token {t} change with the tokens after it ({where})"
        expect_equal(after[row, ..., : t + 1, :], before[row, ..., : t + 1, :], what)


def check_rows(subject: Subject) -> None:
    """Batch rows are independent: changing one row changes no other, nor gives it a gradient."""
    block = subject.block()
    for n in subject.lengths:
        others = subject.others(n)
        x = subject.x(n).requires_grad_()
        out = block(x, **others)
        for row in range(BATCH):
            gradient = torch.autograd.grad(out[row].square().sum(), x, retain_graph=True)[0]
            elsewhere = torch.cat((gradient[:row], gradient[row + 1 :]))
            size = float(elsewhere.abs().max())
            expect(size == 0, f"row {row} of the output has a gradient of {size:.2g} to other batch rows (n={n})")
            changed = x.detach().clone()
            changed[row] = 10 * subject.x(n, seed=9)[row]
            keep = [other for other in range(BATCH) if other != row]
            what = f"outputs of other batch rows change with row {row} (n={n})"
            expect_equal(block(changed, **others)[keep], out[keep], what)
