"""`Memformer`: masks, memory, decoding, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import Memformer, generate
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


both = pytest.mark.parametrize("update", ["gru", "paper"])


def small(**changes: Any) -> Memformer:
    return Memformer(**{**SIZES, **DECODER, **changes}).eval()


def source(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(11, (batch, length))


def target(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(13, (batch, length))


def test_encoder_is_bidirectional_and_decoder_causal() -> None:
    model = small()
    src, tgt = source(), target()
    early, late = model(src, tgt), model(torch.cat((src[:, :-1], (src[:, -1:] + 1) % 11), 1), tgt)
    assert not torch.allclose(early.encoded[:, 0], late.encoded[:, 0])
    changed = model(src, torch.cat((tgt[:, :-1], (tgt[:, -1:] + 1) % 13), 1))
    assert torch.equal(changed.logits[:, :-1], early.logits[:, :-1])


@both
def test_padding_changes_no_output(update: str) -> None:
    model, src, tgt = small(memory_update=update), source(1, 5), target(1, 4)
    want = model(src, tgt)
    mask, target_mask = torch.tensor([[True] * 5 + [False] * 2]), torch.tensor([[True] * 4 + [False] * 3])
    got = model(
        torch.cat((src, source(1, 2)), 1), torch.cat((tgt, target(1, 3)), 1), mask=mask, target_mask=target_mask
    )
    torch.testing.assert_close(got.encoded[:, :5], want.encoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.memory, want.memory, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.logits[:, :4], want.logits, rtol=0, atol=1e-5)


def test_loss_is_the_mean_cross_entropy_of_valid_targets() -> None:
    model, src, tgt = small(), source(), target()
    mask, target_mask = torch.arange(7) < torch.tensor([[7], [4]]), torch.arange(5) < torch.tensor([[3], [5]])
    memory = torch.randn(2, 3, 16)
    logits = model(src, tgt, memory=memory, mask=mask, target_mask=target_mask).logits
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tgt[:, 1:], reduction="none")
    loss = model.loss(src, tgt, memory=memory, mask=mask, target_mask=target_mask)
    torch.testing.assert_close(loss, each[target_mask[:, 1:]].mean())
    (term,) = model.loss_terms(src, tgt, memory=memory, mask=mask, target_mask=target_mask)
    assert int(term.count) == 6


@both
def test_cached_decoding_equals_forward_over_segments(update: str) -> None:
    model, memory = small(memory_update=update), None
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


def test_greedy_generation_equals_argmax_of_forward() -> None:
    model, src = small(), source()
    with torch.no_grad():
        reading, tokens = model.read(src), target(2, 1)
        new = generate(reading, tokens, 6, temperature=0)
        for step in range(6):
            assert torch.equal(model(src, tokens).logits[:, -1].argmax(-1), new[:, step])
            tokens = torch.cat((tokens, new[:, step : step + 1]), 1)


@pytest.mark.slow
@both
def test_memory_stays_finite_over_a_thousand_segments(update: str) -> None:
    model, memory = Memformer(**SIZES, memory_update=update).eval(), None
    with torch.no_grad():
        for _ in range(1000):
            memory = model(source(1, 4), memory=memory).memory
    assert memory.shape == (1, 3, 16)
    assert bool(torch.isfinite(memory).all())
    assert float(memory.abs().max()) < 1e3


@pytest.mark.parametrize("update", ["gru", "paper", ("paper", {"temperature": 2.0})])
def test_loaded_model_computes_the_same(update: Any, tmp_path: Path) -> None:
    model, src, tgt = small(memory_update=update), source(), target()
    model.save(tmp_path)
    again = Memformer.load(tmp_path).eval()
    memory = again(src).memory
    assert torch.equal(memory, model(src).memory)
    assert torch.equal(again(src, tgt, memory=memory).logits, model(src, tgt, memory=memory).logits)


def test_memory_of_the_paper_is_the_update_of_the_encoders_output() -> None:
    model, src, mask = small(memory_update="paper", memory_updates=2), source(), torch.rand(2, 7) < 0.6
    output = model(src, mask=mask)
    torch.testing.assert_close(output.memory, model.update(model.initial_memory(2), output.encoded, mask=mask))
    torch.testing.assert_close(output.memory.norm(dim=-1), torch.ones(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_compiled_model_equals_eager(dtype: torch.dtype, update: str) -> None:
    model, src, tgt = small(memory_update=update).to(dtype), source(), target()
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
    "target must have the batch size": lambda m: m(SRC, TGT[:1]),
    "n >= 2": lambda m: m.loss(SRC, TGT[:, :1]),
    "source must fit enc_max_seq_len": lambda m: m(torch.zeros(2, 9, dtype=torch.int64)),
    "target must fit dec_max_seq_len": lambda m: m(SRC, torch.zeros(2, 9, dtype=torch.int64)),
    "context must be given": lambda m: m.step(TGT),
    "context must be given to a stack": lambda m: m.decoder(torch.zeros(2, 5, 16)),
    "source must lie in": lambda m: m(SRC + 11),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_inputs_raise(message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        BAD[message](small(enc_max_seq_len=8, dec_max_seq_len=8))


def test_target_without_a_decoder_raises() -> None:
    with pytest.raises(ValueError, match="without a decoder"):
        Memformer(**SIZES)(SRC, TGT)
    with pytest.raises(ValueError, match="without a decoder"):
        Memformer(**SIZES).read(SRC)


@pytest.mark.parametrize(
    "change", [{"dec_depth": None}, {"enc_heads": 3}, {"memory_heads": 3}, {"memory_slots": 0}, {"memory_updates": 0}]
)
def test_invalid_sizes_raise(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).removeprefix("memory_")):
        small(**change)


def test_unknown_arguments_raise() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        small(nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        small()(SRC, nonsense=1)
