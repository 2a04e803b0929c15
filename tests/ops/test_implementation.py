"""Which implementation runs, and the context that forces the reference."""

from __future__ import annotations

import pytest
import torch

import attention_zoo
from attention_zoo.ops import cosine_sim_attention, softmax_attention
from attention_zoo.ops.implementation import choose


def test_the_callers_choice_stands_outside_the_context() -> None:
    assert choose("auto", ("sdpa",)) == "auto"
    assert choose("sdpa", ("sdpa",)) == "sdpa"


def test_every_choice_becomes_the_reference_inside_the_context() -> None:
    with attention_zoo.reference():
        assert choose("auto", ("sdpa",)) == "reference"
        assert choose("sdpa", ("sdpa",)) == "reference"


def test_contexts_nest_and_the_outer_one_stays_in_force() -> None:
    with attention_zoo.reference():
        with attention_zoo.reference():
            pass
        assert choose("auto", ()) == "reference"
    assert choose("auto", ()) == "auto"


def test_an_exception_ends_the_context() -> None:
    with pytest.raises(KeyError), attention_zoo.reference():
        raise KeyError
    assert choose("auto", ()) == "auto"


@pytest.mark.parametrize("forced", [False, True])
def test_an_unknown_implementation_is_refused_everywhere(forced: bool) -> None:
    q = torch.randn(1, 1, 3, 4)
    context = attention_zoo.reference() if forced else torch.enable_grad()
    with context, pytest.raises(ValueError, match=r"impl must be one of .*'sdpa'.*got impl='flash'"):
        softmax_attention(q, q, q, impl="flash")


@pytest.mark.parametrize("op", [softmax_attention, cosine_sim_attention])
def test_ops_run_their_reference_inside_the_context(op, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a fused kernel ran")

    q = torch.randn(1, 2, 3, 4)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", forbidden)
    with pytest.raises(AssertionError, match="a fused kernel ran"):
        op(q, q, q)
    with attention_zoo.reference():
        assert op(q, q, q).shape == q.shape
