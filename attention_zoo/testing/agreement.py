"""Fast path against reference, derivatives, half precision, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from attention_zoo.ops.implementation import reference
from attention_zoo.testing.expect import (
    FLOAT32_ERROR,
    GRADIENT_ERROR,
    expect,
    expect_close,
    expect_gradients_close,
    gradients,
    one_line,
)
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import Padding, Subject, seeded

LARGE = 50.0  # of activations in half precision
GRADIENT_FACTOR = 3  # by which gradients in half precision may be less precise than outputs


def _run(
    block: nn.Module, x: Tensor, extra: Mapping[str, Tensor], weight: Tensor, *, with_x: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of its weighted sum with respect to x and every parameter."""
    x = x.clone().requires_grad_(with_x)
    out = block(x, **extra)
    return out.detach(), gradients(block, (out * weight).sum(), x if with_x else None)


def check_fast_path(subject: Subject) -> None:
    """The fast path equals the reference in outputs and gradients, at lengths that cross every tile boundary."""
    block = subject.block()
    slow = subject.reference_of(block)
    has_reference = subject.reference is not None
    for n in [*subject.lengths, *subject.long_lengths[3::8]]:
        long = n in subject.long_lengths
        x, weight = subject.x(n), subject.weight(n)
        for name, padding in subject.paddings(n).items():
            if long and name != "a mask with holes":
                continue
            if long:
                x, weight, padding = x[:1], weight[:1], padding.rows(slice(1))
            fast, fast_gradients = _run(block, x, padding.extra, weight)
            with reference() as mode:
                want, want_gradients = _run(slow, x, padding.extra, weight)
            has_reference = has_reference or mode.consulted
            if not has_reference:
                raise NotApplicable(
                    "the block uses no operation of this library: pass reference= to name its reference"
                )
            expect_close(fast, want, FLOAT32_ERROR, f"the output of the fast path differs ({padding.where})")
            what = f"the gradient of the fast path to {{}} differs ({padding.where})"
            expect_gradients_close(fast_gradients, want_gradients, GRADIENT_ERROR, what)


def check_derivatives(subject: Subject) -> None:
    """Derivatives to x and to parameters are right in float64; a second derivative is right or raises."""
    block = subject.block(dtype=torch.float64)
    slow = subject.reference_of(block)
    n = min(5, max(subject.lengths))
    x = subject.x(n, batch=1, dtype=torch.float64).requires_grad_()
    others = subject.others(n, batch=1, dtype=torch.float64)
    with subject.note_unless_strict(block):
        precise = _is_smooth(block, x.detach(), others)
        expect(precise, "the block computes in less than float64 inside: its derivatives cannot be checked")
    if subject.gradient_is_exact:
        for length in {n, subject.sampled_lengths[-1]}:
            for padding in subject.paddings(length, dtype=torch.float64).values():
                _check_finite_differences(subject, block, length, padding)
        training = subject.paddings(n, dtype=torch.float64)["no mask"]._replace(where=f"n={n}, training mode")
        _check_finite_differences(subject, block.train(), n, training)
        block.eval()
        with reference():
            _check_gradcheck(torch.autograd.gradcheck, slow, x, others)
            if subject.double_backward:
                with _may_raise():
                    _check_gradcheck(torch.autograd.gradgradcheck, slow, x, others)
    if not subject.double_backward:
        return
    n = max(subject.lengths)
    x, weight = (subject.x(n, batch=1, dtype=torch.float64, seed=seed) for seed in (1, 5))
    others = subject.others(n, batch=1, dtype=torch.float64)
    with _may_raise():
        with reference():
            want = _second_derivative(slow, x, weight, others)
        got = _second_derivative(block, x, weight, others)
        expect_close(got, want, 1e-6, f"the second derivative of the fast path is wrong without an error (n={n})")


@contextmanager
def _may_raise() -> Iterator[None]:
    """A context for second derivatives, in which a block may say that it has none."""
    try:
        yield
    except (RuntimeError, NotImplementedError):
        return


