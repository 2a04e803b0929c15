"""CosineSimAttention with a learned scale: its start, its gradient, decoding, saving and invalid arguments."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attention_zoo
from attention_zoo import CosineSimAttention, LanguageModel, Rotary
from attention_zoo.training import tensor_parallel_plan
from tests.formulas import allowed_pairs, attend_one_by_one, relative_error, unit_slices

SIZES: dict[str, Any] = {"heads": 4, "dim_head": 8, "scale": "learned"}


def heads_of(layer: CosineSimAttention, x: Tensor) -> list[Tensor]:
    parts = [x @ layer.to_qkv.part(name).T for name in "qkv"]
    return [part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts]


@pytest.mark.parametrize(("length", "start"), [(2, 1.0), (3, math.log2(6)), (1024, math.log2(1024 * 1023))])
@pytest.mark.parametrize(("per", "count"), [("layer", 1), ("head", 4)])
def test_the_learned_scale_starts_at_log2_of_l_squared_minus_l(per: str, count: int, length: int, start: float) -> None:
    layer = CosineSimAttention(16, scale_per=per, scale_seq_len=length, **SIZES)
    assert layer.learned_scale is not None
    assert layer.learned_scale.tolist() == pytest.approx([start] * count)


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_layer_with_a_learned_scale_is_softmax_over_scaled_cosines(kv_heads: int, per: str) -> None:
    layer = CosineSimAttention(16, kv_heads=kv_heads, scale_per=per, scale_seq_len=7, **SIZES).double().eval()
    assert layer.learned_scale is not None
    scale = nn.Parameter(torch.rand(layer.learned_scale.shape, dtype=torch.float64) * 10)
    layer.learned_scale = scale
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = heads_of(layer, x)
    q, k = unit_slices(q, 1, 1e-12) * scale.view(-1, 1, 1), unit_slices(k, 1, 1e-12)
    allowed = allowed_pairs((2, 4, 7, 7), mask=None, causal=True)
    want = attend_one_by_one(q, k, v, allowed, None, 1.0).transpose(1, 2).flatten(2) @ layer.to_out.weight.T
    got = layer(x)
    assert relative_error(got, want) < 1e-12
    cotangent = torch.randn_like(want)
    (gradient,), (expected,) = (torch.autograd.grad(out, scale, cotangent) for out in (got, want))
    assert relative_error(gradient, expected) < 1e-10


@pytest.mark.parametrize("per", ["layer", "head"])
def test_the_scale_keeps_its_precision_in_half_precision_and_under_autocast(per: str) -> None:
    layer = CosineSimAttention(16, scale_per=per, scale_seq_len=2**20, **SIZES).eval()
    x = torch.randn(2, 33, 16).bfloat16().float()
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(layer(x), want) < 0.05
        q, k, _ = layer.project(x, 0)
    assert q.dtype == k.dtype == torch.bfloat16
    half = copy.deepcopy(layer).bfloat16()
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert relative_error(out, want) < 0.05


def test_a_learned_scale_runs_the_fused_kernel_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def record(*args: Any, **options: Any) -> Tensor:
        seen.append((args[3], options["is_causal"], options["scale"]))
        return sdpa(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    CosineSimAttention(16, scale_per="head", scale_seq_len=64, **SIZES)(torch.randn(1, 33, 16))
    assert seen == [(None, True, 1.0)]


def test_the_attention_map_and_the_steps_have_the_learned_scale() -> None:
    layer = CosineSimAttention(16, scale_per="head", scale_seq_len=64, rotary=Rotary(), **SIZES).eval()
    assert layer.learned_scale is not None
    x, mask = torch.randn(2, 9, 16), torch.rand(2, 9) < 0.7
    mask[:, 0] = True
    with torch.no_grad():
        layer.learned_scale.copy_(torch.tensor([1.0, 5.0, 20.0, -3.0]))
        values, out = layer.values_and_output(x, mask=mask)
        torch.testing.assert_close(layer.attention_map(x, mask=mask) @ values, out, rtol=1e-4, atol=1e-5)
        state, outs = None, []
        for token in range(9):
            step, state = layer.step(x[:, token : token + 1], state, mask=mask[:, token : token + 1])
            outs.append(step)
        torch.testing.assert_close(torch.cat(outs, dim=1), layer(x, mask=mask), rtol=1e-4, atol=1e-5)


def test_a_model_with_a_learned_scale_learns_it_saves_loads_and_generates(tmp_path: Path) -> None:
    options = {"scale": "learned", "scale_per": "head", "scale_seq_len": 32}
    model = LanguageModel(num_tokens=11, dim=16, depth=2, heads=4, dim_head=8, attention=("cosine_sim", options))
    tokens = torch.randint(11, (2, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.loss(tokens).backward()
    optimizer.step()
    scales = [block.learned_scale for block in model.modules() if isinstance(block, CosineSimAttention)]
    assert len(scales) == 2
    assert all((scale != math.log2(32 * 31)).any() for scale in scales)
    model.save(tmp_path)
    loaded = LanguageModel.load(tmp_path).eval()
    model.eval()
    assert torch.equal(loaded(tokens), model(tokens))
    assert torch.equal(
        loaded.generate(tokens, max_new_tokens=4, temperature=0.0),
        model.generate(tokens, max_new_tokens=4, temperature=0.0),
    )
    with attention_zoo.reference():
        assert relative_error(model(tokens), loaded(tokens)) < 1e-5


def test_heads_with_a_learned_scale_are_not_split_over_processes() -> None:
    layers = {"a": CosineSimAttention(16, scale_seq_len=8, **SIZES), "b": CosineSimAttention(16, heads=4, dim_head=8)}
    assert list(tensor_parallel_plan(nn.ModuleDict(layers), 2)) == ["b"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "learnt"}, TypeError, "scale must be a number, got scale='learnt': the only name is \"learned\""),
        ({"scale": "learned"}, ValueError, 'scale_seq_len must be given with scale="learned", got scale_seq_len=None'),
        ({"scale_seq_len": 9}, ValueError, 'must be None without scale="learned", got scale_seq_len=9, scale=8.0'),
        ({"scale_per": "head"}, ValueError, 'scale_per must be "layer" with a constant scale, got scale_per=.head.'),
        ({"scale": "learned", "scale_seq_len": 1}, ValueError, "scale_seq_len must be at least 2, got scale_seq_len=1"),
        ({"scale": "learned", "scale_seq_len": 8.0}, TypeError, "scale_seq_len must be an int, got scale_seq_len=8.0"),
        ({"scale": "learned", "scale_seq_len": 9, "scale_per": "token"}, ValueError, r"scale_per must be one of"),
        ({"scale": None}, TypeError, "scale must be a number"),
    ],
)
def test_options_of_the_scale_that_cannot_be_honoured_raise(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CosineSimAttention(16, **options)
