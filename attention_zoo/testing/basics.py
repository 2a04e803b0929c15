"""Checks 1 to 3: shapes and side effects, causality, independence of batch rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attention_zoo.testing.expect import expect, expect_equal, expect_zero
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, Padding, Subject, seeded


def check_shapes(subject: Subject) -> None:
    """Shape, dtype and device are kept, inputs are not modified, and eval mode is deterministic."""
    block = subject.block()
    declared = getattr(block, "causal", subject.causal)
    expect(
        declared == subject.causal,
        f"the {subject.noun} says causal={declared}, but causal={subject.causal} was expected",
    )
    for n in subject.lengths:
        x, others = subject.x(n), subject.others(n)
        inputs = {"x": x, **others}
        before = {name: (value.clone(), value._version) for name, value in inputs.items()}
        out = block(x, **others)
        for name, (value, version) in before.items():
            same = torch.equal(inputs[name], value) and inputs[name]._version == version
            expect(same, f"forward modified its input {name} in place (n={n})")
        expect(isinstance(out, Tensor), f"forward returned {type(out).__name__}, not a tensor")
        for name in ("shape", "dtype", "device"):
            got, want = getattr(out, name), getattr(x, name)
            expect(got == want, f"output {name} {got} differs from input {name} {want} (n={n})")
        expect_equal(block(x, **others), out, f"two runs in eval mode differ (n={n})")
    n = min(subject.lengths[-1], 7)
    wide = subject.block(dtype=torch.float64)
    out = wide(subject.x(n, dtype=torch.float64), **subject.others(n, dtype=torch.float64))
    expect(out.dtype == torch.float64, f"output dtype is {out.dtype} for a float64 block and input")


def check_causality(subject: Subject) -> None:
    """No output depends on a later token: its gradient is exactly 0, and changing the token changes no bit."""
    if not subject.causal:
        raise NotApplicable(f"the {subject.noun} is not causal")
    block = subject.block()
    for n in subject.lengths:
        if positions := _positions(n):
            x, other = subject.x(n, batch=len(positions)), subject.other(n, batch=len(positions))
            paddings = subject.paddings(n, batch=len(positions))
            for padding in paddings.values():
                _check_future_gradient(block, x, positions, padding)
                _check_future_change(block, x, other, positions, padding)
            where = f"n={n}, training mode"
            block.train()
            _check_future_gradient(block, x, positions, paddings["no mask"]._replace(where=where))
            _check_future_change(block, x, other, positions, paddings["no mask"]._replace(where=where))
            block.eval()


def _positions(n: int) -> list[int]:
    """Positions whose future is tested, one per batch row: the ends, the middle, both sides of usual tile sizes."""
    edges = [e + d for e in (16, 32, 64, 128) for d in (-1, 0)]
    return sorted({t for t in (0, n // 3, n // 2, n - 2, *edges) if 0 <= t < n - 1})


def _check_future_gradient(block: nn.Module, x: Tensor, positions: list[int], padding: Padding) -> None:
    x = x.clone().requires_grad_()
    out = _run_seeded(block, x, padding.extra)
    picked = torch.stack([out[row, ..., t, :] for row, t in enumerate(positions)])
    gradient = torch.autograd.grad(picked.square().sum() + picked.sum(), x, materialize_grads=True)[0]
    for row, t in enumerate(positions):
        late = gradient[row, ..., t + 1 :, :].abs().nan_to_num(nan=float("inf"))
        late = late.movedim(-2, 0).flatten(1).amax(1)  # over streams and features
        what = f"output {t} has a gradient of {{}} to the later token {t + 1 + int(late.argmax())} ({padding.where})"
        expect_zero(late, what)


def _check_future_change(block: nn.Module, x: Tensor, other: Tensor, positions: list[int], padding: Padding) -> None:
    changed = x.clone()
    for row, t in enumerate(positions):
        changed[row, ..., t + 1 :, :] = other[row, ..., t + 1 :, :]
    with torch.no_grad():
        before, after = (_run_seeded(block, features, padding.extra) for features in (x, changed))
    for row, t in enumerate(positions):
        what = f"outputs up to token {t} change with later tokens ({padding.where})"
        expect_equal(after[row, ..., : t + 1, :], before[row, ..., : t + 1, :], what)


def check_rows(subject: Subject) -> None:
    """Batch rows are independent: a row has no gradient to, and no effect on, the output of another."""
    for training in (False, True):
        block = subject.block().train(training)
        for n in subject.lengths:
            where = f"n={n}, training mode" if training else f"n={n}"
            others, x = subject.others(n), subject.x(n)
            with torch.no_grad():
                before = _run_seeded(block, x, others)
            out = _run_seeded(block, x.requires_grad_(), others)
            for row in range(BATCH):
                keep = [other for other in range(BATCH) if other != row]
                gradient = torch.autograd.grad(out[row].square().sum(), x, retain_graph=True, materialize_grads=True)[0]
                expect_zero(gradient[keep], f"row {row} of the output has a gradient of {{}} to other rows ({where})")
                changed = x.detach().clone()
                changed[row] = subject.other(n)[row]
                with torch.no_grad():
                    after = _run_seeded(block, changed, others)
                expect_equal(after[keep], before[keep], f"outputs of other batch rows change with row {row} ({where})")


def _run_seeded(block: nn.Module, x: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
    """The output with a fixed random seed: in training mode every call drops the same elements."""
    with seeded(6):
        return block(x, **extra)
