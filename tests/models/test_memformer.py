"""Memformer: its masks, memory, decoding and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import Memformer, MemoryUpdate, generate
from attention_zoo.layers import InitialMemory
from tests.formulas import relative_error

SIZES: dict[str, Any] = {
    "dim": 16,
    "memory_slots": 3,
    "memory_heads": 2,
    "enc_num_tokens": 11,
    "enc_depth": 2,
    "enc_heads": 2,
}
DECODER: dict[str, Any] = {"dec_num_tokens": 13, "dec_depth": 2, "dec_heads": 2}


def small(**changes: Any) -> Memformer:
    return Memformer(**{**SIZES, **DECODER, **changes}).eval()


def source(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(11, (batch, length))


def target(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(13, (batch, length))


def test_a_slot_sees_itself_and_the_real_tokens_and_no_other_slot() -> None:
    update, memory, x = MemoryUpdate(16, heads=2, updates=3), torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    new = update(memory, x, mask=mask)
    changed, noise = memory.clone(), torch.where(mask[..., None], x, 1e3)
    changed[:, 1] = 7.0
    other = update(changed, noise, mask=mask)
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(other[:, kept], new[:, kept], rtol=0, atol=1e-6)
    assert not torch.allclose(other[:, 1], new[:, 1])


def test_a_segment_of_padding_leaves_the_memory_of_its_row_as_it_was() -> None:
    update, memory = MemoryUpdate(16, heads=2), torch.randn(2, 5, 16)
    new = update(memory, torch.randn(2, 3, 16), mask=torch.tensor([[False] * 3, [True] * 3]))
    assert torch.equal(new[0], memory[0])
    assert not torch.equal(new[1], memory[1])


def test_the_memory_update_is_attention_over_itself_and_the_tokens_then_gru_then_feedforward() -> None:
    update, memory, x = MemoryUpdate(8, heads=2).double(), torch.randn(1, 3, 8).double(), torch.randn(1, 4, 8).double()
    rows = []
    for slot in memory[0]:
        seen = torch.cat((slot[None], x[0]))
        q, k, v = update.to_q(slot), update.to_k(seen), update.to_v(seen)
        heads = [((k[:, part] @ q[part]) * 4**-0.5).softmax(0) @ v[:, part] for part in (slice(0, 4), slice(4, 8))]
        kept = update.gru(update.to_out(torch.cat(heads))[None], slot[None])[0]
        rows.append(kept + update.feedforward(update.norm(kept)))
    torch.testing.assert_close(update(memory, x)[0], torch.stack(rows), rtol=0, atol=1e-12)


def test_the_encoder_hears_both_sides_and_the_decoder_the_past_alone() -> None:
    model = small()
    src, tgt = source(), target()
    early, late = model(src, tgt), model(torch.cat((src[:, :-1], (src[:, -1:] + 1) % 11), 1), tgt)
    assert not torch.allclose(early.encoded[:, 0], late.encoded[:, 0])
    changed = model(src, torch.cat((tgt[:, :-1], (tgt[:, -1:] + 1) % 13), 1))
    assert torch.equal(changed.logits[:, :-1], early.logits[:, :-1])


def test_padding_changes_neither_encoding_nor_memory_nor_logits_nor_loss() -> None:
    model, src, tgt = small(), source(1, 5), target(1, 4)
    want = model(src, tgt)
    mask, target_mask = torch.tensor([[True] * 5 + [False] * 2]), torch.tensor([[True] * 4 + [False] * 3])
    got = model(
        torch.cat((src, source(1, 2)), 1), torch.cat((tgt, target(1, 3)), 1), mask=mask, target_mask=target_mask
    )
    torch.testing.assert_close(got.encoded[:, :5], want.encoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.memory, want.memory, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.logits[:, :4], want.logits, rtol=0, atol=1e-5)


def test_cached_decoding_equals_the_full_pass_segment_by_segment() -> None:
    model, memory = small(), None
    mask = torch.tensor([[False, True, True, True, True, True, False], [True] * 7])
    for splits in ([5], [1] * 5, [2, 1, 2]):
        src, tgt = source(), target()
        want = model(src, tgt, memory=memory, mask=mask)
        reading = model.read(src, memory=memory, mask=mask)
        logits, state = [], None
        for part in tgt.split(splits, dim=1):
            out, state = reading.step(part, state)
            logits.append(out)
        torch.testing.assert_close(torch.cat(logits, 1), want.logits, rtol=0, atol=1e-5)
        memory = reading.memory
        assert torch.equal(memory, want.memory)


def test_generation_follows_the_most_likely_token_of_the_full_pass() -> None:
    model, src = small(), source()
    with torch.no_grad():
        reading, tokens = model.read(src), target(2, 1)
        new = generate(reading, tokens, 6, temperature=0)
        for step in range(6):
            assert torch.equal(model(src, tokens).logits[:, -1].argmax(-1), new[:, step])
            tokens = torch.cat((tokens, new[:, step : step + 1]), 1)


def test_a_thousand_segments_stay_finite_at_a_constant_memory() -> None:
    model, memory = Memformer(**SIZES).eval(), None
    with torch.no_grad():
        for _ in range(1000):
            memory = model(source(1, 4), memory=memory).memory
    assert memory.shape == (1, 3, 16)
    assert bool(torch.isfinite(memory).all())
    assert float(memory.abs().max()) < 1e3


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model, src, tgt = small(), source(), target()
    model.save(tmp_path)
    again = Memformer.load(tmp_path).eval()
    assert torch.equal(again(src, tgt).logits, model(src, tgt).logits)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_model_compiles_whole_and_equals_eager(dtype: torch.dtype) -> None:
    model, src, tgt = small().to(dtype), source(), target()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = compiled(src, tgt), model(src, tgt)
    got.logits.sum().backward()
    assert relative_error(got.logits, want.logits) <= (1e-5 if dtype == torch.float32 else 3e-2)
    assert got.memory.dtype == dtype


SRC, TGT = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
BAD = {
    "memory must be (b, memory_slots, dim)": lambda m: m(SRC, memory=torch.zeros(2, 4, 16)),
    "memory must be (b, memory_slots, dim) = (2,": lambda m: m(SRC, memory=torch.zeros(1, 3, 16)),
    "mask must be (b, n)": lambda m: m(SRC, mask=torch.ones(2, 6, dtype=torch.bool)),
    "target_mask must be (b, n)": lambda m: m(SRC, TGT, target_mask=torch.ones(2, 4, dtype=torch.bool)),
    "target_mask must come with a target": lambda m: m(SRC, target_mask=torch.ones(2, 4, dtype=torch.bool)),
    "target must have the batch": lambda m: m(SRC, TGT[:1]),
    "at least two tokens": lambda m: m.loss(SRC, TGT[:, :1]),
    "source must be one segment": lambda m: m(torch.zeros(2, 9, dtype=torch.int64)),
    "target must fit dec_max_seq_len": lambda m: m(SRC, torch.zeros(2, 9, dtype=torch.int64)),
    "context must be given": lambda m: m.step(TGT),
    "context must be given to a stack": lambda m: m.decoder(torch.zeros(2, 5, 16)),
    "source must lie in": lambda m: m(SRC + 11),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        BAD[message](small(enc_max_seq_len=8, dec_max_seq_len=8))


def test_a_target_without_a_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="without a decoder"):
        Memformer(**SIZES)(SRC, TGT)
    with pytest.raises(ValueError, match="without a decoder"):
        Memformer(**SIZES).read(SRC)


@pytest.mark.parametrize(
    "change", [{"dec_depth": None}, {"enc_heads": 3}, {"memory_heads": 3}, {"memory_slots": 0}, {"memory_updates": 0}]
)
def test_sizes_that_do_not_fit_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).removeprefix("memory_")):
        small(**change)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        small(nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        small()(SRC, nonsense=1)


def test_the_initial_memory_is_one_vector_per_slot_for_every_row() -> None:
    initial = InitialMemory(3, 16)
    assert torch.equal(initial(2)[0], initial(2)[1])
    with pytest.raises(ValueError, match="batch"):
        initial(0)
