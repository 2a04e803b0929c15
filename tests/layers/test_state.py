"""A decoding state is a value: what it holds never changes, however the keys and values behind it grow."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attention_zoo import FullAttention, KeyValueState
from attention_zoo.layers.state import SMALLEST_ROOM


def kv(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, n, 5), torch.randn(2, 3, n, 4)


def grown(total: int) -> tuple[KeyValueState, Tensor]:
    """A state grown token by token without gradients, and the keys that it must hold."""
    keys, values = kv(total)
    with torch.no_grad():
        state = KeyValueState(keys[:, :, :1], values[:, :, :1])
        for t in range(1, total):
            state = state.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], None)
    return state, keys


@pytest.mark.parametrize("total", [2, SMALLEST_ROOM - 1, SMALLEST_ROOM, SMALLEST_ROOM + 1, 3 * SMALLEST_ROOM])
def test_a_state_that_grew_in_place_holds_exactly_the_keys_it_was_given(total: int) -> None:
    state, keys = grown(total)
    assert torch.equal(state.keys, keys)
    assert state.length == total
    assert state.nbytes == 2 * 3 * total * (5 + 4) * 4


def test_appending_without_gradients_writes_into_the_same_storage_until_it_is_full() -> None:
    state, _ = grown(3)
    with torch.no_grad():
        longer = state.append(*kv(1), None)
    assert longer.keys.data_ptr() == state.keys.data_ptr()


def test_stepping_an_older_state_again_leaves_the_newer_one_as_it_was() -> None:
    state, _ = grown(5)
    with torch.no_grad():
        first = state.append(*kv(1), None)
        held = first.keys.clone()
        second = state.append(*kv(1), None)
        third = state.append(*kv(2), None)
    assert torch.equal(first.keys, held)
    assert not torch.equal(second.keys[:, :, 5:], first.keys[:, :, 5:])
    assert torch.equal(third.keys[:, :, :5], state.keys)


def test_with_gradients_recorded_the_same_append_concatenates_and_differentiates() -> None:
    state, _ = grown(4)
    keys, values = (t.requires_grad_() for t in kv(2))
    longer = state.append(keys, values, None)
    (gradient,) = torch.autograd.grad(longer.keys.square().sum(), keys)
    assert torch.equal(gradient, 2 * keys)
    with torch.no_grad():
        state.append(*kv(1), None)
    assert torch.equal(longer.keys[:, :, 4:], keys)


def test_a_buffer_made_in_inference_mode_can_be_stepped_after_that_mode() -> None:
    block = FullAttention(16, heads=2, dim_head=4).eval()
    x = torch.randn(1, 6, 16)
    with torch.inference_mode():
        _, state = block.step(x[:, :3])
        _, state = block.step(x[:, 3:4], state)
    with torch.no_grad():
        out, state = block.step(x[:, 4:5], state)
    recorded, _ = block.step(x[:, 5:6], state)
    recorded.sum().backward()
    whole = block(x)
    torch.testing.assert_close(torch.cat((out, recorded), 1), whole[:, 4:], rtol=1e-5, atol=1e-6)


def test_a_mask_that_comes_late_leaves_the_earlier_tokens_real() -> None:
    keys, values = kv(3)
    late = torch.tensor([[True], [False]])
    state = KeyValueState(keys, values).append(*kv(1), late)
    assert state.mask is not None
    assert state.mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    later = state.append(*kv(1), None)
    assert later.mask is not None
    assert later.mask[:, -1].all()


def test_reorder_picks_rows_and_may_repeat_them() -> None:
    state, keys = grown(3)
    picked = state.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(picked.keys, keys[[1, 1, 0]])
    with torch.no_grad():
        picked.append(torch.randn(3, 3, 1, 5), torch.randn(3, 3, 1, 4), None)
    assert torch.equal(state.keys, keys)


def test_detach_cuts_the_graph_and_keeps_the_numbers() -> None:
    keys, values = (t.requires_grad_() for t in kv(2))
    detached = KeyValueState(keys * 2, values).detach()
    assert not detached.keys.requires_grad
    assert torch.equal(detached.keys, keys * 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copy_holds_the_same_tokens_and_grows_on_its_own(copied) -> None:
    state, keys = grown(4)
    twin = copied(state)
    with torch.no_grad():
        state.append(*kv(1), None)
        longer = twin.append(torch.zeros(2, 3, 1, 5), torch.zeros(2, 3, 1, 4), None)
        again = state.append(*kv(1), None)
    assert torch.equal(longer.keys[:, :, :4], keys)
    assert not longer.keys[:, :, 4].any()
    assert again.keys[:, :, 4].any()


def test_a_state_is_a_pytree_of_its_tensors() -> None:
    state, keys = grown(3)
    leaves, spec = pytree.tree_flatten(state)
    assert [leaf.shape for leaf in leaves] == [(2, 3, 3, 5), (2, 3, 3, 4)]
    assert torch.equal(pytree.tree_unflatten(leaves, spec).keys, keys)
