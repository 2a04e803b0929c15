"""TalkingHeadsAttention: streams, mixes, numbers of heads, invalid arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import LanguageModel, MultiStreamTransformer, TalkingHeadsAttention
from attention_zoo.ops import softmax_attention


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_streams_are_mixed_only_within_a_batch_row(streams: int) -> None:
    block = TalkingHeadsAttention(16, heads=2, dim_head=4, streams=streams).eval()
    with torch.no_grad():
        block.pre_softmax.weight.add_(torch.randn_like(block.pre_softmax.weight))
    x = torch.randn(4, streams, 7, 16)
    changed = x.clone()
    changed[1] = torch.randn(streams, 7, 16)
    before, after = block(x), block(changed)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    one = x.clone()
    one[1, 0] = torch.randn(7, 16)
    if streams > 1:
        assert not torch.equal(block(one)[1, 1], before[1, 1])


def test_talking_heads_without_mixes_equal_gated_softmax_attention() -> None:
    block = TalkingHeadsAttention(16, heads=2, dim_head=4, pre_softmax=None, post_softmax=None).eval()
    x, mask = torch.randn(3, 11, 16), torch.rand(3, 11) < 0.7

    def heads(t: Tensor) -> Tensor:
        return t.view(3, 11, 2, 4).transpose(1, 2)

    q, k, v = (heads(part) for part in block.to_qkv(x).chunk(3, dim=-1))
    out = softmax_attention(q, k, v, mask=mask, causal=True)
    gated = out.transpose(1, 2) * block.to_gate(x).sigmoid()[..., None]
    torch.testing.assert_close(block(x, mask=mask), block.to_out(gated.flatten(2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_initial_mixes_are_the_identity(kind: str) -> None:
    torch.manual_seed(1)
    plain = TalkingHeadsAttention(16, heads=2, dim_head=4, pre_softmax=None, post_softmax=None)
    mixed = TalkingHeadsAttention(16, heads=2, dim_head=4, pre_softmax=kind, post_softmax=kind)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(mixed(x), plain(x), rtol=1e-5, atol=1e-6)


def test_initial_attention_of_talking_heads_is_nearly_uniform() -> None:
    block = TalkingHeadsAttention(64, heads=4, dim_head=64, causal=False)
    x = torch.randn(1, 64, 64)
    weights = block.attention_map(x)
    entropy = -(weights * weights.log()).sum(-1).mean()
    assert entropy > 4.0  # uniform over 64 keys is 4.16 nats; a scale of sqrt(64) gives 0.2


@pytest.mark.parametrize(
    ("shape", "streams", "message"),
    [
        ((2, 3, 5, 16), 2, r"x must be \(b, streams, n, dim\) with streams=2, dim=16, got shape \(2, 3, 5, 16\)"),
        ((2, 5, 16), 2, r"x must be \(b, streams, n, dim\).*got shape \(2, 5, 16\)"),
        ((2, 2, 5, 16), 1, r"x must be \(b, streams, n, dim\) with streams=1.*got shape \(2, 2, 5, 16\)"),
    ],
)
def test_talking_heads_reject_another_number_of_streams(shape: tuple[int, ...], streams: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TalkingHeadsAttention(16, heads=2, dim_head=4, streams=streams)(torch.randn(shape))


def test_talking_heads_reject_a_mask_with_a_stream_axis() -> None:
    block = TalkingHeadsAttention(16, heads=2, dim_head=4, streams=2)
    with pytest.raises(ValueError, match=r"mask must be \(b, n\) = \(3, 5\), got shape \(3, 2, 5\)"):
        block(torch.randn(3, 2, 5, 16), mask=torch.ones(3, 2, 5, dtype=torch.bool))


def test_talking_heads_reject_an_unknown_mix() -> None:
    with pytest.raises(
        ValueError, match=r"pre_softmax must be one of \['linear', 'mlp'\], got pre_softmax='linea'; did you mean"
    ):
        TalkingHeadsAttention(16, pre_softmax="linea")


SIZES: dict[str, Any] = {"heads": 6, "qk_heads": 2, "v_heads": 3, "dim_head": 4}


def random_mixes(layer: TalkingHeadsAttention) -> TalkingHeadsAttention:
    with torch.no_grad():
        for mixer in (layer.pre_softmax, layer.post_softmax):
            mixer.weight.copy_(torch.randn_like(mixer.weight))
    return layer


@pytest.mark.parametrize("streams", [1, 2])
def test_the_ungated_layer_of_the_paper_is_its_formula(streams: int) -> None:
    layer = random_mixes(TalkingHeadsAttention(16, streams=streams, output_gate=None, **SIZES)).eval()
    x = torch.randn(3, streams, 7, 16)
    want = torch.zeros(3, streams, 7, 16)
    w_q, w_k, w_v = (layer.to_qkv.part(name) for name in "qkv")
    for b in range(3):
        # projections of stream s in the slices s, in order of streams: (n, s h_k e), (n, s h_v e)
        q, k, v = (torch.cat([x[b, s] @ w.T for s in range(streams)], dim=-1) for w in (w_q, w_k, w_v))
        scores = torch.stack(
            [q[:, g : g + 4] @ k[:, g : g + 4].T / 2 for g in range(0, q.shape[1], 4)], dim=-1
        )  # (i, j, s h_k)
        mixed = (scores @ layer.pre_softmax.weight.T).masked_fill(
            torch.ones(7, 7).triu(1).bool()[..., None], -torch.inf
        )
        weights = mixed.softmax(dim=1) @ layer.post_softmax.weight.T  # (i, j, s h_v)
        heads = [weights[..., o] @ v[:, 4 * o : 4 * o + 4] for o in range(weights.shape[-1])]
        for s in range(streams):
            want[b, s] = torch.cat(heads[3 * s : 3 * s + 3], dim=-1) @ layer.to_out.weight.T
    got = layer(x if streams > 1 else x[:, 0])
    torch.testing.assert_close(got, want if streams > 1 else want[:, 0], rtol=1e-4, atol=1e-5)
    assert not any("gate" in name for name, _ in layer.named_parameters())


def test_the_attention_map_has_the_heads_of_the_values_and_the_attn_mask_those_of_the_softmax() -> None:
    layer, x = random_mixes(TalkingHeadsAttention(16, **SIZES)).eval(), torch.randn(2, 5, 16)
    attn_mask = torch.rand(2, 6, 5, 5) < 0.7
    weights = layer.attention_map(x, attn_mask=attn_mask)
    values, out = layer.values_and_output(x, attn_mask=attn_mask)
    assert weights.shape == (2, 3, 5, 5)
    torch.testing.assert_close(weights @ values, out, rtol=1e-4, atol=1e-5)
    softmax = layer.attention_map(x, attn_mask=attn_mask, mixed=False)
    assert softmax.shape == (2, 6, 5, 5)
    assert not softmax.masked_select(~attn_mask).any()
    with pytest.raises(ValueError, match=r"attn_mask must be .* h = 6, got shape \(2, 3, 5, 5\)"):
        layer(x, attn_mask=attn_mask[:, :3])


def test_a_gate_per_head_is_one_per_head_of_the_values() -> None:
    assert TalkingHeadsAttention(16, **SIZES).to_gate.out_features == 3
    assert TalkingHeadsAttention(16, output_gate_per="feature", **SIZES).to_gate.out_features == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_softmax": "mlp"}, "pre_softmax must be \"linear\" where qk_heads differs from heads, got 'mlp'"),
        ({"pre_softmax": None}, 'pre_softmax must be "linear" where qk_heads differs .* got None, qk_heads=2, heads=6'),
        ({"post_softmax": "mlp"}, 'post_softmax must be "linear" where v_heads differs .* v_heads=3, heads=6'),
        ({"qk_heads": 0}, "qk_heads must be at least 1, got qk_heads=0"),
    ],
)
def test_numbers_of_heads_that_cannot_be_mixed_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TalkingHeadsAttention(16, **{**SIZES, **options})


@pytest.mark.parametrize("model_class", [LanguageModel, MultiStreamTransformer])
def test_models_with_other_numbers_of_heads_save_load_and_generate(model_class: Any, tmp_path: Path) -> None:
    options = {**SIZES, "output_gate": None}
    model = model_class(num_tokens=11, dim=16, depth=1, attention=("talking_heads", options)).eval()
    model.save(tmp_path)
    loaded, tokens = model_class.load(tmp_path).eval(), torch.randint(11, (2, 6))
    assert torch.equal(loaded(tokens), model(tokens))
    whole = model.generate(tokens, max_new_tokens=5, temperature=0.0)
    for length in range(6, whole.shape[1]):
        assert torch.equal(model(whole[:, :length])[:, -1].argmax(-1), whole[:, length])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, -1)
    torch.testing.assert_close(model(tokens, document_ids=documents)[:, 3:], model(tokens[:, 3:]), rtol=1e-4, atol=1e-5)


def test_the_diversity_loss_of_a_model_has_gradients_to_fewer_heads() -> None:
    model = MultiStreamTransformer(num_tokens=11, dim=16, depth=1, attention=("talking_heads", SIZES))
    model.diversity(torch.randint(11, (2, 6))).backward()
    block = model.stack.layers[0].sublayers[0].block.block
    assert block.pre_softmax.weight.shape == (12, 4)
    assert block.pre_softmax.weight.grad.any()
