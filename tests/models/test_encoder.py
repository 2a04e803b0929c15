"""The encoder and the encoder-decoder: pooling, padding, positions, losses, cached decoding, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo import Encoder, EncoderDecoder, generate, image_to_patches
from attention_zoo.training import masked_token_loss

SMALL: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 2, "dim_head": 12}
POSITIONS = ["auto", "rotary", "t5", "learned", None]


def tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def padded(n: int, lengths: list[int]) -> Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pooling", ["mean", "class", None])
def test_padding_does_not_change_the_output(pooling: str | None, positions: str | None) -> None:
    model = Encoder(num_tokens=11, num_classes=3, pooling=pooling, positions=positions, max_seq_len=20, **SMALL).eval()
    rows, mask = tokens(2, 9), padded(9, [9, 5])
    out = model(rows, mask=mask)
    short = model(rows[1:, :5])
    assert out.shape == ((2, 3) if pooling else (2, 9, 3))
    torch.testing.assert_close(out[1] if pooling else out[1, :5], short[0], atol=1e-5, rtol=1e-5)


def test_every_token_attends_to_all_others() -> None:
    model = Encoder(num_tokens=11, pooling=None, **SMALL).eval()
    x = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=x)[0, 0].square()[0], x)
    assert (gradient.abs().amax(-1) > 0).all()


def test_mean_pooling_is_the_mean_over_valid_tokens_and_0_without_any() -> None:
    model = Encoder(num_tokens=11, **SMALL).eval()
    bare = Encoder(num_tokens=11, pooling=None, **SMALL).eval()
    bare.load_state_dict(model.state_dict())
    mask = padded(9, [9, 5, 0])
    features = bare(tokens(3, 9), mask=mask)
    pooled = model(tokens(3, 9), mask=mask)
    torch.testing.assert_close(pooled[:2], torch.stack((features[0].mean(0), features[1, :5].mean(0))))
    assert not pooled[2].any()


def test_class_pooling_reads_the_class_token() -> None:
    model = Encoder(num_tokens=11, pooling="class", **SMALL).eval()
    maps = model.attention_maps(tokens(2, 9))
    assert [tuple(one.shape) for one in maps] == [(2, 2, 10, 10)] * 2


def test_patches_are_the_squares_of_the_image_row_by_row() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = image_to_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    assert patches[1, 4].view(2, 2, 3).tolist() == images[1, :, 2:4, 2:4].movedim(0, -1).tolist()
    with pytest.raises(ValueError, match="divisible by size=4"):
        image_to_patches(images, 4)


@pytest.mark.parametrize("pooling", ["mean", None])
def test_loss_is_the_cross_entropy_of_valid_labels(pooling: str | None) -> None:
    model = Encoder(num_tokens=11, num_classes=3, pooling=pooling, **SMALL).eval()
    rows, mask = tokens(2, 9), padded(9, [9, 5])
    labels = tokens(2, seed=1) % 3 if pooling else tokens(2, 9, seed=1) % 3
    logits = model(rows, mask=mask)
    want = F.cross_entropy(logits, labels) if pooling else F.cross_entropy(logits[mask], labels[mask])
    torch.testing.assert_close(model.loss(rows, labels, mask=mask), want)


@pytest.mark.slow
def test_an_encoder_trains_on_masked_tokens() -> None:
    torch.manual_seed(0)
    model = Encoder(num_tokens=12, num_classes=12, pooling=None, **SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        rows = torch.randint(11, (16, 1)).expand(16, 8)  # every token tells all others
        loss = masked_token_loss(model, rows, 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 < 2 < losses[0]


def test_saved_encoders_compute_the_same(tmp_path: Any) -> None:
    model = Encoder(patch_dim=4, num_classes=10, pooling="class", positions="learned", max_seq_len=16, **SMALL).eval()
    model.save(tmp_path)
    patches = torch.randn(2, 16, 4)
    assert torch.equal(Encoder.load(tmp_path).eval()(patches), model(patches))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "neither input": ({"num_tokens": None}, ValueError, "num_tokens must be given exactly if patch_dim is not"),
    "both inputs": ({"patch_dim": 3}, ValueError, "num_tokens must be given exactly if patch_dim is not"),
    "pooling": ({"pooling": "max"}, ValueError, "pooling must be one of"),
    "a causal block": ({"attention": "gate_loop", "heads": None, "dim_head": None}, ValueError, "causal=False must be"),
    "a context": ({"attention": "cross"}, ValueError, "must not read a context"),
    "learned positions": ({"positions": "learned"}, ValueError, "max_seq_len must be given"),
    "other positions": ({"positions": "sin"}, ValueError, "positions must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_an_encoder_raise(case: str) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        Encoder(**{"num_tokens": 11, **SMALL, **options})


def test_bad_inputs_of_an_encoder_raise() -> None:
    model = Encoder(num_tokens=11, max_seq_len=8, **SMALL)
    with pytest.raises(ValueError, match=r"inputs must lie in 0 \.\.\. num_tokens - 1 = 10"):
        model(tokens(1, 4) + 11)
    with pytest.raises(ValueError, match="inputs must fit max_seq_len=8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match="loss needs a classifier"):
        model.loss(tokens(1, 4), tokens(1))
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(1,\)"):
        Encoder(num_tokens=11, num_classes=2, **SMALL).loss(tokens(1, 4), tokens(1, 4))
    with pytest.raises(ValueError, match=r"inputs must be \(b, n, dim\) with dim=4"):
        Encoder(patch_dim=4, **SMALL)(torch.zeros(1, 4, 5))


def pair(**options: Any) -> EncoderDecoder:
    sizes = {"num_tokens": 11, "source_num_tokens": 13, "dim": 24, "enc_depth": 2, "dec_depth": 2}
    return EncoderDecoder(**{**sizes, "heads": 2, "dim_head": 12, **options}).eval()


DECODERS: dict[str, dict[str, Any]] = {
    "full": {},
    "t5": {"positions": "t5"},
    "a recurrence in the decoder": {"dec_attention": ["gate_loop", "full"]},
    "others": {"attention": "cosine_sim", "dec_attention": "talking_heads", "norm": "rms", "residual": "sandwich"},
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("split", [[1] * 7, [3, 4], [7]])
def test_cached_decoding_equals_the_full_pass(name: str, split: list[int]) -> None:
    model = pair(**DECODERS[name])
    source, target = tokens(2, 9), tokens(2, 7)
    mask, target_mask = padded(9, [9, 4]), padded(7, [7, 5]).flip(1)
    want = model(source, target, mask=mask, target_mask=target_mask)
    step, state, out = model.read(source, mask=mask).step, None, []
    for part, part_mask in zip(target.split(split, 1), target_mask.split(split, 1), strict=True):
        logits, state = step(part, state, mask=part_mask)
        out.append(logits)
    got = torch.cat(out, dim=1)
    torch.testing.assert_close(got[target_mask], want[target_mask], atol=1e-5, rtol=1e-5)


def test_padding_of_source_and_target_does_not_change_the_logits() -> None:
    model = pair()
    source, target = tokens(2, 9), tokens(2, 7)
    out = model(source, target, mask=padded(9, [9, 4]), target_mask=padded(7, [7, 5]))
    torch.testing.assert_close(out[1:, :5], model(source[1:, :4], target[1:, :5]), atol=1e-5, rtol=1e-5)


def test_loss_of_an_encoder_decoder_is_the_cross_entropy_of_valid_pairs() -> None:
    model = pair()
    source, target, target_mask = tokens(2, 9), tokens(2, 7), padded(7, [7, 5])
    logits = model(source, target, target_mask=target_mask)[:, :-1]
    valid = target_mask[:, 1:]
    want = F.cross_entropy(logits[valid], target[:, 1:][valid])
    torch.testing.assert_close(model.loss(source, target, target_mask=target_mask), want)


def test_generation_is_greedy_decoding_of_full_passes() -> None:
    model = pair()
    source, prompt = tokens(2, 9), tokens(2, 1)
    new = model.generate(source, prompt, 5, temperature=0.0)
    sequence = prompt
    for _ in range(5):
        sequence = torch.cat((sequence, model(source, sequence)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(new, sequence[:, 1:])
    assert torch.equal(generate(model.read(source), prompt, 5, temperature=0.0), new)


@pytest.mark.parametrize("name", DECODERS)
def test_saved_encoder_decoders_compute_the_same(name: str, tmp_path: Any) -> None:
    model = pair(**DECODERS[name])
    model.save(tmp_path)
    loaded = EncoderDecoder.load(tmp_path).eval()
    assert torch.equal(loaded(tokens(2, 9), tokens(2, 7)), model(tokens(2, 9), tokens(2, 7)))


@pytest.mark.slow
def test_an_encoder_decoder_learns_to_copy() -> None:
    torch.manual_seed(0)
    model = pair(source_num_tokens=11).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        source = torch.randint(10, (32, 6))
        loss = model.loss(source, torch.cat((torch.full((32, 1), 10), source), dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 1 < 2 < losses[0]


def test_bad_inputs_of_an_encoder_decoder_raise() -> None:
    model = pair(max_seq_len=8)
    with pytest.raises(ValueError, match="context must be given with the first step"):
        model.step(tokens(1, 2))
    with pytest.raises(ValueError, match="target must have the batch size of the source, got 2 and 1"):
        model(tokens(1, 4), tokens(2, 4))
    with pytest.raises(ValueError, match="source must fit max_seq_len=8"):
        model(tokens(1, 9), tokens(1, 4))
    with pytest.raises(ValueError, match="causal=False must be possible"):
        pair(attention="gate_loop", heads=None, dim_head=None)
