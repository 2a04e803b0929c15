"""MemoryLanguageModel: one law over segments, with any blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import MemoryLanguageModel, generate

SIZES: dict[str, Any] = {
    "num_tokens": 11,
    "dim": 16,
    "depth": 2,
    "memory_slots": 3,
    "segment_len": 5,
    "heads": 2,
    "dim_head": 8,
    "memory_heads": 2,
}
LAYERS = {"full": "full", "t5": "full", "mixed": ["cosine_sim", ["full", "cosine_sim"]]}
TOKENS = torch.arange(2 * 13).view(2, 13) % 11


def small(name: str = "full", **changes: Any) -> MemoryLanguageModel:
    positions = "t5" if name == "t5" else "auto"
    return MemoryLanguageModel(**{**SIZES, "attention": LAYERS[name], "positions": positions, **changes}).eval()


def over_segments(model: MemoryLanguageModel, mask: Tensor | None) -> Tensor:
    logits, memory = [], None
    for start in range(0, TOKENS.shape[1], 5):
        part = None if mask is None else mask[:, start : start + 5]
        out = model(TOKENS[:, start : start + 5], memory=memory, mask=part)
        memory = out.memory
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_over_any_split_equal_the_segments(name: str, padded: bool) -> None:
    model = small(name)
    mask = torch.arange(13) >= torch.tensor([[0], [7]]) if padded else None
    want = over_segments(model, mask)
    real = torch.ones_like(TOKENS, dtype=torch.bool) if mask is None else mask
    for splits in ([13], [1] * 13, [4, 1, 8], [5, 5, 3]):
        logits, state, start = [], None, 0
        for size in splits:
            part = None if mask is None else mask[:, start : start + size]
            out, state = model.step(TOKENS[:, start : start + size], state, mask=part)
            logits.append(out)
            start += size
        torch.testing.assert_close(torch.cat(logits, 1)[real], want[real], rtol=0, atol=1e-5)
        assert state.length == 13


def test_an_older_state_keeps_its_meaning() -> None:
    model = small()
    _, state = model.step(TOKENS[:, :4])
    want, _ = model.step(TOKENS[:, 4:7], state)
    model.step(TOKENS[:, 7:], state)
    got, _ = model.step(TOKENS[:, 4:7], state)
    assert torch.equal(got, want)


def test_what_stood_in_the_first_segment_is_heard_in_the_third() -> None:
    model = small()
    changed = TOKENS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    (want, _), (got, _) = model.step(TOKENS), model.step(changed)
    assert not torch.equal(got[:, 10:], want[:, 10:])


def test_it_generates_over_many_segments_at_a_bounded_state() -> None:
    model = small()
    new = generate(model, TOKENS[:, :3], 30, temperature=0)
    with torch.no_grad():
        logits, state = model.step(torch.cat((TOKENS[:, :3], new), 1))
        assert torch.equal(logits[:, 2:-1].argmax(-1), new)
        sizes = []
        for _ in range(10):
            sizes.append(state.nbytes)
            _, state = model.step(TOKENS[:, :5], state)
    assert len(set(sizes)) == 1


def test_a_thousand_segments_stay_finite() -> None:
    model, memory = small(), None
    with torch.no_grad():
        for _ in range(1000):
            memory = model(TOKENS[:, :5], memory=memory).memory
    assert float(memory.abs().max()) < 1e3


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = small("mixed")
    model.save(tmp_path)
    again = MemoryLanguageModel.load(tmp_path).eval()
    assert torch.equal(again.step(TOKENS)[0], model.step(TOKENS)[0])


def test_bad_input_is_refused_by_name() -> None:
    model = small()
    with pytest.raises(ValueError, match="segment_len=5"):
        model(TOKENS)
    with pytest.raises(ValueError, match="memory must be"):
        model(TOKENS[:, :5], memory=torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="mask must be"):
        model(TOKENS[:, :5], mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="state must be a MemoryState"):
        model.step(TOKENS, 3)
    _, state = model.step(TOKENS)
    with pytest.raises(ValueError, match="memory must be"):
        model.step(TOKENS[:1], state)
    with pytest.raises(TypeError, match="nonsense"):
        small(nonsense=1)
    with pytest.raises(ValueError, match="positions"):
        small(positions="learned")