def _check_gradcheck(check: Callable[..., bool], block: nn.Module, x: Tensor, others: Mapping[str, Tensor]) -> None:
    try:
        check(partial(block, **others), (x,), fast_mode=True)
    except GradcheckError as error:
        which = "first" if check is torch.autograd.gradcheck else "second"
        what = f"the {which} derivative to x differs from finite differences in float64 (n={x.shape[-2]})"
        raise AssertionError(what) from error


def _is_smooth(block: nn.Module, x: Tensor, others: Mapping[str, Tensor]) -> bool:
    """Whether a change of x by 1e-6 changes the output linearly, as it does unless the output is rounded."""
    with torch.no_grad():
        low, middle, high = (block(x + 1e-6 * k * x.cos(), **others).double() for k in (-1, 0, 1))
    return bool((high + low - 2 * middle).norm() <= 1e-9 * middle.norm())


def _check_finite_differences(subject: Subject, block: nn.Module, n: int, padding: Padding) -> None:
    """Compare gradients to x and each parameter, in one random direction each, after another forward pass."""
    x, weight = (subject.x(n, dtype=torch.float64, seed=seed) for seed in (1, 5))
    x = x.requires_grad_()
    total = _weighted(block, x, weight, padding)
    _weighted(block, x.detach() + 1, weight, padding)  # the graph of the first pass must be its own
    found = gradients(block, total, x)
    size = max(float(gradient.norm()) for gradient in found.values())
    leaves = {"x": x, **dict(block.named_parameters())}
    for name, gradient in found.items():
        with torch.no_grad(), seeded(8):
            leaf = leaves[name]
            direction, before = torch.randn_like(leaf), leaf.clone()
            ends = []
            for distance in (1e-6, -1e-6):
                leaf.copy_(before + distance * direction)
                ends.append(float(_weighted(block, x, weight, padding)))
            leaf.copy_(before)
        want, got = (ends[0] - ends[1]) / 2e-6, float((gradient * direction).sum())
        limit = GRADIENT_ERROR * max(abs(want), float(gradient.norm()), 1e-2 * size)
        what = f"the gradient to {name} is {got:.6g} where finite differences in float64 give {want:.6g}"
        expect(abs(want - got) <= limit, f"{what} ({padding.where})")


def _weighted(block: nn.Module, x: Tensor, weight: Tensor, padding: Padding) -> Tensor:
    with seeded(6):
        out = block(x, **padding.extra)
    return padding.replace_masked(out * weight, 0.0).sum()


