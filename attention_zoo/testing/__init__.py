"""Contract checks: what every attention layer and model of this library passes, for any nn.Module.

Example:
    >>> from attention_zoo.testing import check_block, check_model
    >>> check_block(lambda: MyAttention(64), dim=64, causal=True).raise_for_failures()
    >>> check_model(lambda: MyModel(num_tokens=256), num_tokens=256).raise_for_failures()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from attention_zoo._checks import check_choice
from attention_zoo.testing.agreement import check_compile, check_derivatives, check_fast_path, check_half_precision
from attention_zoo.testing.basics import check_causality, check_rows, check_shapes, check_training
from attention_zoo.testing.decoding import check_steps
from attention_zoo.testing.devices import check_synchronisation
from attention_zoo.testing.documents import check_documents, check_model_documents
from attention_zoo.testing.expect import one_line
from attention_zoo.testing.lifecycle import check_arguments, check_map, check_saving
from attention_zoo.testing.model import (
    ModelSubject,
    check_generation,
    check_logits,
    check_loss,
    check_model_arguments,
    check_model_saving,
    make_model_subject,
)
from attention_zoo.testing.padding import check_empty_rows, check_not_finite, check_padding_ignored
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE, NOTE, PASSED, NotApplicable, Note, Outcome, Report
from attention_zoo.testing.subject import MakeInputs, Subject, seeded

CHECKS: dict[str, Callable[[Subject], None]] = {
    "shapes": check_shapes,
    "causality": check_causality,
    "rows": check_rows,
    "padding": check_padding_ignored,
    "empty rows": check_empty_rows,
    "not finite": check_not_finite,
    "training": check_training,
    "steps": check_steps,
    "fast path": check_fast_path,
    "derivatives": check_derivatives,
    "half precision": check_half_precision,
    "compile": check_compile,
    "saving": check_saving,
    "arguments": check_arguments,
    "map": check_map,
    "packed documents": check_documents,
    "synchronisation": check_synchronisation,
}

MODEL_CHECKS: dict[str, Callable[[Any], None]] = {
    "shapes": check_logits,
    "causality": check_causality,
    "rows": check_rows,
    "padding": check_padding_ignored,
    "training": check_training,
    "steps": check_steps,
    "generation": check_generation,
    "loss": check_loss,
    "half precision": check_half_precision,
    "compile": check_compile,
    "saving": check_model_saving,
    "arguments": check_model_arguments,
    "packed documents": check_model_documents,
    "synchronisation": check_synchronisation,
}


def run_check(name: str, subject: Subject) -> Outcome:
    """Run one check on a block (of CHECKS) or on a model (of MODEL_CHECKS); an exception becomes the outcome."""
    checks = MODEL_CHECKS if isinstance(subject, ModelSubject) else CHECKS
    try:
        with torch.enable_grad(), seeded(0):  # neither the caller's gradient mode nor the random state matters
            checks[name](subject)
    except NotApplicable as reason:
        return Outcome(name, NOT_APPLICABLE, str(reason))
    except Note as note:
        return Outcome(name, NOTE, str(note))
    except AssertionError as failure:
        return Outcome(name, FAILED, one_line(failure))
    except Exception as error:  # a module that raises fails the check that called it
        return Outcome(name, FAILED, f"{type(error).__name__}: {one_line(error)}")
    return Outcome(name, PASSED)


def check_block(
    make_block: Callable[[], nn.Module],
    *,
    dim: int,
    causal: bool,
    lengths: Sequence[int] = (),
    effort: str = "full",
    strict: bool | None = None,
    inputs: MakeInputs | None = None,
    reference: Callable[[], nn.Module] | None = None,
    checks: Sequence[str] | None = None,
    **options: Any,
) -> Report:
    """Run the contract checks on a block.

    A block is any nn.Module with `forward(x, *, mask=None)` and, if it decodes, `step(x, state=None, *, mask=None)`.

    Args:
        make_block: makes a new block for features of size `dim`.
        dim, causal, lengths, inputs, reference: see `Subject`. Given lengths are not extended.
        effort: "quick" takes about a second for a small block on one core, "full" about ten.
        strict: whether unclear errors, NaN in masked tokens and other properties beyond a right result fail the
            checks of classes that are not of this library, too; otherwise they are notes.
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
    settings = {"effort": effort, "strict": strict, **options}
    subject = Subject(make_block, dim, causal, lengths, inputs, reference, **settings)
    return Report([run_check(name, subject) for name in names])


def check_model(
    make_model: Callable[[], nn.Module],
    *,
    num_tokens: int,
    causal: bool = True,
    lengths: Sequence[int] = (),
    effort: str = "full",
    strict: bool | None = None,
    checks: Sequence[str] | None = None,
    **options: Any,
) -> Report:
    """Run the contract checks on a model.

    A model is any nn.Module whose `forward(tokens, *, mask=None)` returns logits (b, n, num_tokens), or an object with
    the field `logits`, for token ids (b, n). `mask` is optional. Where they are present, these are checked too:
    `step(tokens, state=None, *, mask=None)`, `loss(tokens, *, mask=None)`, and `save(folder)` with `load(folder)`.

    Args:
        make_model: makes a model, on the CPU, in float32. It may return the same model every time: the checks run on
            copies.
        num_tokens: size of the vocabulary.
        causal: whether the logits at a token depend on no later token.
        lengths: sequence lengths n to test, cut to the model's `max_seq_len` where it has one. Default: 1 ... 65.
        effort, strict: see `check_block`.
        checks: names of MODEL_CHECKS to run. None: all.
        options: other fields of `Subject`, for properties that a model does not have by design.

    Returns:
        A report with one outcome per check.

    Raises:
        ValueError: `checks` has a name that is not in MODEL_CHECKS.
    """
    names = MODEL_CHECKS if checks is None else checks
    for name in names:
        check_choice("checks", name, MODEL_CHECKS)
    subject = make_model_subject(
        make_model, num_tokens=num_tokens, causal=causal, lengths=lengths, effort=effort, strict=strict, **options
    )
    return Report([run_check(name, subject) for name in names])


__all__ = [
    "CHECKS",
    "MODEL_CHECKS",
    "ModelSubject",
    "NotApplicable",
    "Note",
    "Outcome",
    "Report",
    "Subject",
    "check_arguments",
    "check_block",
    "check_causality",
    "check_compile",
    "check_derivatives",
    "check_documents",
    "check_empty_rows",
    "check_fast_path",
    "check_half_precision",
    "check_map",
    "check_model",
    "check_padding_ignored",
    "check_rows",
    "check_saving",
    "check_shapes",
    "check_steps",
    "make_model_subject",
    "run_check",
]
