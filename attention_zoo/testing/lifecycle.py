"""Checks 11 to 13: saving and copying, bad arguments, the attention map."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, FLOAT32_ERROR, Subject, expect, expect_close, expect_equal


def check_saving(subject: Subject) -> None:
    """state_dict, deepcopy, and meta construction with to_empty and load_state_dict give the same block."""
    block = subject.block()
    n = max(subject.lengths)
    x, others = subject.x(n), subject.others(n)
    out = block(x, **others)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = subject.block(seed=4)
    other.load_state_dict(torch.load(file, weights_only=True))
    expect_equal(other(x, **others), out, "a block loaded from state_dict gives other outputs")
    expect_equal(copy.deepcopy(block)(x, **others), out, "a deep copy gives other outputs")
    with torch.device("meta"):
        empty = subject.make_block()
    empty = empty.to_empty(device=subject.device).eval()
    empty.load_state_dict(block.state_dict())
    expect_equal(empty(x, **others), out, "a block built on the meta device and loaded gives other outputs")


def check_arguments(subject: Subject) -> None:
    """Bad arguments raise ValueError or TypeError that name the argument and the value got."""
    block = subject.block()
    n = next((n for n in subject.lengths if n > 2), max(subject.lengths))
    x, others = subject.x(n), subject.others(n)
    mask = torch.ones(BATCH, n, dtype=torch.bool, device=subject.device)
    d = subject.dim
    wrong: list[tuple[str, str, Callable[[], object]]] = [
        ("x", str(d + 1), lambda: block(torch.cat((x, x[..., :1]), dim=-1), **others)),
        ("x", "int64", lambda: block(x.long(), **others)),
        ("x", str(tuple(x[0, ..., 0, :].shape)), lambda: block(x[0, ..., 0, :], **others)),
        ("x", "0", lambda: block(x[..., :0, :], **others)),
        ("mask", "float32", lambda: block(x, mask=mask.float(), **others)),
        ("mask", str(n + 1), lambda: block(x, mask=torch.cat((mask, mask[:, :1]), dim=1), **others)),
    ]
    if subject.causal and callable(getattr(block, "step", None)):
        _, state = subject.step(block, x, 0, n, None, others=others)
        wrong.append(("state", str(BATCH), lambda: subject.step(block, x[:1], 0, 1, state)))
        wrong.append(("state", "str", lambda: subject.step(block, x, 0, 1, "state")))
    for name, value, call in wrong:
        _refuses(call, name, value)


def _refuses(call: Callable[[], object], name: str, value: str) -> None:
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
        named = re.search(rf"\b{name}\b", message)
        expect(named and value in message, f"the error must name {name} and the value {value}, but reads: {message}")
    except Exception as error:
        raise AssertionError(
            f"a bad {name} ({value}) must raise ValueError or TypeError, but raised {type(error).__name__}: {error}"
        ) from error
    else:
        raise AssertionError(f"a bad {name} ({value}) must raise ValueError or TypeError, but nothing was raised")


def check_map(subject: Subject) -> None:
    """attention_map is exactly 0 for the future and for masked keys, and sums the values to the op's output."""
    block = subject.block()
    if not callable(getattr(block, "attention_map", None)):
        raise NotApplicable("the block has no attention_map")
    for n in subject.lengths:
        others = subject.others(n)
        for name, mask in subject.masks(n).items():
            extra = dict(others) if mask is None else {**others, "mask": mask}
            with torch.no_grad():
                weights = block.attention_map(subject.x(n), **extra)  # type: ignore[operator]
            expect(weights.isfinite().all(), f"the attention map is not finite (n={n}, {name})")
            expect(weights.shape[-2] == n, f"the attention map is {tuple(weights.shape)}, not (b, h, i, j) (n={n})")
            _hides(subject, weights, mask, others, f"n={n}, {name}")
            _reproduces(subject, block, weights, n, extra, name)


def _hides(subject: Subject, weights: Tensor, mask: Tensor | None, others: dict[str, Tensor], where: str) -> None:
    i, j = weights.shape[-2:]
    keys = others.get("context_mask") if "context" in others else mask
    if subject.causal and "context" not in others:
        later = torch.ones(i, j, dtype=torch.bool, device=weights.device).triu(1)
        size = float(weights.masked_fill(~later, 0).abs().max())
        expect(size == 0, f"the attention map gives the future a weight of {size:.2g} ({where})")
    if keys is not None:
        shape = (keys.shape[0], *(1,) * (weights.ndim - 2), j)
        size = float(weights.masked_fill(keys.view(shape), 0).abs().max())
        expect(size == 0, f"the attention map gives masked keys a weight of {size:.2g} ({where})")


def _reproduces(
    subject: Subject, block: nn.Module, weights: Tensor, n: int, extra: dict[str, Tensor], name: str
) -> None:
    if not callable(getattr(block, "mix", None)):
        return
    with torch.no_grad():
        values, mixed = block.values_and_output(subject.x(n), **extra)  # type: ignore[operator]
    expect_close(
        weights.to(values.dtype) @ values,
        mixed,
        FLOAT32_ERROR,
        f"the map times the values differs from the op (n={n}, {name})",
    )
