"""The contract kit catches what it is there to catch, each error by the right check, and says so in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import FullAttention
from attention_zoo.testing import CHECKS, Subject, check_block, check_causality, run_check
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE, PASSED
from tests.cases import DIM
from tests.testing.broken import BROKEN, Base

LENGTHS = (1, 2, 7, 67)

# What a broken block may break besides: an error of one kind often shows in a second check as well.
SOUND = {
    "LeaksInTheGradient": {"shapes", "rows", "saving"},
    "CacheOffByOne": {"shapes", "causality", "rows", "padding", "empty rows", "fast path", "compile", "saving", "map"},
    "ChangesAnOldState": {"shapes", "causality", "rows", "padding", "empty rows", "fast path", "compile", "saving"},
    "MapOfSomethingElse": {"shapes", "causality", "rows", "padding", "empty rows", "steps", "fast path", "saving"},
    "MixesBatchRows": {"shapes", "fast path", "saving", "compile"},
}


@pytest.mark.parametrize(("block", "check"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_block_is_caught_by_the_right_check(block: type[nn.Module], check: str) -> None:
    outcome = run_check(check, Subject(block, dim=DIM, causal=True, lengths=LENGTHS))
    assert outcome.status == FAILED
    assert "\n" not in outcome.message
    assert outcome.message


@pytest.mark.parametrize("name", SOUND)
def test_a_broken_block_passes_the_checks_that_are_about_something_else(name: str) -> None:
    block = next(block for block, _ in BROKEN if block.__name__ == name)
    subject = Subject(block, dim=DIM, causal=True, lengths=(7, 67))
    assert {check for check in SOUND[name] if run_check(check, subject).status == PASSED} == SOUND[name]


def test_every_check_has_a_broken_block_that_it_catches() -> None:
    assert {check for _, check in BROKEN} == set(CHECKS)


def test_the_sound_block_behind_the_broken_ones_passes() -> None:
    report = check_block(Base, dim=DIM, causal=True, lengths=LENGTHS)
    report.raise_for_failures()
    assert {outcome.status for outcome in report.outcomes} == {PASSED}


class Averages(nn.Module):
    """A stranger's block: the mean of all tokens so far, with no op of this library and neither step nor map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[-1] != self.to_out.in_features:
            raise ValueError(f"x must be (b, n, {self.to_out.in_features}), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating, got {x.dtype}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask must be {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        total = torch.where(real > 0, x, torch.zeros_like(x)).float().cumsum(1)
        return self.to_out((total / real.float().cumsum(1).clamp(min=1)).to(x.dtype))


def test_a_strangers_module_is_checked_and_what_does_not_apply_is_not_called_passed() -> None:
    report = check_block(lambda: Averages(DIM), dim=DIM, causal=True, lengths=LENGTHS, checks=[
        "shapes", "causality", "rows", "padding", "empty rows", "steps", "fast path", "arguments", "map", "compile",
    ])  # fmt: skip
    report.raise_for_failures()
    assert {o.check for o in report.outcomes if o.status == NOT_APPLICABLE} == {"steps", "fast path", "map"}
    assert report["steps"].message == "the block has no step"
    assert "reference=" in report["fast path"].message


def test_a_slow_twin_makes_the_fast_path_check_apply() -> None:
    subject = Subject(lambda: Averages(DIM), dim=DIM, causal=True, lengths=LENGTHS, reference=lambda: Averages(DIM))
    assert run_check("fast path", subject).status == PASSED


def test_the_report_names_the_check_the_place_and_the_size_of_a_failure() -> None:
    leak = next(block for block, _ in BROKEN if block.__name__ == "LeaksOneToken")
    report = check_block(leak, dim=DIM, causal=True, lengths=(7,), checks=["shapes", "causality"])
    with pytest.raises(AssertionError, match=r"causality: failed: output \d+ .* later token \d+ \(n=7"):
        report.raise_for_failures()
    assert [outcome.check for outcome in report.failed] == ["causality"]
    assert str(report).splitlines()[0] == "shapes: passed"


def test_each_check_is_a_function_that_raises_assertion_error_by_itself() -> None:
    leak = next(block for block, _ in BROKEN if block.__name__ == "LeaksOneToken")
    with pytest.raises(AssertionError, match="later token"):
        check_causality(Subject(leak, dim=DIM, causal=True, lengths=(7,)))


def test_a_block_that_says_it_is_bidirectional_fails_where_causal_is_expected() -> None:
    subject = Subject(lambda: FullAttention(DIM, causal=False), dim=DIM, causal=True, lengths=(7,))
    assert "causal=False" in run_check("shapes", subject).message


def test_the_kit_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(11)
    check_block(Base, dim=DIM, causal=True, lengths=(7,), checks=["shapes", "steps", "padding"])
    after = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(3))


def test_an_unknown_check_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"checks must be among .*got 'speed'"):
        check_block(Base, dim=DIM, causal=True, checks=["speed"])
