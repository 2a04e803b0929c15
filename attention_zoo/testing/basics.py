"""Shapes and side effects, causality, independence of batch rows, and behaviour in training mode."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.testing.expect import FLOAT32_ERROR, expect, expect_close, expect_equal, expect_zero
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, Padding, Subject, seeded

LARGE_BATCH = 33
SAMPLES = 64  # forward passes that estimate an expectation under dropout


def check_shapes(subject: Subject) -> None:
    """Shape, dtype and device are kept, inputs are not modified, and eval mode is deterministic and without effects.

    Also: forward in eval mode changes neither parameters, buffers nor the random state, and strides of x and the
    gradient mode do not change the output.
    """
    block = subject.block()
    declared = getattr(block, "causal", subject.causal)
    expect(declared == subject.causal, f"the block says causal={declared}, but causal={subject.causal} was expected")
    for n in subject.lengths:
        x, others = subject.x(n), subject.others(n)
        padding = [*subject.paddings(n).values()][-1]
        inputs = {"x": x, **others, **padding.extra}
        before = {name: (value.clone(), value._version) for name, value in inputs.items()}
        block(x, **padding.extra)
        out = block(x, **others)
        for name, (value, version) in before.items():
            same = torch.equal(inputs[name], value) and inputs[name]._version == version
            expect(same, f"forward modified its input {name} in place (n={n})")
        expect(isinstance(out, Tensor), f"forward returned {type(out).__name__}, not a tensor")
        for name in ("shape", "dtype", "device"):
            got, want = getattr(out, name), getattr(x, name)
            expect(got == want, f"output {name} {got} differs from input {name} {want} (n={n})")
    check_effects(subject, block)
    n = min(subject.lengths[-1], 7)
    wide = subject.block(dtype=torch.float64)
    out = wide(subject.x(n, dtype=torch.float64), **subject.others(n, dtype=torch.float64))
    expect(out.dtype == torch.float64, f"output dtype is {out.dtype} for a float64 block and input")


def check_effects(subject: Subject, block: nn.Module) -> None:
    """Forward in eval mode is deterministic, without side effects, whatever the gradient mode and the strides of x."""
    fresh = subject.block()
    for n in subject.lengths:
        x, others = subject.x(n), subject.others(n)
        held = {name: value.clone() for name, value in _tensors(block).items()}
        states = torch.get_rng_state(), random.getstate()
        modes = torch.is_grad_enabled(), torch.get_default_dtype(), [module.training for module in block.modules()]
        out = block(x, **others)
        now = torch.is_grad_enabled(), torch.get_default_dtype(), [module.training for module in block.modules()]
        expect(now == modes, f"forward changes the gradient mode, the default dtype or the training mode (n={n})")
        expect(
            torch.equal(torch.get_rng_state(), states[0]), f"forward in eval mode changes torch's random state (n={n})"
        )
        expect(random.getstate() == states[1], f"forward in eval mode changes Python's random state (n={n})")
        for name, value in _tensors(block).items():
            expect(torch.equal(value, held.get(name, value)), f"forward in eval mode changes {name} (n={n})")
        expect_equal(block(x, **others), out, f"two runs in eval mode differ (n={n})")
        fresh(subject.other(n), **others)
        expect_equal(fresh(x, **others), out, f"the output differs after forward with another x (n={n})")
        strided = x.movedim(-2, 0).contiguous().movedim(0, -2)
        with torch.inference_mode():
            expect_close(block(x, **others), out, FLOAT32_ERROR, f"the output in inference mode differs (n={n})")
            expect_close(block(strided, **others), out, FLOAT32_ERROR, f"the output for a strided x differs (n={n})")


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def check_causality(subject: Subject) -> None:
    """No output depends on a later token: its gradient is exactly 0, and changing the token changes no bit.

    In eval and in training mode, with padding, and for a batch of one row.
    """
    if not subject.causal:
        raise NotApplicable(f"the {subject.noun} is not causal")
    block = subject.block()
    for n in [*subject.lengths, *subject.long_lengths]:
        long = n in subject.long_lengths
        positions = _edges(n)[-4:] if long else sorted({0, n // 3, n // 2, n - 2, *_edges(n)} & set(range(n - 1)))
        if not positions:
            continue
        paddings = subject.paddings(n, batch=len(positions))
        for name, padding in paddings.items():
            if not long or name == "no mask":
                _check_future(subject, block, n, positions, padding, gradient=not long)
        if n not in (*subject.sampled_lengths, *subject.long_lengths):
            continue
        block.train()
        for name, padding in paddings.items():
            if name in ("no mask", "a mask with holes") and (not long or name == "no mask"):
                training = padding._replace(where=f"{padding.where}, training mode")
                _check_future(subject, block, n, positions, training, gradient=n <= 513)
        block.eval()
        alone = subject.paddings(n, batch=1)
        for name in ("no mask", "left padding"):
            if name in alone and not long:
                padding = alone[name]._replace(where=f"{alone[name].where}, batch of 1")
                _check_future(subject, block, n, [n // 2 - (n == 2)], padding, gradient=False)
    for n in subject.sampled_lengths:
        _check_prefix(subject, block, n)


def _edges(n: int) -> list[int]:
    """Positions on both sides of usual tile sizes."""
    edges = [e + d for e in (16, 32, 64, 128, 256, 512, 1024) for d in (-1, 0)]
    return [t for t in edges if t < n - 1]


def _check_prefix(subject: Subject, block: nn.Module, n: int) -> None:
    """Neither the number of later tokens nor their mask has an effect."""
    x, first = subject.x(n), n // 2
    if not first:
        return
    for padding in subject.paddings(n).values():
        part = padding if padding.mask is None else padding._replace(mask=padding.mask[:, :first])
        with torch.no_grad():
            whole = block(x, **padding.extra)[..., :first, :]
            prefix = block(x[..., :first, :], **part.extra)
        got, want = part.replace_masked(prefix, 0.0), part.replace_masked(whole, 0.0)
        what = f"outputs of the first {first} tokens differ without the later tokens ({padding.where})"
        expect_close(got, want, FLOAT32_ERROR, what)


def _check_future(
    subject: Subject, block: nn.Module, n: int, positions: list[int], padding: Padding, *, gradient: bool
) -> None:
    """Change, and differentiate with respect to, the tokens after one position per batch row."""
    x, other = subject.x(n, batch=len(positions)), subject.other(n, batch=len(positions))
    if gradient:
        _check_future_gradient(block, x.clone().requires_grad_(), positions, padding)
    changed = x.clone()
    for row, t in enumerate(positions):
        changed[row, ..., t + 1 :, :] = other[row, ..., t + 1 :, :]
    with torch.no_grad():
        before, after = (_run_seeded(block, features, padding.extra) for features in (x, changed))
    for row, t in enumerate(positions):
        what = f"outputs up to token {t} change with later tokens ({padding.where})"
        expect_equal(after[row, ..., : t + 1, :], before[row, ..., : t + 1, :], what)


def _check_future_gradient(block: nn.Module, x: Tensor, positions: list[int], padding: Padding) -> None:
    out = _run_seeded(block, x, padding.extra)
    picked = torch.stack([out[row, ..., t, :] for row, t in enumerate(positions)])
    gradient = torch.autograd.grad(picked.square().sum() + picked.sum(), x, materialize_grads=True)[0]
    for row, t in enumerate(positions):
        late = gradient[row, ..., t + 1 :, :].abs().nan_to_num(nan=float("inf"))
        late = late.movedim(-2, 0).flatten(1).amax(1)  # over streams and features
        what = f"output {t} has a gradient of {{}} to the later token {t + 1 + int(late.argmax())} ({padding.where})"
        expect_zero(late, what)


def check_rows(subject: Subject) -> None:
    """Batch rows are independent: a row has no gradient to, and no effect on, the output of another.

    In eval and in training mode. A row also gives the same output in batches of 1 and 33, with its own mask.
    """
    for training in (False, True):
        block = subject.block().train(training)
        for n in subject.sampled_lengths if training else subject.lengths:
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
    block = subject.block()
    for n in [*subject.sampled_lengths, *subject.long_lengths[3::4]]:
        _check_batch_sizes(subject, block, n, LARGE_BATCH if n <= 67 else BATCH)


def _check_batch_sizes(subject: Subject, block: nn.Module, n: int, batch: int) -> None:
    x = subject.x(n, batch=batch)
    for name, padding in subject.paddings(n, batch=batch).items():
        if name not in ("no mask", "a mask with holes"):
            continue
        with torch.no_grad():
            out = padding.replace_masked(block(x, **padding.extra), 0.0)
            for row in sorted({0, 1, batch // 2, batch - 1}):
                one = slice(row, row + 1)
                alone = padding.rows(one)
                want = alone.replace_masked(block(x[one], **alone.extra), 0.0)
                what = f"row {row} of a batch of {batch} differs from the same row alone ({padding.where})"
                expect_close(out[one], want, FLOAT32_ERROR, what)


def _run_seeded(block: nn.Module, x: Tensor, extra: Mapping[str, Tensor], seed: int = 6) -> Tensor:
    """The output with a fixed random seed: in training mode every call drops the same elements."""
    with seeded(seed):
        return block(x, **extra)


def check_training(subject: Subject) -> None:
    """Training mode has the expectation of eval mode under dropout, and changes no parameter.

    A block without randomness gives the same output in both modes, and changes no buffer; otherwise a note.
    """
    block: Any = subject.block()
    n = max((n for n in subject.lengths if n <= 67), default=min(subject.lengths))
    x, others = subject.x(n), subject.others(n)
    with torch.no_grad():
        want = block(x, **others)
        block.train()
        held = {name: value.clone() for name, value in _tensors(block).items()}
        first, second = (_run_seeded(block, x, others, seed) for seed in (6, 7))
        for name, value in block.named_parameters():
            same = torch.equal(value, held[name]) and value.grad is None
            expect(same, f"forward in training mode changes the parameter {name} or its gradient")
        expect(all(module.training for module in block.modules()), "forward ends the training mode")
        expect(
            len({_state_after(block, x, others, seed) for seed in (6, 7)}) == 2, "forward seeds torch's random state"
        )
        if not torch.equal(first, second):
            _check_expectation(block, x, others, want)
            if subject.has_step(block):
                dropped = [_step_seeded(block, x, others, seed) for seed in (6, 7)]
                expect(
                    not torch.equal(dropped[0], dropped[1]),
                    "forward drops elements in training mode, but step does not",
                )
        elif not torch.equal(first, want):
            with subject.note_unless_strict(block):
                what = f"the output in training mode differs from eval mode, without randomness (n={n})"
                expect_close(first, want, FLOAT32_ERROR, what)
        changed = [name for name, value in block.named_buffers() if name in held and not torch.equal(value, held[name])]
        with subject.note_unless_strict(block):
            expect(not changed, f"forward in training mode changes the buffers {changed}")
        again = block.eval()(x, **others)
    if not changed:
        expect_equal(again, want, f"the output in eval mode changed after forward in training mode (n={n})")


def _state_after(block: nn.Module, x: Tensor, others: Mapping[str, Tensor], seed: int) -> bytes:
    """Torch's random state after a forward pass."""
    with seeded(seed):
        block(x, **others)
        return torch.get_rng_state().numpy().tobytes()


def _step_seeded(block: Any, x: Tensor, others: Mapping[str, Tensor], seed: int) -> Tensor:
    with seeded(seed):
        return block.step(x, **others)[0]


def _check_expectation(block: nn.Module, x: Tensor, others: Mapping[str, Tensor], want: Tensor) -> None:
    """The mean over random seeds is `want`, not a multiple of it."""
    outs = torch.stack([_run_seeded(block, x, others, seed) for seed in range(SAMPLES)]).double().flatten(1)
    mean = want.double().flatten()
    slopes = outs @ mean / mean.square().sum()
    norm = float((outs.norm(dim=1) / mean.norm()).mean())
    slope, noise = float(slopes.mean()), 5 * float(slopes.std()) / SAMPLES**0.5
    # a norm after the dropout keeps the norm of the output, so that its mean is shorter by design
    off = abs(slope - 1) > 0.04 + noise and abs(norm - 1) > 0.04
    expect(not off, f"the mean output under dropout is {slope:.3g} times the output in eval mode")
