"""Packed documents: what a block or model computes for a document of a row is what it computes for it alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.testing.expect import (
    FLOAT32_ERROR,
    GRADIENT_ERROR,
    expect,
    expect_close,
    expect_gradients_close,
    expect_zero,
    gradients,
)
from attention_zoo.testing.report import NotApplicable
from attention_zoo.testing.subject import BATCH, Subject

# Lengths of documents, repeated until a row is full; they cross usual tile sizes.
LENGTHS = ((5, 1, 17, 9, 40, 3), (64, 1, 66), (1,))
IDS = (3, -2, 3, 7, 0, 7, 2**40)  # an id that comes again is another document


def check_documents(subject: Subject) -> None:
    """Packed documents equal separate ones in outputs and gradients, and no gradient crosses a document."""
    block = subject.block()
    takes_documents(subject, block)
    lengths = [n for n in subject.sampled_lengths if n > 2] or [max(subject.lengths)]
    for n in lengths:
        ids, parts = pack(n, subject.device)
        for padding in subject.paddings(n).values():
            _check_equal(subject, block, padding, ids, parts, torch.float32)
        _check_nothing_crosses(subject, block, ids, parts)
    n = lengths[0]
    ids, parts = pack(n, subject.device)
    wide = subject.block(dtype=torch.float64)
    for padding in subject.paddings(n, dtype=torch.float64).values():
        _check_equal(subject, wide, padding, ids, parts, torch.float64)


def takes_documents(subject: Subject, block: nn.Module) -> None:
    """Raise NotApplicable if the block has no argument `document_ids`, or refuses it by name."""
    module: Any = block.model if subject.takes_tokens else block
    if "document_ids" not in inspect.signature(module.forward).parameters:
        raise NotApplicable("forward has no argument document_ids")
    x = subject.x(1)
    ids = torch.zeros(x.shape[0], 1, dtype=torch.long, device=subject.device)
    try:
        with torch.no_grad():
            block(x, document_ids=ids, **subject.others(1))
    except (TypeError, ValueError) as error:
        if "document_ids" not in str(error):
            raise
        raise NotApplicable(f"the {subject.noun} refuses document_ids: {error}") from error


def pack(length: int, device: str) -> tuple[Tensor, list[tuple[int, slice]]]:
    """Document ids (BATCH, n) and the row and tokens of every document."""
    rows: list[list[int]] = []
    parts: list[tuple[int, slice]] = []
    for row in range(BATCH):
        lengths, start = LENGTHS[row % len(LENGTHS)], 0
        ids: list[int] = []
        while start < length:
            index = sum(part[0] == row for part in parts)
            stop = min(length, start + lengths[index % len(lengths)])
            ids += [IDS[index % len(IDS)]] * (stop - start)
            parts.append((row, slice(start, stop)))
            start = stop
        rows.append(ids)
    return torch.tensor(rows, device=device), parts


def _check_equal(
    subject: Subject, block: Any, padding: Any, ids: Tensor, parts: list[tuple[int, slice]], dtype: torch.dtype
) -> None:
    n = ids.shape[1]
    x = subject.x(n, dtype=dtype).requires_grad_()
    weight = subject.weight(n, dtype=dtype)
    if padding.mask is not None:
        weight = padding.replace_masked(weight, 0.0)
    packed = block(x, document_ids=ids, **padding.extra)
    separate = torch.zeros_like(packed)
    for row, part in parts:
        extra = {name: value[row : row + 1] for name, value in padding.others.items()}
        if padding.mask is not None:
            extra["mask"] = padding.mask[row : row + 1, part]
        separate[row, ..., part, :] = block(x[row : row + 1, ..., part, :], **extra)[0]
    limit = FLOAT32_ERROR if dtype == torch.float32 else 1e-10
    kept = (weight != 0).any(-1, keepdim=True)
    what = f"packed documents differ from separate ones ({padding.where}, {dtype})"
    expect_close(packed * kept, separate * kept, limit, what)
    leaf = None if subject.takes_tokens else x  # the gradient to the ids of tokens is not exact for single tokens
    got, want = (gradients(block, (out * weight).sum(), leaf) for out in (packed, separate))
    limit = GRADIENT_ERROR if dtype == torch.float32 else 1e-8
    what = f"the gradient of packed documents to {{}} differs from that of separate ones ({padding.where}, {dtype})"
    expect_gradients_close(got, want, limit, what)


def _check_nothing_crosses(subject: Subject, block: nn.Module, ids: Tensor, parts: list[tuple[int, slice]]) -> None:
    n = ids.shape[1]
    x = subject.x(n)
    others = subject.others(n)
    for row, part in _sampled(parts, 4 if subject.thorough else 2):
        inputs = x.clone().requires_grad_()
        out = block(inputs, document_ids=ids, **others)[row, ..., part, :]
        gradient = torch.autograd.grad(out.square().sum() + out.sum(), inputs, materialize_grads=True)[0].clone()
        gradient[row, ..., part, :] = 0
        where = f"tokens {part.start} ... {part.stop - 1} of row {row} of {n}"
        expect_zero(gradient, f"{where} have a gradient of {{}} to another document")
        changed = subject.other(n)
        changed[row, ..., part, :] = x[row, ..., part, :]
        with torch.no_grad():
            after = block(changed, document_ids=ids, **others)[row, ..., part, :]
        expect_close(after, out, FLOAT32_ERROR, f"{where} change with other documents")


def _sampled(parts: list[tuple[int, slice]], count: int) -> Iterator[tuple[int, slice]]:
    """A few documents, evenly spaced over all."""
    step = max(1, len(parts) // count)
    yield from parts[::step]


def check_model_documents(subject: Any) -> None:
    """As `check_documents`, and the loss is the mean over the next tokens of the same document."""
    check_documents(subject)
    model: Any = subject.block().model
    loss = getattr(model, "loss", None)
    if not callable(loss) or "document_ids" not in inspect.signature(loss).parameters:
        return
    n = max(subject.sampled_lengths)
    if n < 2:
        return
    ids, parts = pack(n, subject.device)
    tokens = subject.tokens(n)
    from attention_zoo.testing.model import logits_of  # which imports this package's checks

    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for row, part in parts:
            targets = tokens[row : row + 1, part][:, 1:]
            if targets.numel():
                log_p = logits_of(model(tokens[row : row + 1, part][:, :-1])).double().log_softmax(-1)
                total = total - log_p.gather(-1, targets[..., None]).sum().cpu()
                count += targets.numel()
    got = loss(tokens, document_ids=ids).detach().cpu()
    expect(bool(got.isfinite()), f"the loss of packed documents is {got} (n={n})")
    what = f"the loss differs from the mean over the next tokens of separate documents (n={n})"
    expect_close(got.double(), total / max(count, 1), FLOAT32_ERROR, what)
