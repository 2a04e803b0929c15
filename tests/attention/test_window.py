"""Window attention as a layer: its state, its equality with a dense mask, and errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from attention_zoo import (
    AxialAttention,
    ConvAttention,
    FullAttention,
    LanguageModel,
    Rotary,
    Stack,
    TextImageLayout,
    WindowAttention,
    generate,
    window_mask,
)
from attention_zoo.layers import WindowState

DIM = 32
SMALL: dict[str, Any] = {"heads": 4, "dim_head": 8, "kv_heads": 2, "rotary": True, "qk_norm": "rms"}


def block(window: int = 9, sinks: int = 2, **options: Any) -> WindowAttention:
    return WindowAttention(DIM, window=window, sinks=sinks, **{**SMALL, **options}).eval()


def full(layer: WindowAttention, **options: Any) -> FullAttention:
    """Full attention with the weights of a window layer."""
    other = FullAttention(DIM, **{**SMALL, **options})
    other.load_state_dict(layer.state_dict())
    return other.eval()


@pytest.mark.parametrize("options", [{}, {"output_gate": "silu", "qkv_bias": True, "out_bias": True}, {"scale": 0.3}])
@pytest.mark.parametrize(("window", "sinks"), [(9, 0), (9, 2), (1, 4), (70, 3), (400, 2)])
def test_the_layer_equals_full_attention_under_the_mask(window: int, sinks: int, options: dict[str, Any]) -> None:
    layer, x = block(window, sinks, **options), torch.randn(2, 300, DIM)
    pairs = window_mask(300, 300, window=window, sinks=sinks, causal=True)
    torch.testing.assert_close(layer(x), full(layer, **options)(x, attn_mask=pairs), atol=1e-5, rtol=1e-5)


def test_a_window_that_covers_the_sequence_is_full_attention() -> None:
    layer, x = block(50, 0), torch.randn(2, 40, DIM)
    torch.testing.assert_close(layer(x), full(layer)(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("masked", [False, True])
def test_bytes_of_the_state_stay_constant_past_the_window_and_the_sinks(masked: bool, mode: Any) -> None:
    layer, state, sizes = block(9, 3), None, []
    mask = torch.ones(1, 1, dtype=torch.bool) if masked else None
    with mode():
        for _ in range(60):
            _, state = layer.step(torch.randn(1, 1, DIM), state, mask=mask)
            sizes.append(state.nbytes)
        for size in (100, 1, 7):
            _, state = layer.step(torch.randn(1, size, DIM), state)
            sizes.append(state.nbytes)
    assert state is not None
    assert state.length == 168
    assert sizes[:12] == sorted(sizes[:12])
    assert set(sizes[11:]) == {sizes[-1]}
    assert sizes[-1] < 2 * (9 + 3) * 2 * 8 * 4 + 100


@pytest.mark.parametrize("sizes", [(200, 1, 1), (1, 200, 1), (60, 60, 60, 22), (3, 1, 1, 190, 7), (64, 64, 74)])
@pytest.mark.parametrize(("window", "sinks"), [(20, 0), (20, 3), (1, 1), (5, 40), (70, 4)])
def test_steps_longer_than_the_window_equal_forward(window: int, sinks: int, sizes: tuple[int, ...]) -> None:
    layer, x = block(window, sinks), torch.randn(2, 202, DIM)
    for mask in (None, torch.rand(2, 202) < 0.7):
        start, state, outs = 0, None, []
        with torch.no_grad():
            want = layer(x, mask=mask)
            for size in sizes:
                part = slice(start, start + size)
                out, state = layer.step(x[:, part], state, mask=None if mask is None else mask[:, part])
                outs.append(out)
                start += size
        valid = torch.ones(2, 202, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(torch.cat(outs, 1)[valid], want[:, :start][valid], atol=1e-5, rtol=1e-5)


def test_old_states_keep_their_tokens_through_the_shared_buffer() -> None:
    layer, x = block(9, 2), torch.randn(1, 40, DIM)
    states: list[Any] = [None]
    with torch.inference_mode():
        want = layer(x)
        for token in range(40):
            states.append(layer.step(x[:, token : token + 1], states[-1])[1])
        for token in (3, 12, 30):  # go on from an old state, with other tokens and then with the same
            layer.step(torch.randn(1, 5, DIM), states[token])
            out, _ = layer.step(x[:, token : token + 4], states[token])
            torch.testing.assert_close(out, want[:, token : token + 4], atol=1e-5, rtol=1e-5)


def test_left_padding_moves_no_sink() -> None:
    layer, x = block(5, 2), torch.randn(1, 30, DIM)
    padded = torch.cat((torch.randn(1, 11, DIM), x), 1)
    mask = torch.arange(41)[None] >= 11
    torch.testing.assert_close(layer(padded, mask=mask)[:, 11:], layer(x), atol=1e-5, rtol=1e-5)


def test_a_state_is_copied_pickled_and_reordered() -> None:
    layer, x = block(9, 2), torch.randn(3, 20, DIM)
    mask = torch.rand(3, 20) < 0.8
    with torch.no_grad():
        _, state = layer.step(x[:, :19], mask=mask[:, :19])
        want, _ = layer.step(x[:, 19:], state)
        for same in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.detach()):
            assert isinstance(same, WindowState)
            assert same.length == 19
            assert torch.equal(layer.step(x[:, 19:], same)[0], want)
        index = torch.tensor([2, 0])
        torch.testing.assert_close(layer.step(x[index, 19:], state.reorder(index))[0], want[index])


def test_a_layer_refuses_the_state_of_another_batch_or_layer() -> None:
    layer, x = block(), torch.randn(2, 3, DIM)
    _, state = layer.step(x)
    with pytest.raises(ValueError, match="state must come from this layer and batch"):
        layer.step(x[:1], state)
    _, other = full(layer).step(x)
    with pytest.raises(TypeError, match="state must be a WindowState"):
        layer.step(x, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_state_holds_no_memory_of_the_prompt(mode: Any) -> None:
    held = []
    for prompt in (50, 5000):
        layer = block(9, 3)
        with mode():
            _, state = layer.step(torch.randn(1, prompt, DIM))
        storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage() for leaf in tree_leaves(state.detach())}
        held.append(sum(storage.nbytes() for storage in storages.values()))
    assert held[0] == held[1]


@pytest.mark.parametrize("other", [(9, 1), (4, 3), (3, 1), (4, 0)])
def test_a_layer_refuses_the_state_of_another_window(other: tuple[int, int]) -> None:
    x = torch.randn(2, 12, DIM)
    _, state = block(4, 1).step(x)
    with pytest.raises(ValueError, match="state must come from this layer and batch"):
        block(*other).step(x[:, :1], state)


def test_models_take_windows_by_name_save_them_and_generate(tmp_path: Path) -> None:
    attention = [("window", {"window": 6, "sinks": 2, "kv_heads": 2, "qk_norm": "rms"}), "full"]
    model = LanguageModel(num_tokens=11, dim=DIM, depth=2, heads=4, dim_head=8, attention=attention).eval()
    assert isinstance(model.stack.layers[0].sublayers[0].block, WindowAttention)
    tokens = torch.randint(11, (1, 20))
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path).eval()(tokens), model(tokens))
    found = generate(model, tokens, 15, temperature=0.0)
    for _ in range(15):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found[:, -15:], tokens[:, -15:])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sinks": 4}, TypeError, "window"),
        ({"window": None, "sinks": 4}, TypeError, "window must be an int, got window=None"),
        ({"window": 0}, ValueError, "window must be at least 1, got window=0"),
        ({"window": -3}, ValueError, "window must be at least 1"),
        ({"window": 4, "sinks": -1}, ValueError, "sinks must be at least 0"),
        ({"window": 4, "sinks": None}, TypeError, "sinks must be an int"),
        ({"window": 4, "kv_heads": 3}, ValueError, "kv_heads must divide heads"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WindowAttention(DIM, **options)


def test_a_model_names_the_window_that_is_missing() -> None:
    with pytest.raises((TypeError, ValueError), match="window"):
        Stack(DIM, 1, attention=("window", {"sinks": 4}))


@pytest.mark.parametrize(("height", "width"), [(1, 12), (12, 1)])
def test_convolution_over_one_row_or_column_points_to_window_attention(height: int, width: int) -> None:
    layout = TextImageLayout(text_len=0, height=height, width=width)
    with pytest.raises(ValueError, match=r"layout must have several rows and columns.*WindowAttention"):
        ConvAttention(DIM, layout=layout)
    AxialAttention(DIM, layout=layout)
    ConvAttention(DIM, layout=TextImageLayout(text_len=3, height=1, width=1))


def test_gradients_through_steps_reach_every_token_in_the_window() -> None:
    layer = WindowAttention(DIM, window=4, sinks=1, heads=2, dim_head=8, rotary=Rotary())
    x = torch.randn(1, 12, DIM, requires_grad=True)
    state, out = None, Tensor()
    for token in range(12):
        out, state = layer.step(x[:, token : token + 1], state)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    reached = gradient[0].abs().amax(-1) > 0
    assert reached.tolist() == [True] + [False] * 7 + [True] * 4
