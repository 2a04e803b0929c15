"""Token shift against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import CrossAttention, TextImageLayout
from attention_zoo.layers import TokenShift

LAYOUT = TextImageLayout(text_len=4, height=3, width=5)


def shifted(x: Tensor, mask: Tensor) -> Tensor:
    """By the definition, one token at a time."""
    out, (half, quarter) = x.clone(), (x.shape[-1] // 2, x.shape[-1] // 4)
    x = x * mask[..., None]
    for i in range(x.shape[1]):
        if i < LAYOUT.text_len:
            out[:, i, :half] = x[:, i - 1, :half] if i else 0
            continue
        row, column = divmod(i - LAYOUT.text_len, LAYOUT.width)
        out[:, i, :quarter] = x[:, i - LAYOUT.width, :quarter] if row else 0
        out[:, i, quarter:half] = x[:, i - 1, quarter:half] if column else 0
    return out


@pytest.mark.parametrize("n", [1, 3, 4, 5, 9, 12, 19])
def test_token_shift_equals_its_definition_in_forward_and_step(n: int) -> None:
    shift = TokenShift(nn.Identity(), 8, layout=LAYOUT)
    x = torch.randn(2, n, 8)
    for mask in (None, torch.rand(2, n) < 0.6):
        want = shifted(x, torch.ones(2, n) if mask is None else mask)
        assert torch.equal(shift(x, mask=mask), want)
        for size in (1, 3, 7):
            state, outs = None, []
            for start in range(0, n, size):
                part = slice(start, start + size)
                out, state = shift.step(x[:, part], state, mask=None if mask is None else mask[:, part])
                outs.append(out)
            assert torch.equal(torch.cat(outs, dim=1), want)
            assert state is not None
            assert state.length == n


def test_token_shift_step_keeps_older_states() -> None:
    shift = TokenShift(nn.Identity(), 8, layout=LAYOUT)
    x = torch.randn(2, 9, 8)
    _, old = shift.step(x[:, :6])
    first, _ = shift.step(x[:, 6:7], old)
    shift.step(torch.randn(2, 2, 8), old)
    assert torch.equal(shift.step(x[:, 6:7], old)[0], first)


def test_token_shift_rejects_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="dim must be divisible by 4 for token shift, got dim=6"):
        TokenShift(nn.Identity(), 6, layout=LAYOUT)
    with pytest.raises(TypeError, match="block must not take a context with token shift, got CrossAttention"):
        TokenShift(CrossAttention(8, context_dim=8), 8, layout=LAYOUT)
    shift = TokenShift(nn.Identity(), 8, layout=LAYOUT)
    with pytest.raises(ValueError, match="x must hold at most the 19 tokens"):
        shift(torch.randn(1, 20, 8))
    with pytest.raises(ValueError, match=r"state must come from this layer and batch: .* got \(2, 5, 4\)"):
        shift.step(torch.randn(1, 1, 8), shift.step(torch.randn(2, 1, 8))[1])
