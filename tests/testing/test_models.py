"""The contract checks of models: correct models pass, and each defect is detected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor, nn

from attention_zoo import BLOCKS, LanguageModel, MemoryLanguageModel, MultiStreamTransformer, capabilities
from attention_zoo.testing import MODEL_CHECKS, check_model
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE, NOTE, PASSED
from tests.testing.broken_models import BROKEN_MODELS
from tests.testing.gpt import GPT, NUM_TOKENS

LENGTHS = (1, 7, 33)
SIZES: dict[str, Any] = {"num_tokens": NUM_TOKENS, "dim": 16, "depth": 1}
HEADS: dict[str, Any] = {"heads": 2, "dim_head": 8}
OTHERS = [name for name, can in capabilities().items() if can.image or can.context]

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: LanguageModel(**SIZES, attention=name) for name in BLOCKS if name not in OTHERS},
    "window": lambda: LanguageModel(
        **SIZES, **HEADS, attention=("window", {"window": 5, "sinks": 2, "qk_norm": "rms"})
    ),
    "learned positions": lambda: LanguageModel(**SIZES, **HEADS, positions="learned", max_seq_len=20),
    "relative bias, tied embeddings": lambda: LanguageModel(**SIZES, **HEADS, positions="t5", tie_embeddings=True),
    "dropout": lambda: LanguageModel(**SIZES, **HEADS, attn_dropout=0.2, ff_dropout=0.2),
    "streams": lambda: MultiStreamTransformer(**SIZES, **HEADS, max_seq_len=40),
    "memory": lambda: MemoryLanguageModel(**SIZES, **HEADS, memory_slots=2, segment_len=9, memory_heads=2),
    "memory: paper": lambda: MemoryLanguageModel(
        **SIZES, **HEADS, memory_slots=2, segment_len=9, memory_heads=2, memory_update="paper"
    ),
}


def model_and_check(name: str, check: str) -> ParameterSet:
    """One model runs every check but compile by default, and the others among the slow tests."""
    slow = check == "compile" or (name != "learned positions" and check not in ("generation", "saving"))
    return pytest.param(name, check, id=f"{name}-{check}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), [model_and_check(name, check) for name in MODELS for check in MODEL_CHECKS])
def test_models_of_the_library_pass_every_check(name: str, check: str) -> None:
    (outcome,) = check_model(
        MODELS[name], num_tokens=NUM_TOKENS, lengths=LENGTHS, effort="quick", checks=[check]
    ).outcomes
    if name.startswith("memory") and check == "packed documents":
        assert (outcome.status, outcome.message) == (NOT_APPLICABLE, "forward has no argument document_ids")
    else:
        assert outcome.status == PASSED, outcome.message


@pytest.mark.parametrize("check", MODEL_CHECKS)
def test_a_plain_gpt_passes_and_the_report_says_what_does_not_apply(check: str) -> None:
    (outcome,) = check_model(GPT, num_tokens=NUM_TOKENS, lengths=LENGTHS, effort="quick", checks=[check]).outcomes
    if check == "packed documents":
        assert (outcome.status, outcome.message) == (NOT_APPLICABLE, "forward has no argument document_ids")
    elif check in ("steps", "generation"):
        assert (outcome.status, outcome.message) == (NOT_APPLICABLE, "the model has no step")
    else:
        assert outcome.status == (NOTE if check == "arguments" else PASSED), outcome.message


def test_argument_validation_of_a_users_model_fails_only_if_strict() -> None:
    report = check_model(GPT, num_tokens=NUM_TOKENS, lengths=(7,), strict=True, checks=["arguments"])
    assert report["arguments"].status == FAILED
    assert "tokens (float32) must raise ValueError or TypeError" in report["arguments"].message


@pytest.mark.parametrize(("model", "check"), BROKEN_MODELS, ids=lambda value: getattr(value, "__name__", value))
def test_each_defect_of_a_model_fails_its_check(model: type[nn.Module], check: str) -> None:
    report = check_model(model, num_tokens=NUM_TOKENS, lengths=(1, 7), strict=True, checks=[check])
    assert report[check].status == FAILED
    assert "\n" not in report[check].message
    assert report[check].message


def test_every_check_of_models_has_a_defect_that_it_detects() -> None:
    assert {check for _, check in BROKEN_MODELS} | {"packed documents"} == set(MODEL_CHECKS)


class WithoutMask(nn.Module):
    """A recurrent model whose forward takes tokens only and returns logits and the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 8)
        self.rnn = nn.GRU(8, NUM_TOKENS, batch_first=True)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(self.embedding(tokens))


def test_a_model_without_mask_passes_and_its_padding_is_not_applicable() -> None:
    names = ["shapes", "causality", "rows", "padding", "loss", "half precision", "saving"]
    report = check_model(WithoutMask, num_tokens=NUM_TOKENS, lengths=(1, 7), checks=names)
    report.raise_for_failures()
    assert report["padding"].message == "forward has no argument mask"
    assert report["loss"].message == "the model has no loss"
    assert report["causality"].status == PASSED


def test_a_bidirectional_model_is_checked_with_causal_false() -> None:
    def make() -> nn.Module:
        return MultiStreamTransformer(**SIZES, **HEADS, max_seq_len=40, causal=False)

    names = ["shapes", "causality", "rows", "padding", "steps", "generation", "loss"]
    report = check_model(make, num_tokens=NUM_TOKENS, causal=False, lengths=(7,), checks=names)
    report.raise_for_failures()
    assert {o.check for o in report.outcomes if o.status == NOT_APPLICABLE} == {
        "causality", "steps", "generation", "loss",
    }  # fmt: skip
    assert "causal=False" in check_model(make, num_tokens=NUM_TOKENS, checks=["shapes"])["shapes"].message


@pytest.mark.slow
def test_the_checks_leave_the_callers_model_as_it_is() -> None:
    model = LanguageModel(**SIZES, **HEADS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name in MODEL_CHECKS if name != "compile"]
    check_model(lambda: model, num_tokens=NUM_TOKENS, lengths=(1, 7), checks=names).raise_for_failures()
    assert model.training
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_an_unknown_check_of_models_raises_an_error_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"checks must be one of .*'generation'.*got checks='speed'"):
        check_model(GPT, num_tokens=NUM_TOKENS, checks=["speed"])
