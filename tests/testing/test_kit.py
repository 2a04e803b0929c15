"""Each contract check detects the defects it is for, and correct layers pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import FullAttention
from attention_zoo.testing import CHECKS, Subject, check_block, check_causality, run_check
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE, NOTE, PASSED
from tests.cases import DIM
from tests.testing.broken import BROKEN, Base
from tests.testing.broken_more import BROKEN_LONG, BROKEN_MORE, MapOfRightWeights, Wrapped
from tests.testing.plain import PLAIN, Incomplete, InFloat32, MultiHead, TokenWise

LENGTHS = (1, 2, 7, 67)

# Checks that a broken block still passes.
SOUND = {
    "LeaksInTheGradient": {"shapes", "rows", "saving"},
    "CacheOffByOne": {"shapes", "causality", "rows", "padding", "empty rows", "fast path", "compile", "saving", "map"},
    "ChangesAnOldState": {"shapes", "causality", "rows", "padding", "empty rows", "fast path", "compile", "saving"},
    "MapOfSomethingElse": {"shapes", "causality", "rows", "padding", "empty rows", "steps", "fast path", "saving"},
    "MixesBatchRows": {"shapes", "fast path", "saving", "compile"},
}


@pytest.mark.parametrize(("block", "check"), BROKEN + BROKEN_MORE, ids=lambda value: getattr(value, "__name__", value))
def test_each_defect_fails_its_check_with_a_message_of_one_line(block: type[nn.Module], check: str) -> None:
    outcome = run_check(check, Subject(block, dim=DIM, causal=True, lengths=LENGTHS, strict=True))
    assert outcome.status == FAILED
    assert "\n" not in outcome.message
    assert outcome.message


@pytest.mark.slow
@pytest.mark.parametrize(("block", "check"), BROKEN_LONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_defect_of_long_sequences_is_found_with_the_default_lengths_only(block: type[nn.Module], check: str) -> None:
    report = check_block(block, dim=DIM, causal=True, lengths=LENGTHS, strict=True, checks=[check])
    assert report[check].status == PASSED
    assert check_block(block, dim=DIM, causal=True, effort="quick", checks=[check])[check].status == PASSED
    assert check_block(block, dim=DIM, causal=True, checks=[check])[check].status == FAILED


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_a_defect_does_not_fail_unrelated_checks(name: str) -> None:
    block = next(block for block, _ in BROKEN if block.__name__ == name)
    subject = Subject(block, dim=DIM, causal=True, lengths=(7, 67))
    assert {check for check in SOUND[name] if run_check(check, subject).status == PASSED} == SOUND[name]


def test_every_check_has_a_defect_that_it_detects() -> None:
    assert {check for _, check in BROKEN + BROKEN_MORE} | {"packed documents"} == set(CHECKS)


def test_the_layer_without_defects_passes_every_check() -> None:
    report = check_block(Base, dim=DIM, causal=True, lengths=LENGTHS, effort="quick")
    report.raise_for_failures()
    # what masked tokens of 1e30 do to gradients is a note, because the class is none of the library's
    assert {outcome.check for outcome in report.outcomes if outcome.status != PASSED} <= {"not finite"}


@pytest.mark.parametrize("check", [check for check in CHECKS if check != "compile"])
@pytest.mark.parametrize("block", [Wrapped, MapOfRightWeights])
def test_a_layer_around_a_correct_one_passes_every_check(block: type[nn.Module], check: str) -> None:
    assert run_check(check, Subject(block, dim=DIM, causal=True, lengths=LENGTHS)).status != FAILED


@pytest.mark.slow
@pytest.mark.parametrize("check", [check for check in CHECKS if check != "compile"])
@pytest.mark.parametrize("block", PLAIN)
def test_modules_of_torch_as_users_wrap_them_do_not_fail(block: type[nn.Module], check: str) -> None:
    outcome = run_check(check, Subject(block, dim=DIM, causal=True, lengths=LENGTHS, effort="quick"))
    assert outcome.status != FAILED, outcome.message


@pytest.mark.slow
@pytest.mark.parametrize("block", PLAIN)
def test_modules_of_torch_as_users_wrap_them_do_not_fail_with_the_default_effort(block: type[nn.Module]) -> None:
    check_block(block, dim=DIM, causal=True).raise_for_failures()


@pytest.mark.parametrize(
    ("block", "check", "status", "message"),
    [
        (MultiHead, "empty rows", NOTE, "a row without valid tokens has a gradient of"),
        (MultiHead, "arguments", NOTE, "an invalid x (33) must raise ValueError or TypeError, got AssertionError"),
        (TokenWise, "empty rows", NOT_APPLICABLE, "the block is token-wise"),
        (InFloat32, "derivatives", NOTE, "the block computes in less than float64 inside"),
        (Incomplete, "steps", NOT_APPLICABLE, "the block has no step"),
        (Incomplete, "map", NOT_APPLICABLE, "the block has no attention_map"),
    ],
)
def test_what_does_not_fail_is_explained(block: type[nn.Module], check: str, status: str, message: str) -> None:
    outcome = run_check(check, Subject(block, dim=DIM, causal=True, lengths=LENGTHS))
    assert outcome.status == status
    assert message in outcome.message


@pytest.mark.parametrize("strict", [None, True])
def test_what_is_a_note_for_a_users_class_fails_if_strict(strict: bool | None) -> None:
    outcome = run_check("arguments", Subject(MultiHead, dim=DIM, causal=True, lengths=(7,), strict=strict))
    assert outcome.status == (FAILED if strict else NOTE)


class Averages(nn.Module):
    """The mean of all tokens so far: a module without operations of this library, step or attention_map."""

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
        valid = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        total = torch.where(valid > 0, x, torch.zeros_like(x)).float().cumsum(1)
        return self.to_out((total / valid.float().cumsum(1).clamp(min=1)).to(x.dtype))


def test_a_user_module_is_checked_and_missing_methods_are_reported_as_not_applicable() -> None:
    report = check_block(lambda: Averages(DIM), dim=DIM, causal=True, lengths=LENGTHS, checks=[
        "shapes", "causality", "rows", "padding", "empty rows", "steps", "fast path", "arguments", "map", "compile",
    ])  # fmt: skip
    report.raise_for_failures()
    assert {o.check for o in report.outcomes if o.status == NOT_APPLICABLE} == {"steps", "fast path", "map"}
    assert report["steps"].message == "the block has no step"
    assert "reference=" in report["fast path"].message


def test_a_given_reference_makes_the_fast_path_check_applicable() -> None:
    subject = Subject(lambda: Averages(DIM), dim=DIM, causal=True, lengths=LENGTHS, reference=lambda: Averages(DIM))
    assert run_check("fast path", subject).status == PASSED


def test_the_report_names_the_check_the_position_and_the_size_of_a_failure() -> None:
    leak = next(block for block, _ in BROKEN if block.__name__ == "LeaksOneToken")
    report = check_block(leak, dim=DIM, causal=True, lengths=(7,), checks=["shapes", "causality"])
    with pytest.raises(AssertionError, match=r"causality: failed: output \d+ .* later token \d+ \(n=7"):
        report.raise_for_failures()
    assert [outcome.check for outcome in report.failed] == ["causality"]
    assert str(report).splitlines()[0] == "shapes: passed"


def test_a_check_called_directly_raises_assertion_error() -> None:
    leak = next(block for block, _ in BROKEN if block.__name__ == "LeaksOneToken")
    with pytest.raises(AssertionError, match="later token"):
        check_causality(Subject(leak, dim=DIM, causal=True, lengths=(7,)))


def test_a_bidirectional_block_fails_the_shapes_check_of_a_causal_one() -> None:
    subject = Subject(lambda: FullAttention(DIM, causal=False), dim=DIM, causal=True, lengths=(7,))
    assert "causal=False" in run_check("shapes", subject).message


def test_checks_do_not_change_the_random_state() -> None:
    torch.manual_seed(11)
    names = ["shapes", "steps", "padding", "training", "rows"]
    check_block(TokenWise, dim=DIM, causal=True, lengths=(7,), checks=names)
    after = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(3))


def test_checks_run_inside_no_grad_and_leave_the_callers_block_as_it_is() -> None:
    block = Base()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        names = ["causality", "padding", "derivatives", "half precision", "saving"]
        check_block(
            lambda: block, dim=DIM, causal=True, lengths=(7,), effort="quick", checks=names
        ).raise_for_failures()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_an_unknown_effort_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"effort must be one of .*got effort='fast'"):
        check_block(Base, dim=DIM, causal=True, effort="fast")


def test_an_unknown_check_raises_an_error_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"checks must be one of .*got checks='speed'"):
        check_block(Base, dim=DIM, causal=True, checks=["speed"])
