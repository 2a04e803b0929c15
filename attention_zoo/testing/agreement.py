"""Checks 7 to 10: the fast path against the reference, derivatives, half precision, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.ops.implementation import reference
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import (
    FLOAT32_ERROR,
    GRADIENT_ERROR,
    Subject,
    expect,
    expect_close,
    relative_error,
)


def _run(block: nn.Module, x: Tensor, extra: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a weighted sum of it to x and to every parameter."""
    x = x.clone().requires_grad_()
    out = block(x, **extra)
    leaves = {"x": x, **{name: p for name, p in block.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return out.detach(), gradients


def check_fast_path(subject: Subject) -> None:
    """The fast path equals the reference, outputs and gradients, at lengths that cross every tile edge."""
    block = subject.block()
    twin = subject.twin(block)
    own_reference = subject.reference is not None
    for n in subject.lengths:
        x, weight = subject.x(n), subject.x(n, seed=5)
        for name, mask in subject.masks(n).items():
            extra = subject.others(n) if mask is None else {**subject.others(n), "mask": mask}
            fast, fast_gradients = _run(block, x, extra, weight)
            with reference() as mode:
                want, gradients = _run(twin, x, extra, weight)
            own_reference = own_reference or mode.consulted
            expect_close(fast, want, FLOAT32_ERROR, f"the fast path's output differs (n={n}, {name})")
            size = float(torch.stack([g.norm() for g in gradients.values()]).max())
            for key, gradient in gradients.items():
                # measured against the largest gradient: one that cancels to almost 0 has no digits of its own
                error = float((fast_gradients[key] - gradient).norm()) / max(float(gradient.norm()), 1e-2 * size, 1e-30)
                what = f"the fast path's gradient to {key} differs by {error:.2g} (n={n}, {name})"
                expect(error <= GRADIENT_ERROR, what)
    if not own_reference:
        raise NotApplicable("the block uses no op of this library: pass reference= to name its slow twin")


def check_derivatives(subject: Subject) -> None:
    """First and second derivatives are right in float64; a second one on the fast path is right or raises."""
    block = subject.block(dtype=torch.float64)
    twin = subject.twin(block)
    n = min(5, max(subject.lengths))
    x = subject.x(n, batch=1, dtype=torch.float64).requires_grad_()
    others = subject.others(n, batch=1, dtype=torch.float64)
    if subject.gradient_is_exact:
        with reference():
            torch.autograd.gradcheck(lambda x: twin(x, **others), (x,), fast_mode=True)
            if subject.double_backward:
                torch.autograd.gradgradcheck(lambda x: twin(x, **others), (x,), fast_mode=True)
    if subject.double_backward:
        _second_derivative_is_right_or_raises(subject, block, twin)


def _second_derivative_is_right_or_raises(subject: Subject, block: nn.Module, twin: nn.Module) -> None:
    n = max(subject.lengths)
    x, weight = (subject.x(n, batch=1, dtype=torch.float64, seed=seed) for seed in (1, 5))
    others = subject.others(n, batch=1, dtype=torch.float64)
    with reference():
        want = _second_derivative(twin, x, weight, others)
    try:
        got = _second_derivative(block, x, weight, others)
    except (RuntimeError, NotImplementedError):
        return
    expect_close(got, want, 1e-6, f"the fast path's second derivative is silently wrong (n={n})")


def _second_derivative(block: nn.Module, x: Tensor, weight: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((block(x, **others) * weight).sum(), x, create_graph=True)
    if not first.requires_grad:  # the block is linear: its second derivative is 0
        return torch.zeros_like(x)
    (second,) = torch.autograd.grad((first * weight).sum(), x, allow_unused=True, materialize_grads=True)
    return second


def check_half_precision(subject: Subject) -> None:
    """bfloat16, float16 and autocast: finite, the right dtype, and near what float64 computes."""
    n = max(subject.lengths)
    for dtype, limit in ((torch.bfloat16, subject.bf16_error), (torch.float16, subject.fp16_error)):
        half = subject.block(dtype=dtype)
        exact = copy.deepcopy(half).double()
        for name, mask in subject.masks(n).items():
            x, others = subject.x(n, dtype=dtype), subject.others(n, dtype=dtype)
            wide = {k: v.double() if v.is_floating_point() else v for k, v in others.items()}
            extra = {} if mask is None else {"mask": mask}
            out, gradients = _run(half, x, {**others, **extra}, subject.x(n, seed=5, dtype=dtype))
            expect(out.dtype == dtype, f"the output of a {dtype} block is {out.dtype}")
            bad = [key for key, gradient in gradients.items() if not bool(gradient.isfinite().all())]
            expect(not bad, f"the gradient to {bad[:1]} in {dtype} is not finite (n={n}, {name})")
            with torch.no_grad(), reference():
                want = exact(x.double(), **wide, **extra)
            _expect_near(out, want, mask, limit, f"the output in {dtype} is off (n={n}, {name})")
        _check_autocast(subject, n, dtype, limit)


def _expect_near(out: Tensor, want: Tensor, mask: Tensor | None, limit: float, what: str) -> None:
    expect(bool(out.isfinite().all()), f"{what}: not finite")
    error = relative_error(out, want)
    expect(error <= limit, f"{what}: relative error {error:.2g} exceeds {limit:.2g}")


def _check_autocast(subject: Subject, n: int, dtype: torch.dtype, limit: float) -> None:
    block = subject.block()
    x, others = subject.x(n), subject.others(n)
    with torch.no_grad(), torch.autocast(subject.device, dtype=dtype):
        linear = torch.nn.Linear(subject.dim, subject.dim, device=subject.device)
        out, expected = block(x, **others), linear(x).dtype
    what = f"under autocast to {dtype} the output is {out.dtype}, where nn.Linear's is {expected}"
    expect(out.dtype == expected, what)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in others.items()}
    with torch.no_grad(), reference():
        want = copy.deepcopy(block).double()(x.double(), **wide)
    # under autocast float32 weights and inputs are rounded as well, once each
    _expect_near(out, want, None, 1.5 * limit, f"the output under autocast to {dtype} is off (n={n})")


def check_compile(subject: Subject) -> None:
    """torch.compile(fullgraph=True) traces forward and backward, and computes what eager does."""
    n = next((n for n in subject.lengths if n > 2), max(subject.lengths))
    block = subject.block()
    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
        for mask in (None, subject.masks(n).get("left padding")):
            extra = subject.others(n) if mask is None else {**subject.others(n), "mask": mask}
            x, weight = subject.x(n), subject.x(n, seed=5)
            want, gradients = _run(block, x, extra, weight)
            got, compiled_gradients = _run(compiled, x, extra, weight)
            expect_close(got, want, FLOAT32_ERROR, f"the compiled output differs (n={n})")
            for (key, gradient), other in zip(gradients.items(), compiled_gradients.values(), strict=True):
                expect_close(other, gradient, GRADIENT_ERROR, f"the compiled gradient to {key} differs (n={n})")
    except torch._dynamo.exc.TorchDynamoException as error:
        first = str(error).strip().splitlines()[0]
        raise AssertionError(f"torch.compile(fullgraph=True) cannot trace the block: {first}") from error
    finally:
        torch.compiler.reset()
