"""TalkingHeadsAttention: streams, mixes, invalid arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo import TalkingHeadsAttention
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
