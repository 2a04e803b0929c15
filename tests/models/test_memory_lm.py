"""`MemoryLanguageModel`: decoding, loss and memory over segments, with any blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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
LAYERS = {"full": "full", "t5": "full", "mixed": ["cosine_sim", ["full", "cosine_sim"]], "paper": "full"}
TOKENS = torch.arange(2 * 13).view(2, 13) % 11


def small(name: str = "full", **changes: Any) -> MemoryLanguageModel:
    positions = "t5" if name == "t5" else "auto"
    update = ("paper", {"temperature": 0.5}) if name == "paper" else "gru"
    options = {"attention": LAYERS[name], "positions": positions, "memory_update": update}
    return MemoryLanguageModel(**{**SIZES, **options, **changes}).eval()


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
def test_steps_over_any_split_equal_forward_over_segments(name: str, padded: bool) -> None:
    model = small(name)
    mask = torch.arange(13) >= torch.tensor([[0], [7]]) if padded else None
    want = over_segments(model, mask)
    valid = torch.ones_like(TOKENS, dtype=torch.bool) if mask is None else mask
    for splits in ([13], [1] * 13, [4, 1, 8], [5, 5, 3]):
        logits, state, start = [], None, 0
        for size in splits:
            part = None if mask is None else mask[:, start : start + size]
            out, state = model.step(TOKENS[:, start : start + size], state, mask=part)
            logits.append(out)
            start += size
        torch.testing.assert_close(torch.cat(logits, 1)[valid], want[valid], rtol=0, atol=1e-5)
        assert state.length == 13


@pytest.mark.parametrize("length", [2, 5, 6, 7, 13])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_is_the_mean_cross_entropy_of_the_logits_of_steps(length: int, padded: bool) -> None:
    model, tokens = small("mixed"), TOKENS[:, :length]
    mask = torch.arange(length) >= torch.tensor([[0], [min(7, length - 2)]]) if padded else None
    logits, _ = model.step(tokens[:, :-1], mask=None if mask is None else mask[:, :-1])
    each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    want = each.mean() if mask is None else each[mask[:, 1:] & mask[:, :-1]].mean()
    torch.testing.assert_close(model.loss(tokens, mask=mask), want, rtol=0, atol=1e-5)
    (term,) = model.loss_terms(tokens, mask=mask)
    assert int(term.count) == (each.numel() if mask is None else int((mask[:, 1:] & mask[:, :-1]).sum()))


@pytest.mark.parametrize("name", ["full", "paper"])
def test_loss_reads_the_given_memory_and_has_gradients_for_all_parameters(name: str) -> None:
    model, memory = small(name).train(), torch.randn(2, 3, 16, requires_grad=True)
    assert not torch.equal(model.loss(TOKENS, memory=memory), model.loss(TOKENS))
    model.loss(TOKENS, memory=memory).backward()
    assert memory.grad is not None
    model.loss(TOKENS).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_loss_of_one_token_raises() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        small().loss(TOKENS[:, :1])


def test_older_state_remains_valid() -> None:
    model = small()
    _, state = model.step(TOKENS[:, :4])
    want, _ = model.step(TOKENS[:, 4:7], state)
    model.step(TOKENS[:, 7:], state)
    got, _ = model.step(TOKENS[:, 4:7], state)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["full", "paper"])
def test_logits_of_the_third_segment_depend_on_the_first(name: str) -> None:
    model = small(name)
    changed = TOKENS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    (want, _), (got, _) = model.step(TOKENS), model.step(changed)
    assert not torch.equal(got[:, 10:], want[:, 10:])


@pytest.mark.parametrize("name", ["full", "paper"])
def test_generation_over_many_segments_has_a_state_of_constant_size(name: str) -> None:
    model = small(name)
    new = generate(model, TOKENS[:, :3], 30, temperature=0)
    with torch.no_grad():
        logits, state = model.step(torch.cat((TOKENS[:, :3], new), 1))
        assert torch.equal(logits[:, 2:-1].argmax(-1), new)
        sizes = []
        for _ in range(10):
            sizes.append(state.nbytes)
            _, state = model.step(TOKENS[:, :5], state)
    assert len(set(sizes)) == 1


@pytest.mark.slow
def test_memory_stays_finite_over_a_thousand_segments() -> None:
    model, memory = small(), None
    with torch.no_grad():
        for _ in range(1000):
            memory = model(TOKENS[:, :5], memory=memory).memory
    assert float(memory.abs().max()) < 1e3


@pytest.mark.parametrize("name", ["mixed", "paper"])
def test_loaded_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model = small(name)
    model.save(tmp_path)
    again = MemoryLanguageModel.load(tmp_path).eval()
    assert torch.equal(again.step(TOKENS)[0], model.step(TOKENS)[0])
    assert getattr(again.update, "temperature", None) == (0.5 if name == "paper" else None)


def test_invalid_inputs_raise() -> None:
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
    with pytest.raises(ValueError, match="state must have the batch size of tokens, 1, got 2"):
        model.step(TOKENS[:1], state)
    with pytest.raises(TypeError, match="nonsense"):
        small(nonsense=1)
    with pytest.raises(ValueError, match="positions"):
        small(positions="learned")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("papr", ValueError, "memory_update must be one of .* did you mean 'paper'"),
        (None, TypeError, "memory_update must be a name or"),
        (("gru", {"temperature": 0.5}), ValueError, "option of 'gru' must be one of .* got .*temperature"),
        (("paper", {"memory_slots": 5}), ValueError, "option of 'paper'"),
        (("paper", {"temperature": 0}), ValueError, "temperature must lie in"),
    ],
)
def test_unknown_memory_updates_and_options_raise(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(memory_update=spec)
