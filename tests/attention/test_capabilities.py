"""Capabilities agree with the contract checks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import BLOCKS, TextImageLayout, capabilities, reference
from attention_zoo.testing import Subject, run_check
from attention_zoo.testing.report import NOT_APPLICABLE, PASSED

DIM = 16
LAYOUT = TextImageLayout(text_len=30, height=7, width=5)
FOUND = capabilities()


def subject(name: str, *, causal: bool = True) -> Subject:
    cls = BLOCKS[name]
    takes = inspect.signature(cls).parameters
    options: dict[str, Any] = {"heads": 2, "dim_head": 8} if "dim_head" in takes else {}
    if FOUND[name].image:
        options["layout"] = LAYOUT
    if name == "window":
        options |= {"window": 9, "sinks": 2}
    if not causal:
        options |= {"reverse": True} if "reverse" in takes else {"causal": False}

    def context(batch: int, length: int) -> dict[str, Tensor]:
        return {"context": torch.randn(batch, 5, DIM)}

    return Subject(
        lambda: cls(DIM, **options),
        dim=DIM,
        causal=causal,
        lengths=(1, 2, 33),
        inputs=context if FOUND[name].context else None,
        shift_invariant=not FOUND[name].image,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("capability", "check"), [("mask", "padding"), ("step", "steps"), ("map", "map")])
def test_capabilities_agree_with_the_contract_checks(name: str, capability: str, check: str) -> None:
    expected = PASSED if getattr(FOUND[name], capability) else NOT_APPLICABLE
    assert run_check(check, subject(name)).status == expected


@pytest.mark.slow  # test_contract.py runs the compile check on every block
@pytest.mark.parametrize("name", BLOCKS)
def test_compile_capability_agrees_with_torch_compile(name: str) -> None:
    assert (run_check("compile", subject(name)).status == PASSED) == FOUND[name].compile


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_causal_unless_causal_is_optional_and_false(name: str) -> None:
    assert run_check("causality", subject(name)).status == PASSED
    if FOUND[name].causal == "optional":
        other = subject(name, causal=False)
        x = other.x(33).requires_grad_()
        out = other.block()(x)
        (gradient,) = torch.autograd.grad(out[:, 0].sum(), x)
        assert gradient[:, 1:].abs().max() > 0
    else:
        with pytest.raises((TypeError, ValueError)):
            subject(name, causal=False).block()


@pytest.mark.parametrize("name", BLOCKS)
def test_state_growth_agrees_with_capabilities(name: str) -> None:
    tested = subject(name)
    block, others = tested.block(), tested.others(60)
    with torch.no_grad():
        sizes = [block.step(tested.x(n), **others)[1].nbytes for n in (20, 40, 60)]  # type: ignore[operator]
    if FOUND[name].state == "1":
        assert sizes[0] == sizes[1] == sizes[2]
    else:
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_second_derivatives_agree_with_capabilities(name: str) -> None:
    tested = subject(name)
    block, x = tested.block(dtype=torch.float64), tested.x(33, dtype=torch.float64).requires_grad_()
    others = tested.others(33, dtype=torch.float64)

    def second() -> Tensor:
        (first,) = torch.autograd.grad(block(x, **others).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), x)
        return found

    with reference():
        want = second()
    if FOUND[name].double_backward:
        torch.testing.assert_close(second(), want, rtol=1e-7, atol=1e-9)
    else:
        with pytest.raises(RuntimeError):
            second()


def test_constructor_arguments_agree_with_capabilities() -> None:
    for name, found in FOUND.items():
        for argument in ("streams", "rotary", "bias", "kv_heads", "qk_norm", "dropout"):
            assert getattr(found, argument) == (argument in inspect.signature(BLOCKS[name]).parameters)


@pytest.mark.parametrize("name", BLOCKS)
def test_masks_of_pairs_and_documents_agree_with_capabilities(name: str) -> None:
    case = subject(name)
    block, x, others = case.block(), case.x(9), case.others(9)
    keys = others["context"].shape[1] if "context" in others else 9
    given = {"attn_mask": torch.ones(9, keys, dtype=torch.bool), "document_ids": torch.zeros(3, 9, dtype=torch.long)}
    ids = {"context_document_ids": torch.zeros(3, keys, dtype=torch.long)} if "context" in others else {}
    for argument, supported in (("attn_mask", FOUND[name].attn_mask), ("document_ids", FOUND[name].documents)):
        extra = {argument: given[argument], **others, **(ids if argument == "document_ids" else {})}
        if supported:
            torch.testing.assert_close(block(x, **extra), block(x, **others))
        else:
            with pytest.raises(ValueError, match=f"{argument} must be None for {type(block).__name__}"):
                block(x, **extra)
