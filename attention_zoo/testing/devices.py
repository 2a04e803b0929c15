"""Devices: forward, backward and step do not wait for the values of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from attention_zoo.testing.expect import one_line
from attention_zoo.testing.subject import Subject


def check_synchronisation(subject: Subject) -> None:
    """forward, backward and step read no tensor values on the host, which would wait for the device.

    On the meta device, where tensors have no values; on a CUDA device under
    `torch.cuda.set_sync_debug_mode("error")`, in the second of two equal calls.
    """
    on_cuda = torch.device(subject.device).type == "cuda"
    there = subject if on_cuda else replace(subject, device="meta")
    block: Any = there.block()
    decodes = subject.has_step(subject.block())

    def run(n: int, mask: Any, others: dict[str, Any]) -> None:
        x = there.x(n).requires_grad_(not subject.takes_tokens)
        block(x, **others, **({} if mask is None else {"mask": mask})).sum().backward()
        if not decodes:
            return
        state = None
        for part in (slice(0, n // 2), slice(n // 2, n - 1), slice(n - 1, n)):
            if part.stop > part.start:
                given = {} if mask is None else {"mask": mask[:, part]}
                _, state = block.step(x.detach()[..., part, :], state, **(others if state is None else {}), **given)

    with subject.note_unless_strict(block):
        for n in subject.sampled_lengths:
            for padding in there.paddings(n).values():
                if on_cuda:
                    run(n, padding.mask, padding.others)  # tables that depend on the length are built once
                try:
                    with _errors_on_synchronisation(on_cuda):
                        run(n, padding.mask, padding.others)
                except Exception as error:
                    raise AssertionError(
                        f"forward, backward or step needs the values of tensors ({padding.where}): "
                        f"{type(error).__name__}: {one_line(error)}"
                    ) from error


@contextmanager
def _errors_on_synchronisation(on_cuda: bool) -> Iterator[None]:
    if not on_cuda:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
