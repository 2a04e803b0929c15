"""Results of the contract checks: one outcome per check, and a report of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

PASSED = "passed"
FAILED = "failed"
NOT_APPLICABLE = "not applicable"
NOTE = "note"


class NotApplicable(Exception):
    """Raised by a check that does not apply to a block; the message is the reason."""


class Note(Exception):
    """Raised by a check whose finding is no failure; the message is the finding."""


@dataclass(frozen=True)
class Outcome:
    """The result of one check.

    Attributes:
        check: name of the check.
        status: "passed", "failed", "not applicable" or "note".
        message: what failed, where and by how much; why the check does not apply; or what it found that is no failure.
    """

    check: str
    status: str
    message: str = ""

    def __str__(self) -> str:
        return f"{self.check}: {self.status}" + (f": {self.message}" if self.message else "")


@dataclass
class Report:
    """The results of all checks on one block."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """The outcomes of the checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == FAILED]

    def __getitem__(self, check: str) -> Outcome:
        """The outcome of one check, by its name."""
        return next(outcome for outcome in self.outcomes if outcome.check == check)

    def raise_for_failures(self) -> None:
        """Raise if a check failed.

        Raises:
            AssertionError: a check failed; the message has one line per failure.
        """
        if self.failed:
            raise AssertionError("\n".join(str(outcome) for outcome in self.failed))

    def __str__(self) -> str:
        return "\n".join(str(outcome) for outcome in self.outcomes)
