"""Decoding states are values: their contents never change when later steps append to the shared buffer."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attention_zoo import (
    CrossAttention,
    FullAttention,
    KeyValueState,
    RelativeBias,
    RelativeGateAttention,
    TextImageLayout,
)
from attention_zoo.layers import TokenShift
from attention_zoo.layers import state as state_module
from attention_zoo.layers.state import MIN_BUFFER, State, count_tokens
from tests.cases import CASES, DIM, Case, one_per_block

MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
Held = tuple[Tensor, Tensor]


def tokens(count: int, *, batch: int = 2) -> Held:
    """Keys and values of some tokens."""
    return torch.randn(batch, 2, count, 5), torch.randn(batch, 2, count, 3)


def joined(first: Held, second: Held) -> Held:
    return torch.cat((first[0], second[0]), dim=2), torch.cat((first[1], second[1]), dim=2)


def grown(*counts: int) -> tuple[list[KeyValueState], list[Held]]:
    """A chain of states, each some tokens longer, and what each of them should hold."""
    keys, values = tokens(counts[0])
    states, held = [KeyValueState(keys, values)], [(keys.clone(), values.clone())]
    for count in counts[1:]:
        new = tokens(count)
        states.append(states[-1].append(*new, None))
        held.append(joined(held[-1], new))
    return states, held


def assert_holds(state: KeyValueState, held: Held) -> None:
    assert torch.equal(state.keys, held[0])
    assert torch.equal(state.values, held[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [(1, 1, 1), (7, 1, 200, 1), (63, 1, 1), (1, 63, 1), (64, 64, 64)])
def test_states_of_a_chain_keep_their_contents(mode: str, counts: tuple[int, ...]) -> None:
    with MODES[mode]():
        states, held = grown(*counts)
        for state, want in zip(states, held, strict=True):
            assert_holds(state, want)
            assert state.length == want[0].shape[2]


@pytest.mark.parametrize("mode", MODES)
def test_stepping_an_older_state_keeps_newer_states(mode: str) -> None:
    with MODES[mode]():
        states, held = grown(5, 1, 1, 1)
        other, more = tokens(2), tokens(1)
        branch = states[1].append(*other, None)
        main = states[3].append(*more, None)
        twig = branch.append(*more, None)
        for state, want in zip(states, held, strict=True):
            assert_holds(state, want)
        assert_holds(branch, joined(held[1], other))
        assert_holds(main, joined(held[3], more))
        assert_holds(twig, joined(joined(held[1], other), more))


@torch.no_grad()
def test_appending_without_gradients_copies_rarely() -> None:
    state = KeyValueState(*tokens(1))
    buffers = set()
    for _ in range(500):
        state = state.append(*tokens(1), None)
        buffers.add(state.keys.untyped_storage().data_ptr())
    assert len(buffers) <= 4  # buffers for 64, 130, 262 and 526 tokens


@torch.no_grad()
def test_appending_a_token_copies_only_that_token(monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = grown(100, 1)
    monkeypatch.setattr(state_module.Buffer, "copy_of", lambda *args: pytest.fail("the whole state was copied"))
    states[-1].append(*tokens(1), None)


def test_states_recorded_with_gradients_can_be_differentiated_later() -> None:
    parts = [tuple(part.requires_grad_() for part in tokens(count)) for count in (3, 2, 1)]
    state, total = KeyValueState(*parts[0]), torch.zeros(())
    for part in parts[1:]:
        total = total + state.keys.square().sum()  # its backward needs the keys as they are now
        state = state.append(*part, None)
    (total + state.keys.sum() + state.values.square().sum()).backward()
    for uses, (keys, values) in zip((2, 1, 0), parts, strict=True):
        torch.testing.assert_close(keys.grad, uses * 2 * keys + 1)
        torch.testing.assert_close(values.grad, 2 * values)


def test_steps_recorded_one_by_one_have_the_gradients_of_the_full_pass() -> None:
    block, x = FullAttention(12, heads=2, dim_head=6).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    want = torch.autograd.grad(block(x), list(block.parameters()), cotangent)
    outs, state = [], None
    for t in range(7):
        out, state = block.step(x[:, t : t + 1], state)
        outs.append(out)
    got = torch.autograd.grad(torch.cat(outs, 1), list(block.parameters()), cotangent)
    for got_grad, want_grad in zip(got, want, strict=True):
        torch.testing.assert_close(got_grad, want_grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_state_created_in_one_grad_mode_continues_in_another(first: str, second: str) -> None:
    with MODES[first]():
        states, held = grown(3, 1, 1)
    with MODES[second]():
        new = tokens(1)
        longer = states[-1].append(*new, None)
        again = longer.append(*new, None)
        want = joined(held[-1], new)
        assert_holds(longer, want)
        assert_holds(again, joined(want, new))
    with MODES[first]():
        assert_holds(states[-1].append(*new, None), want)
        assert_holds(states[-1], held[-1])


def test_layer_decoded_in_inference_mode_can_be_trained_afterwards() -> None:
    block = FullAttention(16, heads=2, dim_head=4).eval()
    x = torch.randn(1, 6, 16)
    with torch.inference_mode():
        _, state = block.step(x[:, :3])
        _, state = block.step(x[:, 3:4], state)
    with torch.no_grad():
        out, state = block.step(x[:, 4:5], state)
    recorded, _ = block.step(x[:, 5:6], state)
    recorded.sum().backward()
    torch.testing.assert_close(torch.cat((out, recorded), 1), block(x)[:, 4:], rtol=1e-5, atol=1e-6)


def test_state_fills_missing_masks_with_valid_tokens() -> None:
    late = KeyValueState(*tokens(2)).append(*tokens(1), None).append(*tokens(2), torch.tensor([[0, 1], [1, 1]]).bool())
    assert late.mask.tolist() == [[True, True, True, False, True], [True] * 5]
    early = KeyValueState(*tokens(2), torch.tensor([[0, 1], [1, 1]]).bool()).append(*tokens(1), None)
    assert early.mask.tolist() == [[False, True, True], [True, True, True]]
    assert KeyValueState(*tokens(2)).append(*tokens(1), None).mask is None


@pytest.mark.parametrize("mode", MODES)
def test_reorder_selects_and_repeats_rows(mode: str) -> None:
    with MODES[mode]():
        states, held = grown(3, 1)
        index = torch.tensor([1, 1, 0])
        beams = states[-1].reorder(index)
        assert_holds(beams, (held[-1][0][index], held[-1][1][index]))
        beams.append(*tokens(1, batch=3), None)
        assert_holds(states[-1], held[-1])


def test_reorder_selects_rows_of_the_mask() -> None:
    mask = torch.tensor([[False, True], [True, True]])
    assert torch.equal(KeyValueState(*tokens(2), mask).reorder(torch.tensor([1, 0])).mask, mask.flip(0))


@torch.no_grad()
def test_nbytes_excludes_spare_buffer_space() -> None:
    states, _ = grown(3, 1)
    assert states[-1].nbytes == 2 * 2 * 4 * (5 + 3) * 4  # b, h, n, features of key and value, bytes of a float32
    masked = KeyValueState(*tokens(4), torch.ones(2, 4, dtype=torch.bool))
    assert masked.nbytes == states[-1].nbytes + 2 * 4


def test_detach_keeps_values_and_drops_the_graph() -> None:
    keys, values = (part.requires_grad_() for part in tokens(3))
    state = KeyValueState(keys * 1, values * 1).append(*tokens(1), None)
    free = state.detach()
    assert not free.keys.requires_grad
    assert state.keys.requires_grad
    assert_holds(free, (state.keys, state.values))


def by_torch(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(state: State) -> State:
    return pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("mode", MODES)
def test_copied_state_is_equal_and_independent(mode: str, copied) -> None:
    with MODES[mode]():
        states, held = grown(3, 1)
        twin = copied(states[-1])
        assert_holds(twin, held[-1])
        new = tokens(1)
        longer = twin.append(*new, None)
        states[-1].append(*tokens(2), None)
        assert_holds(longer, joined(held[-1], new))
        assert_holds(twin, held[-1])
        assert_holds(states[-1], held[-1])


@torch.no_grad()
def test_pickled_state_excludes_spare_buffer_space() -> None:
    states, _ = grown(3, 1)
    assert len(pickle.dumps(states[-1])) < MIN_BUFFER * 2 * 2 * 5 * 4


def test_state_is_a_pytree_of_its_tensors() -> None:
    with torch.no_grad():
        states, held = grown(3, 1)
    leaves, spec = pytree.tree_flatten(states[-1])
    assert [tuple(leaf.shape) for leaf in leaves if leaf is not None] == [(2, 2, 4, 5), (2, 2, 4, 3)]
    assert_holds(pytree.tree_unflatten(leaves, spec), held[-1])


@torch.no_grad()
def test_state_passes_through_compiled_code() -> None:
    def longer(state: KeyValueState, keys: Tensor, values: Tensor) -> KeyValueState:
        return state.append(keys, values, None)

    states, held = grown(3, 1)
    new = tokens(2)
    got = torch.compile(longer, fullgraph=True, backend="aot_eager")(states[-1], *new)
    assert_holds(got, joined(held[-1], new))
    assert_holds(states[-1], held[-1])


def test_token_count_is_a_tensor_without_axes() -> None:
    assert count_tokens(None, 3, torch.device("cpu")).item() == 3
    assert count_tokens(torch.tensor(3), 2, torch.device("cpu")).item() == 5
    assert count_tokens(None, 3, torch.device("cpu")).ndim == 0


DECODED = [case for case in CASES if case.causal]


def step_inputs(case: Case, count: int) -> Tensor:
    streams = case.options.get("streams", 1)
    return torch.randn((2, streams, count, DIM) if streams > 1 else (2, count, DIM))


@pytest.mark.parametrize("case", one_per_block(DECODED))
@pytest.mark.parametrize("mode", MODES)
def test_a_first_state_does_not_share_memory_with_the_arguments(mode: str, case: Case) -> None:
    with MODES[mode]():
        block = case.make().eval()
        x, new = step_inputs(case, 4), step_inputs(case, 1)
        mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
        options = case.options["inputs"](2, 4) if "inputs" in case.options else {}
        _, state = block.step(x, mask=mask, **options)
        want, _ = block.step(new, state)
        with torch.no_grad():
            for tensor in (x, mask, *options.values()):
                tensor.zero_()
        got, _ = block.step(new, state)
        assert torch.equal(got, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["full", "cosine_sim", "cross", "talking_heads", "relative_gate", "conv"])
def test_a_state_of_another_dtype_is_rejected_by_name(name: str, mode: str) -> None:
    case = next(case for case in CASES if case.name == name)
    options = case.options["inputs"](2, 4) if name == "cross" else {}
    with MODES[mode]():
        block = case.make().eval()
        with torch.autocast("cpu", torch.bfloat16):
            _, state = block.step(step_inputs(case, 4), **options)
            block.step(step_inputs(case, 1), state)
        with pytest.raises(
            TypeError, match=r"state must be of the dtype of the new tokens, torch\.float32, got .*bfloat16"
        ):
            block.step(step_inputs(case, 1), state)


def test_a_state_of_token_shift_in_another_dtype_is_rejected_by_name() -> None:
    shift = TokenShift(nn.Identity(), 8, layout=TextImageLayout(text_len=4, height=3, width=5))
    _, state = shift.step(torch.randn(2, 3, 8).bfloat16())
    with pytest.raises(TypeError, match=r"state must be of the dtype of the new tokens"):
        shift.step(torch.randn(2, 1, 8), state)


@pytest.mark.parametrize("name", ["context", "context_mask"])
def test_a_context_is_rejected_after_the_first_step(name: str) -> None:
    block, x, context = CrossAttention(8, heads=2, dim_head=4), torch.randn(2, 1, 8), torch.randn(2, 3, 8)
    _, state = block.step(x, context=context)
    with pytest.raises(ValueError, match=f"{name} must be given with the first step only"):
        block.step(x, state, **{name: context if name == "context" else torch.ones(2, 3, dtype=torch.bool)})


def test_relative_gate_attention_drops_weights_in_steps_of_training_mode() -> None:
    block, x = RelativeGateAttention(8, heads=2, dim_head=4, dropout=0.5), torch.randn(2, 6, 8)
    torch.manual_seed(0)
    dropped, _ = block.step(x)
    torch.manual_seed(0)
    assert torch.equal(block(x), dropped)
    assert not torch.equal(block.eval().step(x)[0], dropped)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_a_compiled_step_with_a_relative_bias_is_not_recompiled_for_every_token(size: int) -> None:
    torch.compiler.reset()
    block, x = FullAttention(8, heads=2, dim_head=4, bias=RelativeBias(2)).eval(), torch.randn(2, 42, 8)
    graphs: list[object] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step, state, outs = torch.compile(block.step, fullgraph=True, backend=backend), None, []
    for part in x.split(size, dim=1):
        out, state = step(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), block(x))
    assert len(graphs) <= 3


BAD_INDICES = {
    "too large": (
        torch.tensor([0, 2]),
        ValueError,
        r"index must lie in 0 \.\.\. 1, the rows of the state, got 0 \.\.\. 2",
    ),
    "negative": (torch.tensor([-1]), ValueError, r"got -1 \.\.\. -1"),
    "two axes": (torch.tensor([[0]]), ValueError, r"index must be \(b',\), got shape \(1, 1\)"),
    "floats": (torch.tensor([0.0]), TypeError, "index must be an integer tensor, got dtype torch.float32"),
    "a mask": (torch.tensor([True, False]), TypeError, "index must be an integer tensor, got dtype torch.bool"),
    "a list": ([0, 1], TypeError, "index must be an integer tensor, got list"),
}


@pytest.mark.parametrize(("index", "error", "message"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_reorder_rejects_a_bad_index_by_name(index: Tensor, error: type[Exception], message: str) -> None:
    states, _ = grown(3, 1)
    with pytest.raises(error, match=message):
        states[-1].reorder(index)


def test_reorder_accepts_any_integer_dtype_and_no_rows() -> None:
    states, held = grown(3, 1)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        beams = states[-1].reorder(torch.tensor([1, 0], dtype=dtype))
        assert_holds(beams, (held[-1][0].flip(0), held[-1][1].flip(0)))
    assert states[-1].reorder(torch.empty(0, dtype=torch.int64)).keys.shape[0] == 0
