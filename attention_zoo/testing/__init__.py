"""Contract checks: the checks that every attention layer of this library passes, for any nn.Module.

Example:
    >>> from attention_zoo.testing import check_block
    >>> report = check_block(lambda: MyAttention(64), dim=64, causal=True)
    >>> report.raise_for_failures()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from attention_zoo._checks import check_choice
from attention_zoo.testing.agreement import check_compile, check_derivatives, check_fast_path, check_half_precision
from attention_zoo.testing.basics import check_causality, check_rows, check_shapes
from attention_zoo.testing.decoding import check_steps
from attention_zoo.testing.lifecycle import check_arguments, check_map, check_saving
from attention_zoo.testing.padding import check_empty_rows, check_padding_ignored
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE, PASSED, NotApplicable, Outcome, Report
from attention_zoo.testing.subject import MakeInputs, Subject

CHECKS: dict[str, Callable[[Subject], None]] = {
    "shapes": check_shapes,
    "causality": check_causality,
    "rows": check_rows,
    "padding": check_padding_ignored,
    "empty rows": check_empty_rows,
    "steps": check_steps,
    "fast path": check_fast_path,
    "derivatives": check_derivatives,
    "half precision": check_half_precision,
    "compile": check_compile,
    "saving": check_saving,
    "arguments": check_arguments,
    "map": check_map,
}


def run_check(name: str, subject: Subject) -> Outcome:
    """Run one check of CHECKS on a block; an exception becomes the outcome."""
    try:
        CHECKS[name](subject)
    except NotApplicable as reason:
        return Outcome(name, NOT_APPLICABLE, str(reason))
    except AssertionError as failure:
        return Outcome(name, FAILED, str(failure))
    except Exception as error:  # a block that raises fails the check that called it
        first_line = str(error).strip().partition("\n")[0]
        return Outcome(name, FAILED, f"{type(error).__name__}: {first_line}")
    return Outcome(name, PASSED)


def check_block(
    make_block: Callable[[], nn.Module],
    *,
    dim: int,
    causal: bool,
    lengths: Sequence[int] = Subject.lengths,
    inputs: MakeInputs | None = None,
    reference: Callable[[], nn.Module] | None = None,
    checks: Sequence[str] | None = None,
    **options: Any,
) -> Report:
    """Run the contract checks on a block.

    A block is any nn.Module with `forward(x, *, mask=None)` and, if it decodes, `step(x, state=None, *, mask=None)`.

    Args:
        make_block: makes a new block for features of size `dim`.
        dim, causal, lengths, inputs, reference: see `Subject`.
        checks: names of CHECKS to run. None: all.
        options: other fields of `Subject`, for properties that a block does not have by design.

    Returns:
        A report with one outcome per check; see `Report.failed` and `Report.raise_for_failures`.

    Raises:
        ValueError: `checks` has a name that is not in CHECKS.
    """
    names = CHECKS if checks is None else checks
    for name in names:
        check_choice("checks", name, CHECKS)
    subject = Subject(make_block, dim, causal, lengths, inputs, reference, **options)
    return Report([run_check(name, subject) for name in names])


__all__ = [
    "CHECKS",
    "NotApplicable",
    "Outcome",
    "Report",
    "Subject",
    "check_arguments",
    "check_block",
    "check_causality",
    "check_compile",
    "check_derivatives",
    "check_empty_rows",
    "check_fast_path",
    "check_half_precision",
    "check_map",
    "check_padding_ignored",
    "check_rows",
    "check_saving",
    "check_shapes",
    "check_steps",
    "run_check",
]
