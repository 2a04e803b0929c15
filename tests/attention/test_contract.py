"""Every block in every variant of the table keeps the whole contract."""

from __future__ import annotations

import pytest

from attention_zoo import BLOCKS
from attention_zoo.testing import CHECKS, run_check
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE
from tests.cases import CASES, Case

# The only reasons for which a check may stand aside, for blocks that are what they say.
REASONS = ("the block is not causal",)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_keeps_the_contract(case: Case, check: str) -> None:
    outcome = run_check(check, case.subject())
    assert outcome.status != FAILED, outcome.message
    if outcome.status == NOT_APPLICABLE:
        assert outcome.message in REASONS


def test_every_block_of_the_zoo_has_a_case() -> None:
    assert {case.name.partition(":")[0] for case in CASES} == set(BLOCKS)
