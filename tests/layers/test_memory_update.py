"""`MemoryUpdate`, `BiasedMemoryUpdate` and their initial memories."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_zoo import BiasedMemoryUpdate, MemoryUpdate
from attention_zoo.layers import BiasedMemory, InitialMemory

Update = MemoryUpdate | BiasedMemoryUpdate
UPDATES: dict[str, Callable[..., Update]] = {
    "gru": lambda **options: MemoryUpdate(16, heads=2, **options),
    "paper": lambda **options: BiasedMemoryUpdate(16, memory_slots=5, heads=2, **options),
}
both = pytest.mark.parametrize("name", UPDATES)


@both
def test_memory_slot_attends_to_itself_and_valid_tokens_only(name: str) -> None:
    update, memory, x = UPDATES[name](updates=3), torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    new = update(memory, x, mask=mask)
    changed, noise = memory.clone(), torch.where(mask[..., None], x, 1e3)
    changed[:, 1] = 7.0
    other = update(changed, noise, mask=mask)
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(other[:, kept], new[:, kept], rtol=0, atol=1e-6)
    assert not torch.allclose(other[:, 1], new[:, 1])


@both
def test_padded_segment_does_not_change_the_memory_of_its_row(name: str) -> None:
    update, memory = UPDATES[name](), torch.randn(2, 5, 16)
    new = update(memory, torch.randn(2, 3, 16), mask=torch.tensor([[False] * 3, [True] * 3]))
    assert torch.equal(new[0], memory[0])
    assert not torch.equal(new[1], memory[1])


def test_memory_update_equals_its_definition() -> None:
    update, memory, x = MemoryUpdate(8, heads=2).double(), torch.randn(1, 3, 8).double(), torch.randn(1, 4, 8).double()
    rows = []
    for slot in memory[0]:
        seen = torch.cat((slot[None], x[0]))
        q, k, v = update.to_q(slot), update.to_k(seen), update.to_v(seen)
        heads = [((k[:, part] @ q[part]) * 4**-0.5).softmax(0) @ v[:, part] for part in (slice(0, 4), slice(4, 8))]
        kept = update.gru(update.to_out(torch.cat(heads))[None], slot[None])[0]
        rows.append(kept + update.feedforward(update.norm(kept)))
    torch.testing.assert_close(update(memory, x)[0], torch.stack(rows), rtol=0, atol=1e-12)


def biased(update: BiasedMemoryUpdate, memory: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One update as in the docstring, by loops over rows, slots, heads and features."""
    e, new = update.dim // update.heads, torch.zeros_like(memory)
    for row in range(len(memory)):
        tokens = [token for index, token in enumerate(x[row]) if mask is None or mask[row, index]]
        for slot in range(memory.shape[1]):
            m = memory[row, slot]
            attended = torch.zeros_like(m)
            for head in range(update.heads):
                part = slice(head * e, (head + 1) * e)
                q = update.to_q.weight[part] @ m
                scores = [q @ (update.to_k.weight[part] @ y) / math.sqrt(e) / update.temperature for y in (m, *tokens)]
                powers = [(score - max(scores)).exp() for score in scores]
                values = [m[part], *(update.to_v.weight[part] @ y for y in tokens)]
                attended[part] = sum(p * v for p, v in zip(powers, values, strict=True)) / sum(powers)
            turned = attended + update.initial.weight[slot]
            new[row, slot] = turned / turned.square().sum().sqrt()
    return new


