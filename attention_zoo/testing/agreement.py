"""Checks 7 to 10: fast path against reference, derivatives, half precision, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.ops.implementation import reference
from attention_zoo.testing.expect import FLOAT32_ERROR, GRADIENT_ERROR, expect, expect_close, one_line
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import Subject


def _run(
    block: nn.Module, x: Tensor, extra: Mapping[str, Tensor], weight: Tensor, *, with_x: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of its weighted sum with respect to x and every parameter."""
    x = x.clone().requires_grad_(with_x)
    out = block(x, **extra)
    leaves = {"x": x} if with_x else {}
    leaves |= {name: p for name, p in block.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((out * weight).sum(), [*leaves.values()], materialize_grads=True)
    return out.detach(), dict(zip(leaves, gradients, strict=True))


def check_fast_path(subject: Subject) -> None:
    """The fast path equals the reference in outputs and gradients, at lengths that cross every tile boundary."""
    block = subject.block()
    slow = subject.reference_of(block)
    has_reference = subject.reference is not None
    for n in subject.lengths:
        x, weight = subject.x(n), subject.weight(n)
        for padding in subject.paddings(n).values():
            fast, fast_gradients = _run(block, x, padding.extra, weight)
            with reference() as mode:
                want, gradients = _run(slow, x, padding.extra, weight)
            has_reference = has_reference or mode.consulted
            expect_close(fast, want, FLOAT32_ERROR, f"the output of the fast path differs ({padding.where})")
            # relative to the largest gradient: one that cancels to almost 0 has no significant digits
            size = max(float(gradient.norm()) for gradient in gradients.values())
            for name, gradient in gradients.items():
                scale = max(float(gradient.norm()), 1e-2 * size, 1e-30)
                error = float((fast_gradients[name] - gradient).norm()) / scale
                what = f"the gradient of the fast path to {name} differs by {error:.2g} ({padding.where})"
                expect(error <= GRADIENT_ERROR, what)
    if not has_reference:
        raise NotApplicable("the block uses no operation of this library: pass reference= to name its reference")


def check_derivatives(subject: Subject) -> None:
    """Derivatives are right in float64; a second derivative of the fast path is right or raises."""
    block = subject.block(dtype=torch.float64)
    slow = subject.reference_of(block)
    n = min(5, max(subject.lengths))
    x = subject.x(n, batch=1, dtype=torch.float64).requires_grad_()
    others = subject.others(n, batch=1, dtype=torch.float64)
    if subject.gradient_is_exact:
        with reference():
            torch.autograd.gradcheck(partial(slow, **others), (x,), fast_mode=True)
            if subject.double_backward:
                torch.autograd.gradgradcheck(partial(slow, **others), (x,), fast_mode=True)
    if not subject.double_backward:
        return
    n = max(subject.lengths)
    x, weight = (subject.x(n, batch=1, dtype=torch.float64, seed=seed) for seed in (1, 5))
    others = subject.others(n, batch=1, dtype=torch.float64)
    with reference():
        want = _second_derivative(slow, x, weight, others)
    try:
        got = _second_derivative(block, x, weight, others)
    except (RuntimeError, NotImplementedError):
        return
    expect_close(got, want, 1e-6, f"the second derivative of the fast path is wrong without an error (n={n})")


def _second_derivative(block: nn.Module, x: Tensor, weight: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((block(x, **others) * weight).sum(), x, create_graph=True)
    if not first.requires_grad:  # a linear block
        return torch.zeros_like(x)
    return torch.autograd.grad((first * weight).sum(), x, materialize_grads=True)[0]


def check_half_precision(subject: Subject) -> None:
    """bfloat16, float16 and autocast give finite values of the right dtype that are close to those of float32."""
    n = max(subject.lengths)
    for dtype, limit in ((torch.bfloat16, subject.bf16_error), (torch.float16, subject.fp16_error)):
        half = subject.block(dtype=dtype)
        x, weight = subject.x(n, dtype=dtype), subject.weight(n, dtype=dtype)
        for padding in subject.paddings(n, dtype=dtype).values():
            out, gradients = _run(half, x, padding.extra, weight)
            if not subject.takes_tokens:
                expect(out.dtype == dtype, f"the output of a {dtype} block is {out.dtype}")
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            expect(not bad, f"the gradient to {bad[:1]} in {dtype} is not finite ({padding.where})")
            want = _in_float32(half, x, padding.extra)
            expect_close(out, want, limit, f"the output in {dtype} is off ({padding.where})")
        block, x, others = subject.block(), subject.x(n), subject.others(n)
        with torch.no_grad(), torch.autocast(subject.device, dtype=dtype):
            out = block(x, **others)
        if not subject.takes_tokens:
            expect(out.dtype == dtype, f"under autocast to {dtype} the output is {out.dtype}")
        want = _in_float32(block, x, others)
        # autocast also rounds the float32 weights and inputs, once each
        expect_close(out, want, 1.5 * limit, f"the output under autocast to {dtype} is off (n={n})")


def _in_float32(block: nn.Module, x: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
    wide = {name: value.float() if value.is_floating_point() else value for name, value in extra.items()}
    with torch.no_grad(), reference():
        return copy.deepcopy(block).float()(x.float(), **wide)


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
            want, gradients = _run(block, x, padding.extra, weight, with_x=not subject.takes_tokens)
            got, compiled_gradients = _run(compiled, x, padding.extra, weight, with_x=not subject.takes_tokens)
            expect_close(got, want, FLOAT32_ERROR, f"the compiled output differs ({padding.where})")
            for (name, gradient), other in zip(gradients.items(), compiled_gradients.values(), strict=True):
                what = f"the compiled gradient to {name} differs ({padding.where})"
                expect_close(other, gradient, GRADIENT_ERROR, what)
    except torch._dynamo.exc.TorchDynamoException as error:
        what = f"torch.compile(fullgraph=True) cannot trace the {subject.noun}: {one_line(error)}"
        raise AssertionError(what) from error
    finally:
        torch.compiler.reset()
