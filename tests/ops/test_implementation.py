"""The choice of the implementation and the `reference()` context."""

from __future__ import annotations

import pytest
import torch

import attention_zoo
from attention_zoo.ops import cosine_sim_attention, softmax_attention
from attention_zoo.ops.implementation import choose


def test_the_callers_choice_is_kept_outside_the_context() -> None:
    assert choose("auto", ("sdpa",)) == "auto"
    assert choose("sdpa", ("sdpa",)) == "sdpa"


def test_every_choice_becomes_the_reference_inside_the_context() -> None:
    with attention_zoo.reference():
        assert choose("auto", ("sdpa",)) == "reference"
        assert choose("sdpa", ("sdpa",)) == "reference"


def test_the_outer_context_stays_active_when_a_nested_one_ends() -> None:
    with attention_zoo.reference():
        with attention_zoo.reference():
            pass
        assert choose("auto", ()) == "reference"
    assert choose("auto", ()) == "auto"


def test_an_exception_ends_the_context() -> None:
    with pytest.raises(KeyError), attention_zoo.reference():
        raise KeyError
    assert choose("auto", ()) == "auto"


@pytest.mark.parametrize("inside", [False, True])
def test_an_unknown_implementation_raises_inside_and_outside_the_context(inside: bool) -> None:
    q = torch.randn(1, 1, 3, 4)
    context = attention_zoo.reference() if inside else torch.enable_grad()
    with context, pytest.raises(ValueError, match=r"impl must be one of .*'sdpa'.*got impl='flash'"):
        softmax_attention(q, q, q, impl="flash")


@pytest.mark.parametrize("op", [softmax_attention, cosine_sim_attention])
def test_operations_run_their_reference_inside_the_context(op, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a fused kernel ran")

    q = torch.randn(1, 2, 3, 4)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", forbidden)
    with pytest.raises(AssertionError, match="a fused kernel ran"):
        op(q, q, q)
    with attention_zoo.reference():
        assert op(q, q, q).shape == q.shape