@pytest.mark.parametrize("temperature", [0.25, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_biased_update_equals_its_definition(temperature: float, masked: bool) -> None:
    update = BiasedMemoryUpdate(12, memory_slots=4, heads=3, updates=2, temperature=temperature).double()
    torch.nn.init.normal_(update.initial.weight)
    memory, x = torch.randn(2, 4, 12).double(), torch.randn(2, 6, 12).double()
    mask = torch.tensor([[True, False, True, True, False, False], [True] * 6]) if masked else None
    with torch.no_grad():
        want = biased(update, biased(update, memory, x, mask), x, mask)
        torch.testing.assert_close(update(memory, x, mask=mask), want, rtol=0, atol=1e-12)


def test_slots_of_a_biased_update_start_at_their_bias_and_have_length_one() -> None:
    update = UPDATES["paper"]()
    memory, bias = update.initial(2), update.initial.weight
    torch.testing.assert_close(memory[1], bias / bias.norm(dim=-1, keepdim=True))
    for _ in range(3):
        memory = update(memory, torch.randn(2, 7, 16))
        torch.testing.assert_close(memory.norm(dim=-1), torch.ones(2, 5))


def test_a_slot_that_attends_to_itself_alone_keeps_its_raw_value_and_forgets_towards_its_initial_state() -> None:
    update, alone = UPDATES["paper"](), torch.zeros(2, 3, dtype=torch.bool)
    torch.nn.init.normal_(update.initial.weight, std=0.2)
    memory, bias = torch.nn.functional.normalize(torch.randn(2, 5, 16), dim=-1), update.initial.weight
    near = [(memory * update.initial(2)).sum(-1)]
    for _ in range(40):
        new = update.write(memory, torch.randn(2, 3, 16), alone)
        torch.testing.assert_close(new, torch.nn.functional.normalize(memory + bias, dim=-1))
        memory = new.detach()
        near.append((memory * update.initial(2)).sum(-1))
    assert bool((torch.stack(near).diff(dim=0) >= -1e-6).all())
    torch.testing.assert_close(memory, update.initial(2))  # the initial state is the terminal state


def test_a_slot_takes_the_value_with_the_highest_score_as_the_temperature_vanishes() -> None:
    update = BiasedMemoryUpdate(16, memory_slots=5, heads=1, temperature=1e-6).double()
    memory, x = update.initial(1), torch.randn(1, 3, 16).double() / 4
    q, own, keys = update.to_q(memory[0]), update.to_k(memory[0]), update.to_k(x[0])
    scores = torch.cat(((q * own).sum(-1, keepdim=True), q @ keys.T), dim=-1)
    values = torch.stack([torch.stack((slot, *update.to_v(x[0]))) for slot in memory[0]])
    best = values[torch.arange(5), scores.argmax(-1)] + update.initial.weight
    torch.testing.assert_close(update(memory, x)[0], torch.nn.functional.normalize(best, dim=-1))
    assert len(scores.argmax(-1).unique()) > 1


def test_a_biased_update_in_bfloat16_accumulates_in_float32() -> None:
    update = BiasedMemoryUpdate(16, memory_slots=5, heads=1, temperature=0.02).bfloat16()
    memory, x = update.initial(2), torch.randn(2, 300, 16).bfloat16()
    q, own, keys, values = (to(y).double() for to, y in zip(
        (update.to_q, update.to_k, update.to_k, update.to_v), (memory, memory, x, x), strict=True
    ))  # fmt: skip
    scores = torch.cat(((q * own).sum(-1, keepdim=True), q @ keys.transpose(1, 2)), dim=-1) / 4 / 0.02
    weights = scores.softmax(-1)
    attended = weights[..., :1] * memory.double() + weights[..., 1:] @ values
    want = torch.nn.functional.normalize(attended + update.initial.weight.double(), dim=-1)
    got = update(memory, x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), rtol=2**-7, atol=1e-4)  # one rounding


def test_gradients_of_a_biased_update_through_several_segments_are_right_to_second_order() -> None:
    update = BiasedMemoryUpdate(4, memory_slots=2, heads=2).double()
    torch.nn.init.normal_(update.initial.weight)
    mask = torch.tensor([[True, False, True]])

    def run(first: Tensor, second: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(update.named_parameters()), weights, strict=True))
        memory = torch.nn.functional.normalize(named["initial.weight"], dim=-1)[None]
        for x in (first, second):
            memory = torch.func.functional_call(update, named, (memory, x), {"mask": mask})
        return memory

    inputs = [torch.randn(1, 3, 4).double().requires_grad_() for _ in range(2)]
    weights = [parameter.detach().clone().requires_grad_() for parameter in update.parameters()]
    assert torch.autograd.gradcheck(run, (*inputs, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*inputs, *weights), fast_mode=True)
    memory = update.initial(1)
    for x in inputs:
        memory = update(memory, x, mask=mask)
    memory[..., 0].sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in update.parameters())


def test_a_biased_update_rejects_invalid_arguments() -> None:
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must lie in"):
            BiasedMemoryUpdate(16, memory_slots=5, temperature=temperature)
    with pytest.raises(ValueError, match=r"memory must be \(b, memory_slots, dim\) = \(2, 5, 16\)"):
        UPDATES["paper"]()(torch.randn(2, 4, 16), torch.randn(2, 3, 16))
    with pytest.raises(TypeError, match="memory must be"):
        UPDATES["paper"]()(None, torch.randn(2, 3, 16))


@pytest.mark.parametrize("cls", [InitialMemory, BiasedMemory])
def test_initial_memory_is_the_same_for_every_row(cls: type[InitialMemory]) -> None:
    initial = cls(3, 16)
    assert torch.equal(initial(2)[0], initial(2)[1])
    with pytest.raises(ValueError, match="batch"):
        initial(0)


@pytest.mark.parametrize("size", ["8", None, 8.0])
def test_sizes_of_another_type_raise(size: object) -> None:
    with pytest.raises(TypeError, match=f"dim must be an int, got dim={size!r}"):
        MemoryUpdate(size)
    with pytest.raises(TypeError, match=f"memory_slots must be an int, got memory_slots={size!r}"):
        InitialMemory(size, 8)
