"""Losses that ignore padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import masked_cross_entropy, next_token_loss
from tests.formulas import relative_error


def negative_log_likelihood(logits: Tensor, target: int) -> Tensor:
    """-log softmax(logits)[target], from the definition."""
    powers = torch.exp(logits.double())
    return -torch.log(powers[target] / powers.sum())


def mean_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    chosen = mask.nonzero().tolist()
    return torch.stack([negative_log_likelihood(logits[row, n], int(targets[row, n])) for row, n in chosen]).mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_masked_cross_entropy_and_its_gradient_equal_the_definition(dtype: torch.dtype, masked: bool) -> None:
    logits = torch.randn(3, 7, 11).to(dtype).requires_grad_()
    targets = torch.randint(11, (3, 7))
    mask = torch.rand(3, 7) < 0.6 if masked else None
    loss = masked_cross_entropy(logits, targets, mask)
    (grad,) = torch.autograd.grad(loss, logits)
    want = mean_loss(logits, targets, torch.ones(3, 7, dtype=torch.bool) if mask is None else mask)
    (want_grad,) = torch.autograd.grad(want, logits)
    half = dtype in (torch.float16, torch.bfloat16)
    assert loss.dtype == (torch.float32 if half else dtype)
    assert relative_error(loss, want) < (1e-12 if dtype == torch.float64 else 1e-6)
    # only the gradient is rounded to the dtype of the logits
    assert relative_error(grad, want_grad) < {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)


@pytest.mark.parametrize("content", [1e30, math.inf, math.nan])
def test_logits_of_masked_positions_never_change_the_loss(content: float) -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    changed = logits.masked_fill(~mask[..., None], content)
    assert torch.equal(masked_cross_entropy(changed, targets, mask), masked_cross_entropy(logits, targets, mask))


def test_the_loss_without_valid_positions_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.randint(7, (2, 5)), torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_target_counts_if_it_and_the_token_before_it_are_valid() -> None:
    tokens = torch.randint(7, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()
    logits = torch.randn(3, 5, 7)
    pairs = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]).bool()
    want = mean_loss(logits, tokens[:, 1:], pairs)
    assert relative_error(next_token_loss(logits, tokens, mask), want) < 1e-6


def test_token_ids_may_be_int32() -> None:
    logits, tokens = torch.randn(2, 4, 7), torch.randint(7, (2, 5))
    assert torch.equal(next_token_loss(logits, tokens.int()), next_token_loss(logits, tokens))


def test_the_loss_compiles_as_one_graph() -> None:
    logits, tokens, mask = torch.randn(2, 4, 7), torch.randint(7, (2, 5)), torch.rand(2, 5) < 0.8
    compiled = torch.compile(next_token_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, tokens, mask), next_token_loss(logits, tokens, mask))


def test_autocast_does_not_change_the_loss() -> None:
    logits, tokens = torch.randn(2, 4, 7), torch.randint(7, (2, 5))
    want = next_token_loss(logits, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(next_token_loss(logits, tokens), want)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_without_targets_is_0_with_gradient_0(rows: int, masked: bool) -> None:
    length = 4 if masked else 4 * (rows == 0)
    logits = torch.randn(rows, length, 7, requires_grad=True)
    mask = torch.zeros(rows, length, dtype=torch.bool) if masked else None
    loss = masked_cross_entropy(logits, torch.zeros(rows, length, dtype=torch.int64), mask)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
