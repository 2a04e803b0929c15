"""`MemoryUpdate` and `InitialMemory`."""

from __future__ import annotations

import pytest
import torch

from attention_zoo import MemoryUpdate
from attention_zoo.layers import InitialMemory


def test_memory_slot_attends_to_itself_and_valid_tokens_only() -> None:
    update, memory, x = MemoryUpdate(16, heads=2, updates=3), torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    new = update(memory, x, mask=mask)
    changed, noise = memory.clone(), torch.where(mask[..., None], x, 1e3)
    changed[:, 1] = 7.0
    other = update(changed, noise, mask=mask)
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(other[:, kept], new[:, kept], rtol=0, atol=1e-6)
    assert not torch.allclose(other[:, 1], new[:, 1])


def test_padded_segment_does_not_change_the_memory_of_its_row() -> None:
    update, memory = MemoryUpdate(16, heads=2), torch.randn(2, 5, 16)
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


def test_initial_memory_is_the_same_for_every_row() -> None:
    initial = InitialMemory(3, 16)
    assert torch.equal(initial(2)[0], initial(2)[1])
    with pytest.raises(ValueError, match="batch"):
        initial(0)


@pytest.mark.parametrize("size", ["8", None, 8.0])
def test_sizes_of_another_type_raise(size: object) -> None:
    with pytest.raises(TypeError, match=f"dim must be an int, got dim={size!r}"):
        MemoryUpdate(size)
    with pytest.raises(TypeError, match=f"memory_slots must be an int, got memory_slots={size!r}"):
        InitialMemory(size, 8)
