"""Saving and copying, argument validation, attention maps."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attention_zoo.testing.expect import FLOAT32_ERROR, expect, expect_close, expect_equal, expect_zero, one_line
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, Padding, Subject

MAX_COEFFICIENTS = 1024  # per output feature, of the linear map that `check_map` fits


def check_saving(subject: Subject) -> None:
    """state_dict, deepcopy, and construction on the meta device with load_state_dict give an equal block."""
    block = subject.block()
    n = max(subject.lengths)
    x, others = subject.x(n), subject.others(n)
    block.train()(x, **others)  # so that statistics differ from those of a new block
    out = block.eval()(x, **others)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = subject.block(seed=4)
    other(x, **others)  # what it computes from its weights before they are loaded must not be kept
    other.load_state_dict(torch.load(file, weights_only=True))
    expect_equal(other(x, **others), out, f"a new {subject.noun} that loads the state_dict gives other outputs")
    expect_equal(copy.deepcopy(block)(x, **others), out, "a deep copy gives other outputs")
    with torch.device("meta"):
        empty = copy.deepcopy(subject.make_block())
    empty = subject.adapt(empty.to_empty(device=subject.device)).eval()
    empty.load_state_dict(block.state_dict())
    with subject.note_unless_strict(empty):
        expect_equal(
            empty(x, **others), out, f"a {subject.noun} built on the meta device and loaded gives other outputs"
        )


def check_arguments(subject: Subject) -> None:
    """Invalid arguments raise ValueError or TypeError; the message names the argument and its value."""
    block: Any = subject.block()
    n = next((n for n in subject.lengths if n > 2), max(subject.lengths))
    x, others = subject.x(n), subject.others(n)
    mask = torch.ones(BATCH, n, dtype=torch.bool, device=subject.device)
    wrong: list[tuple[str, str, Callable[[], object]]] = [
        ("x", str(subject.dim + 1), lambda: block(torch.cat((x, x[..., :1]), dim=-1), **others)),
        ("x", "int64", lambda: block(x.long(), **others)),
        ("x", str(tuple(x[0, ..., 0, :].shape)), lambda: block(x[0, ..., 0, :], **others)),
        ("x", "0", lambda: block(x[..., :0, :], **others)),
        ("mask", "float32", lambda: block(x, mask=mask.float(), **others)),
        ("mask", str(n + 1), lambda: block(x, mask=torch.cat((mask, mask[:, :1]), dim=1), **others)),
    ]
    if subject.has_step(block):
        _, state = block.step(x, **others)
        wrong.append(("state", str(BATCH), lambda: block.step(x[:1, ..., :1, :], state)))
        wrong.append(("state", "str", lambda: block.step(x[..., :1, :], "state")))
    with subject.note_unless_strict(block):
        expect_errors(wrong)


def expect_errors(calls: Sequence[tuple[str, str, Callable[[], object]]]) -> None:
    """Raise AssertionError unless each call raises an error that names the argument and the value beside it."""
    for name, value, call in calls:
        _expect_error(call, name, value)


def _expect_error(call: Callable[[], object], name: str, value: str) -> None:
    got = "no error"
    try:
        call()
    except (ValueError, TypeError) as error:
        named = re.search(rf"\b{name}\b", str(error)) and value in str(error)
        expect(named, f"the error must name {name} and the value {value}, but reads: {one_line(error)}")
        return
    except Exception as error:
        got = f"{type(error).__name__}: {one_line(error)}"
    raise AssertionError(f"an invalid {name} ({value}) must raise ValueError or TypeError, got {got}")


def check_map(subject: Subject) -> None:
    """attention_map is exactly 0 for later and masked keys, and times the values gives the operation's output.

    Where forward is linear in a single token, some linear map gives its output from that of the operation, or for a
    block without `values_and_output` from the sums of x weighted by the map.
    """
    block: Any = subject.block()
    if not callable(getattr(block, "attention_map", None)):
        raise NotApplicable("the block has no attention_map")
    exposes_values = callable(getattr(block, "values_and_output", None))
    for n in subject.lengths:
        x = subject.x(n)
        for padding in subject.paddings(n).values():
            with torch.no_grad():
                try:
                    weights = block.attention_map(x, **padding.extra)
                except NotImplementedError as error:
                    raise NotApplicable("the block has no attention_map") from error
            expect(weights.isfinite().all(), f"the attention map is not finite ({padding.where})")
            expect(weights.shape[-2] == n, f"the attention map is {tuple(weights.shape)}, not (b, h, i, j) (n={n})")
            _check_hidden(subject, weights, padding)
            if exposes_values:
                with torch.no_grad():
                    try:
                        values, out = block.values_and_output(x, **padding.extra)
                    except NotImplementedError:
                        exposes_values = False
                        continue
                what = f"the attention map times the values differs from the output ({padding.where})"
                expect_close(weights.to(values.dtype) @ values, out, FLOAT32_ERROR, what)
    if subject.inputs is None and subject.streams is None:
        _check_linear_in_values(subject, exposes_values)


@torch.no_grad()
def _check_linear_in_values(subject: Subject, exposes_values: bool) -> None:
    """Fit the output of forward by a linear map of (attention map) x, or of the exposed output of the operation."""
    block: Any = subject.block(dtype=torch.float64)
    a, b = (subject.x(1, dtype=torch.float64, seed=seed) for seed in (1, 5))
    zero = block(torch.zeros_like(a))
    n = max((n for n in subject.lengths if n <= 131), default=1)
    heads = block.attention_map(a).shape[1]
    if n == 1 or heads * subject.dim > MAX_COEFFICIENTS:
        return
    if (block(a + b) - block(a) - block(b) + zero).norm() > 1e-6 * block(a + b).norm():
        return  # a gate or a norm: the output is no linear map of the values
    batch = -(-4 * heads * subject.dim // n)
    x = 3 * subject.x(n, batch=batch, dtype=torch.float64)
    sums = block.values_and_output(x).output if exposes_values else block.attention_map(x).double() @ x[:, None]
    sums = sums.double().transpose(1, 2).flatten(2).flatten(0, 1)
    sums = torch.cat((sums, torch.ones_like(sums[:, :1])), dim=1)
    out = block(x).flatten(0, 1)
    fitted = sums @ torch.linalg.lstsq(sums, out, driver="gelsd").solution
    of = "values_and_output().output" if exposes_values else "the attention map times x"
    what = f"the output of forward is no linear map of {of} (n={n})"
    expect_close(fitted, out, 1e-3, what)


def _check_hidden(subject: Subject, weights: Tensor, padding: Padding) -> None:
    i, j = weights.shape[-2:]
    reads_context = "context" in padding.extra
    keys = padding.extra.get("context_mask") if reads_context else padding.mask
    if subject.causal and not reads_context:
        earlier = torch.ones(i, j, dtype=torch.bool, device=weights.device).tril()
        what = f"the attention map gives later keys a weight of {{}} ({padding.where})"
        expect_zero(weights.masked_fill(earlier, 0), what)
    if keys is not None:
        keys = keys.view(keys.shape[0], *(1,) * (weights.ndim - 2), j)
        what = f"the attention map gives masked keys a weight of {{}} ({padding.where})"
        expect_zero(weights.masked_fill(keys, 0), what)