def _second_derivative(block: nn.Module, x: Tensor, weight: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((block(x, **others) * weight).sum(), x, create_graph=True)
    if not first.requires_grad:  # a linear block
        return torch.zeros_like(x)
    return torch.autograd.grad((first * weight).sum(), x, materialize_grads=True)[0]


def check_half_precision(subject: Subject) -> None:
    """bfloat16, float16 and autocast give outputs and gradients that are finite and close to those of float32.

    Large activations give finite outputs.
    """
    n = max(subject.lengths)
    for dtype, limit in ((torch.bfloat16, subject.bf16_error), (torch.float16, subject.fp16_error)):
        half = subject.block(dtype=dtype)
        x, weight = subject.x(n, dtype=dtype), subject.weight(n, dtype=dtype)
        for padding in subject.paddings(n, dtype=dtype).values():
            out, found = _run(half, x, padding.extra, weight)
            if not subject.takes_tokens:
                expect(out.dtype == dtype, f"the output of a {dtype} block is {out.dtype}")
            bad = [name for name, gradient in found.items() if not gradient.isfinite().all()]
            expect(not bad, f"the gradient to {bad[:1]} in {dtype} is not finite ({padding.where})")
            want, gradients32 = _run_in_float32(half, x, padding.extra, weight)
            expect_close(out, want, limit, f"the output in {dtype} is off ({padding.where})")
            what = f"the gradient to {{}} in {dtype} is off ({padding.where})"
            expect_gradients_close(found, gradients32, GRADIENT_FACTOR * limit, what)
        if not subject.takes_tokens:
            _check_large(half, LARGE * x, subject.others(n, dtype=dtype))
        for long in subject.long_lengths[-2:]:
            x, others = subject.x(long, batch=1, dtype=dtype), subject.others(long, batch=1, dtype=dtype)
            with torch.no_grad():
                out = half(x, **others)
            want, _ = _run_in_float32(half, x, others)
            expect_close(out, want, limit, f"the output in {dtype} is off (n={long})")
        block, x, weight = subject.block(), subject.x(n), subject.weight(n)
        for padding in [*subject.paddings(n).values()][:2]:
            with torch.autocast(subject.device, dtype=dtype):
                out, found = _run(block, x, padding.extra, weight)
            if subject.is_strict(block) and not subject.takes_tokens:
                expect(out.dtype == dtype, f"under autocast to {dtype} the output is {out.dtype}")
            want, gradients32 = _run_in_float32(block, x, padding.extra, weight)
            # autocast also rounds the float32 weights and inputs, once each
            expect_close(out, want, 1.5 * limit, f"the output under autocast to {dtype} is off ({padding.where})")
            what = f"the gradient to {{}} under autocast to {dtype} is off ({padding.where})"
            # a parameter whose effect grows with the distance, such as a gate, amplifies the rounding of x
            expect_gradients_close(found, gradients32, 5 * GRADIENT_FACTOR * limit, what)


def _check_large(half: nn.Module, x: Tensor, others: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        out = half(x, **others)
    want, _ = _run_in_float32(half, x, others)
    if want.abs().max() < torch.finfo(x.dtype).max / 4:
        where = f"in {x.dtype} for x of size {LARGE} (n={x.shape[-2]})"
        expect(out.isfinite().all(), f"the output is not finite {where}")
        # softmax of large scores is too sensitive to rounding to compare more than the size
        ratio = float(out.float().norm() / want.norm().clamp(min=1e-30))
        expect(
            0.5 <= ratio <= 2 or not want.any(), f"the norm of the output is {ratio:.2g} times that in float32 {where}"
        )


def _run_in_float32(
    block: nn.Module, x: Tensor, extra: Mapping[str, Tensor], weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `_run` on a copy in float32; without weight the output alone."""
    wide = {name: value.float() if value.is_floating_point() else value for name, value in extra.items()}
    block = copy.deepcopy(block).float()
    with reference():
        if weight is not None:
            return _run(block, x.float(), wide, weight.float())
        with torch.no_grad():
            return block(x.float(), **wide), {}


def check_compile(subject: Subject) -> None:
    """torch.compile(fullgraph=True) traces forward and backward and equals eager mode."""
    n = next((n for n in subject.lengths if n > 2), max(subject.lengths))
    block = subject.block()
    x, weight = subject.x(n), subject.weight(n)
    paddings = subject.paddings(n)
    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
        for padding in (paddings[name] for name in ("no mask", "left padding") if name in paddings):
            want, found = _run(block, x, padding.extra, weight, with_x=not subject.takes_tokens)
            got, compiled_gradients = _run(compiled, x, padding.extra, weight, with_x=not subject.takes_tokens)
            expect_close(got, want, FLOAT32_ERROR, f"the compiled output differs ({padding.where})")
            compiled_gradients = dict(zip(found, compiled_gradients.values(), strict=True))
            what = f"the compiled gradient to {{}} differs ({padding.where})"
            expect_gradients_close(compiled_gradients, found, GRADIENT_ERROR, what)
    except torch._dynamo.exc.TorchDynamoException as error:
        what = f"torch.compile(fullgraph=True) cannot trace the {subject.noun}: {one_line(error)}"
        raise AssertionError(what) from error
    finally:
        torch.compiler.reset()
