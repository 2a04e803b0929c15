"""`gate_loop_lm`: hybrids, padded prompts, states, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention_zoo import FullAttention, GateLoopAttention, LanguageModel, SimpleGateLoop, gate_loop_lm, generate
from tests.formulas import relative_error

HYBRID: dict[str, Any] = {"attention": ["gate_loop", "gate_loop", "full"], "heads": 4, "dim_head": 8}
CASES: dict[str, dict[str, Any]] = {
    "one gate per channel": {},
    "heads": {"heads": 4},
    "simple": {"attention": "simple_gate_loop"},
    "hybrid": HYBRID,
    "hybrid, post-norm": {**HYBRID, "post_norm": True},
}
every_case = pytest.mark.parametrize("case", CASES)


def build(case: str) -> LanguageModel:
    return gate_loop_lm(num_tokens=31, dim=32, depth=3, **CASES[case]).eval()


@every_case
def test_steps_over_any_split_equal_forward_with_padding(case: str) -> None:
    model, tokens = build(case), torch.randint(31, (2, 70))
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, :23] = False
    with torch.no_grad():
        full = model(tokens, mask=mask)
        for split in ([70], [1] * 70, [23, 40, 7]):
            state, outs = None, []
            for part, part_mask in zip(tokens.split(split, 1), mask.split(split, 1), strict=True):
                logits, state = model.step(part, state, mask=part_mask)
                outs.append(logits)
            assert relative_error(torch.cat(outs, 1)[mask], full[mask]) < 1e-5


@every_case
def test_left_padded_prompts_generate_the_same_tokens_as_unpadded_prompts(case: str) -> None:
    model, prompts = build(case), [torch.randint(31, (1, n)) for n in (3, 9, 17)]
    padded = torch.cat([torch.nn.functional.pad(prompt, (17 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.arange(17) >= 17 - torch.tensor([[3], [9], [17]])
    together = generate(model, padded, 12, mask=mask, temperature=0)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], generate(model, prompt, 12, temperature=0))


def test_hybrid_has_the_named_blocks_and_gradients_for_all_parameters() -> None:
    model = gate_loop_lm(num_tokens=31, dim=32, depth=6, **HYBRID)
    classes = [type(part) for part in model.modules() if isinstance(part, (GateLoopAttention, FullAttention))]
    assert classes == [GateLoopAttention, GateLoopAttention, FullAttention] * 2
    model.loss(torch.randint(31, (2, 20))).backward()
    assert all(part.grad is not None and bool(part.grad.isfinite().all()) for part in model.parameters())


def test_state_size_of_gate_loops_does_not_depend_on_the_length() -> None:
    for case, numbers in (("one gate per channel", 2 * 32), ("heads", 2 * 32 * 8), ("simple", 32)):
        model = build(case)
        with torch.no_grad():
            sizes = {model.step(torch.randint(31, (1, n)))[1].nbytes for n in (1, 50, 500)}
        (size,) = sizes
        assert 0 < size - 3 * 4 * numbers < 100  # three hidden states; the rest are token counts


def test_head_sizes_that_no_block_takes_raise() -> None:
    with pytest.raises(ValueError, match="dim_head must be taken by at least one block, but none of 'gate_loop'"):
        gate_loop_lm(num_tokens=31, dim=32, depth=2, dim_head=8)
    with pytest.raises(ValueError, match=r"heads must be taken by at least one block.*simple_gate_loop"):
        gate_loop_lm(num_tokens=31, dim=32, depth=2, attention="simple_gate_loop", heads=4)
    assert any(isinstance(part, SimpleGateLoop) for part in build("simple").modules())
