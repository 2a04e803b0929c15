"""Every layer in tests/cases.py passes every contract check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from attention_zoo import BLOCKS
from attention_zoo.testing import CHECKS, run_check
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE
from tests.cases import CASES, DIM, Case

# The only reasons for which a check may not apply to a layer of this library.
REASONS = ("the block is not causal", "the block refuses document_ids: ")


def runs() -> Iterator[ParameterSet]:
    """Every check of every row at all lengths among the slow tests; by default one row per block at half of them."""
    for case in CASES:
        for check in CHECKS:
            yield pytest.param(case, check, case.lengths, id=f"{case.name}-{check}-all", marks=pytest.mark.slow)
            if ":" not in case.name and check != "compile":
                yield pytest.param(case, check, case.lengths[::2], id=f"{case.name}-{check}")


@pytest.mark.parametrize(("case", "check", "lengths"), runs())
def test_every_case_passes_every_check(case: Case, check: str, lengths: Sequence[int]) -> None:
    outcome = run_check(check, case.subject(strict=True, effort="quick", lengths=lengths))
    assert outcome.status != FAILED, outcome.message
    if outcome.status == NOT_APPLICABLE:
        assert outcome.message.startswith(REASONS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_empty_batch_runs_forward_backward_and_step(case: Case) -> None:
    """A filter or the last shard of a data set may leave a batch without rows."""
    block, subject = case.make(), case.subject()
    streams = getattr(block, "streams", 1)
    shape = (0, 7, DIM) if streams == 1 else (0, streams, 7, DIM)
    others = {} if subject.inputs is None else subject.inputs(0, 7)
    x = torch.randn(shape, requires_grad=True)
    for mask in (None, torch.ones(0, 7, dtype=torch.bool)):
        out = block(x, mask=mask, **others)
        assert out.shape == x.shape
        out.sum().backward()
    if case.causal:
        with torch.no_grad():
            first, state = block.step(x[..., :3, :], **others)
            second, _ = block.step(x[..., 3:, :], state)
        assert torch.cat((first, second), dim=-2).shape == x.shape


def test_every_registered_block_has_a_case() -> None:
    assert {case.name.partition(":")[0] for case in CASES} == set(BLOCKS)
