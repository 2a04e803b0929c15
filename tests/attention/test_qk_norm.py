"""Query-key norms equal explicit formulas, with weights that differ by feature and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import FullAttention, LanguageModel, RelativeBias, Rotary
from tests.formulas import relative_error

DIM = 32
SMALL: dict[str, Any] = {"heads": 4, "dim_head": 8, "kv_heads": 2}
KINDS = ("rms", "l2")


def moved(block: FullAttention) -> FullAttention:
    """The block with norms that are not those of the first step."""
    for norm in (block.q_norm, block.k_norm):
        assert norm is not None
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 3.0)
    return block.eval()


def formula(block: FullAttention, x: Tensor, kind: str, eps: float = 1e-6, scale: float = 8**-0.5) -> Tensor:
    """The layer head by head, with rotary between the norms and the scores."""
    q, k, v = (F.linear(x, block.to_qkv.part(name)) for name in "qkv")
    outs = []
    for head in range(4):
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        pair = q[..., own], k[..., shared]
        if kind == "rms":
            weights = block.q_norm.weight, block.k_norm.weight  # type: ignore[union-attr]
            pair = tuple(
                y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * w for y, w in zip(pair, weights, strict=True)
            )
        else:
            pair = tuple(y / y.norm(dim=-1, keepdim=True) for y in pair)
            scale = block.q_norm.weight[head]  # type: ignore[union-attr, assignment, index]
        if block.rotary is not None:
            pair = tuple(block.rotary(y) for y in pair)
        scores = scale * pair[0] @ pair[1].transpose(1, 2)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[..., shared])
    return F.linear(torch.cat(outs, -1), block.to_out.weight)


@pytest.mark.parametrize("rotary", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_the_formula(kind: str, rotary: bool | None) -> None:
    block = moved(FullAttention(DIM, qk_norm=kind, rotary=rotary, **SMALL))
    if block.rotary is not None:  # the table of angles is float32
        tolerance = 1e-5
    else:
        block, tolerance = block.double(), 1e-12
    x = torch.randn(2, 9, DIM, dtype=block.to_out.weight.dtype, requires_grad=True)
    leaves = [x, *block.q_norm.parameters(), *block.k_norm.parameters()]  # type: ignore[union-attr]
    cotangent = torch.randn_like(x)
    out, want = block(x), formula(block, x, kind)
    assert relative_error(out, want) < tolerance
    found, wanted = (torch.autograd.grad((y * cotangent).sum(), leaves) for y in (out, want))
    for got, expected in zip(found, wanted, strict=True):
        assert relative_error(got, expected) < tolerance


def test_the_weights_are_those_of_qwen3() -> None:
    block = FullAttention(DIM, qk_norm="rms", **SMALL)
    assert {name: tuple(p.shape) for name, p in block.named_parameters() if "norm" in name} == {
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
    }


def test_the_learned_scale_is_per_query_head_and_starts_at_scale() -> None:
    for scale, first in ((None, 8**0.5), (5.0, 5.0)):
        block = FullAttention(DIM, qk_norm="l2", scale=scale, **SMALL)
        assert {name: p.tolist() for name, p in block.named_parameters() if "norm" in name} == {
            "q_norm.weight": pytest.approx([first] * 4)
        }
        x = torch.randn(1, 6, DIM)
        assert relative_error(block(x), formula(block, x, "l2")) < 1e-5


def test_both_norms_give_the_same_scores_at_first() -> None:
    rms, l2 = (FullAttention(DIM, qk_norm=kind, qk_norm_eps=1e-12, **SMALL) for kind in KINDS)
    l2.load_state_dict({name: value for name, value in rms.state_dict().items() if "norm" not in name}, strict=False)
    x = torch.randn(2, 9, DIM)
    torch.testing.assert_close(l2(x), rms(x))


def test_eps_is_added_to_the_mean_square() -> None:
    block = moved(FullAttention(DIM, qk_norm="rms", qk_norm_eps=0.5, **SMALL))
    x = torch.randn(1, 5, DIM)
    assert relative_error(block(x), formula(block, x, "rms", eps=0.5)) < 1e-5
    assert relative_error(block(x), formula(block, x, "rms")) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_documents_equal_the_separate_sequences(kind: str) -> None:
    block = moved(FullAttention(DIM, qk_norm=kind, rotary=Rotary(), **SMALL))
    x = torch.randn(1, 11, DIM)
    want = block(x)
    out, state = block.step(x[:, :4])
    outs = [out]
    for part in (x[:, 4:5], x[:, 5:]):
        out, state = block.step(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-5, rtol=1e-5)
    packed = torch.cat((x, x[:, :3]), 1)
    ids = torch.tensor([[0] * 11 + [1] * 3])
    torch.testing.assert_close(block(packed, document_ids=ids)[:, :11], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(packed, document_ids=ids)[:, 11:], block(x[:, :3]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_tokens_in_half_precision_have_finite_gradients(kind: str, dtype: torch.dtype) -> None:
    block = FullAttention(DIM, qk_norm=kind, **SMALL).to(dtype)
    x = torch.zeros(1, 4, DIM, dtype=dtype, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_survives_saving_and_meta_construction(kind: str, tmp_path: Any) -> None:
    attention = ("full", {"qk_norm": kind, "qk_norm_eps": 1e-5, **SMALL})
    model = LanguageModel(num_tokens=11, dim=DIM, depth=1, attention=attention).eval()
    for name, parameter in model.named_parameters():
        if "q_norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    tokens = torch.randint(11, (2, 7))
    model.save(tmp_path / "model")
    torch.testing.assert_close(LanguageModel.load(tmp_path / "model")(tokens), model(tokens), rtol=0, atol=0)
    with torch.device("meta"):
        empty = LanguageModel(num_tokens=11, dim=DIM, depth=1, attention=attention)
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(empty.eval()(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"qk_norm": "layer"}, ValueError, "qk_norm must be one of"),
        ({"qk_norm": True}, TypeError, "qk_norm must be of type str or None"),
        ({"qk_norm": "rms", "qk_norm_eps": 0.0}, ValueError, "qk_norm_eps must be positive"),
        ({"qk_norm": "rms", "qk_norm_eps": None}, TypeError, "qk_norm_eps must be a number"),
        ({"qk_norm": "l2", "scale": -1.0}, ValueError, "scale must be positive"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FullAttention(DIM, **SMALL, **options)


def test_a_pattern_combines_with_norms() -> None:
    pattern = torch.ones(9, 9, dtype=torch.bool)
    for kind in KINDS:
        block = moved(FullAttention(DIM, qk_norm=kind, pattern=pattern, **SMALL))
        x = torch.randn(1, 9, DIM)
        assert relative_error(block(x), formula(block, x, kind)) < 1e-5


def test_no_learned_bias_keeps_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    kernel = F.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(True)
        return kernel(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    FullAttention(DIM, qk_norm="rms", **SMALL)(torch.randn(1, 9, DIM))
    FullAttention(DIM, qk_norm="l2", bias=RelativeBias(4), **SMALL)(torch.randn(1, 9, DIM))
    assert len(calls) == 1
