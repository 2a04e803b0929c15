"""Memory replay equals full back-propagation through time, at the activation memory of one segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import LanguageModel, Memformer, MemoryLanguageModel
from attention_zoo.cli._bench.measure import peak_bytes
from attention_zoo.ops.losses import masked_cross_entropy, next_token_loss
from attention_zoo.training import memory_replay
from tests.formulas import relative_error

SIZES: dict[str, Any] = {
    "dim": 16,
    "memory_slots": 3,
    "memory_heads": 2,
    "enc_num_tokens": 11,
    "enc_depth": 1,
    "enc_heads": 2,
}
COUNT = 4
SEGMENTS = [torch.arange(2 * 6).view(2, 6) * (3 + k) % 11 for k in range(COUNT)]
TARGETS = [torch.arange(2 * 5).view(2, 5) * (4 + k) % 11 for k in range(COUNT)]
MASKS = [torch.arange(6) >= torch.tensor([[k], [2]]) for k in range(COUNT)]


def seq2seq(**changes: Any) -> Memformer:
    return Memformer(**{**SIZES, "dec_num_tokens": 11, "dec_depth": 1, "dec_heads": 2, **changes}).double()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def expect_same(model: nn.Module, want: list[Tensor]) -> None:
    for got, expected in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert any(float(grad.abs().max()) > 1e-6 for grad in want)


@pytest.mark.parametrize("targets", ["every", "last", "middle"])
@pytest.mark.parametrize(("dropout", "update"), [(0.0, "gru"), (0.3, "gru"), (0.3, "paper")])
def test_replay_equals_full_back_propagation(targets: str, dropout: float, update: str) -> None:
    model = seq2seq(ff_dropout=dropout, attn_dropout=dropout, memory_update=update)
    start = torch.randn(2, 3, 16).double().requires_grad_()
    wanted = {
        "every": TARGETS,
        "last": [None] * (COUNT - 1) + TARGETS[-1:],
        "middle": [None, TARGETS[1], None, None],
    }[targets]
    torch.manual_seed(5)
    memory, total = start, torch.zeros(()).double()
    for segment, target, mask in zip(SEGMENTS, wanted, MASKS, strict=True):
        out = model(segment, target, memory=memory, mask=mask)
        memory = out.memory
        if target is not None:
            total = total + next_token_loss(out.logits[:, :-1], target)
    total.backward()
    want, want_start, after = gradients(model), start.grad.clone(), torch.get_rng_state()
    start.grad = None
    torch.manual_seed(5)
    given = TARGETS[-1] if targets == "last" else wanted
    got = memory_replay(model, SEGMENTS, given, masks=MASKS, memory=start)
    torch.testing.assert_close(got.loss, total.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.memory, memory.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(start.grad, want_start, rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), after)
    expect_same(model, want)


class Keeps(nn.Module):
    """A memory update that returns the memory that it was given."""

    def forward(self, memory: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return memory


@pytest.mark.parametrize("writes", [True, False])
def test_replay_with_a_custom_loss_equals_full_back_propagation(writes: bool) -> None:
    model = Memformer(**SIZES).double()
    if not writes:
        model.update = Keeps()

    def loss(output: Any, target: Tensor | None) -> Tensor:
        return output.encoded.square().mean() + output.memory[:, 0].sum()

    memory, total = None, 0.0
    for segment in SEGMENTS:
        out = model(segment, memory=memory)
        memory, total = out.memory, total + loss(out, None)
    total.backward()
    want = gradients(model)
    memory_replay(model, SEGMENTS, loss=loss)
    expect_same(model, want)


@pytest.mark.parametrize("update", ["gru", "paper"])
def test_replay_of_a_language_model_equals_full_back_propagation(update: str) -> None:
    model = MemoryLanguageModel(
        num_tokens=11,
        dim=16,
        depth=1,
        memory_slots=3,
        segment_len=6,
        heads=2,
        dim_head=8,
        memory_heads=2,
        memory_update=update,
    ).double()
    targets = [segment.roll(-1, 1) for segment in SEGMENTS]
    memory, total = None, 0.0
    for segment, target, mask in zip(SEGMENTS, targets, MASKS, strict=True):
        out = model(segment, memory=memory, mask=mask)
        memory, total = out.memory, total + masked_cross_entropy(out.logits, target, mask)
    total.backward()
    want = gradients(model)
    memory_replay(model, SEGMENTS, targets, masks=MASKS, target_masks=MASKS)
    expect_same(model, want)


def test_scaler_scales_gradients_but_not_the_loss() -> None:
    model = seq2seq()
    loss = memory_replay(model, SEGMENTS, TARGETS).loss
    want = [8 * grad for grad in gradients(model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert torch.equal(memory_replay(model, SEGMENTS, TARGETS, scaler=scaler).loss, loss)
    expect_same(model, want)


@pytest.mark.parametrize("update", ["gru", "paper"])
def test_gradients_under_autocast_are_close_to_float32(update: str) -> None:
    model = seq2seq(memory_update=update).float()
    memory_replay(model, SEGMENTS, TARGETS)
    want = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        memory_replay(model, SEGMENTS, TARGETS)
    for got, expected in zip(gradients(model), want, strict=True):
        if expected.norm() > 1e-3:  # smaller gradients are rounding errors
            assert relative_error(got, expected) <= 0.15


def test_activation_memory_does_not_grow_with_the_number_of_segments() -> None:
    model = seq2seq()
    segment, target = torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int64)

    def peak(count: int) -> int:
        return peak_bytes(lambda: memory_replay(model, [segment] * count, [target] * count), torch.device("cpu"))

    peak(2)  # allocates the weights' gradients
    few, many = peak(2), peak(12)
    per_segment = 2 * 3 * 16 * 8 + 6000  # memory and random state
    assert many - few <= 10 * per_segment


def test_replay_rejects_invalid_arguments() -> None:
    model = seq2seq()
    with pytest.raises(ValueError, match="segments"):
        memory_replay(model, [], TARGETS)
    with pytest.raises(TypeError, match=r"segments must be tensors, got list as segments\[1\]"):
        memory_replay(model, [SEGMENTS[0], [1, 2]], TARGETS[:2])
    with pytest.raises(ValueError, match="targets"):
        memory_replay(model, SEGMENTS)
    with pytest.raises(ValueError, match="targets must hold one per segment, 4, got 3"):
        memory_replay(model, SEGMENTS, TARGETS[1:])
    with pytest.raises(ValueError, match="targets must hold at least one"):
        memory_replay(model, SEGMENTS, [None] * COUNT)
    with pytest.raises(ValueError, match="masks must hold one per segment"):
        memory_replay(model, SEGMENTS, TARGETS, masks=MASKS[:1])
    with pytest.raises(ValueError, match="loss must be given"):
        memory_replay(Memformer(**SIZES).double(), SEGMENTS, TARGETS)
    without_memory = LanguageModel(num_tokens=8, dim=16, depth=1)
    with pytest.raises(TypeError, match="model must have initial_memory, as models with memory do, got LanguageModel"):
        memory_replay(without_memory, SEGMENTS, TARGETS)
    with pytest.raises(TypeError, match="nonsense"):
        memory_replay(model, SEGMENTS, TARGETS, nonsense=1)
