"""`TextToImageTransformer`: sequence, loss, decoding, generation, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo import (
    GreyTokenizer,
    TextToImageTransformer,
    generate_image_tokens,
    generate_images,
)
from attention_zoo.testing.subject import seeded
from tests.formulas import relative_error

BLOCKS = ["full", "axial_row", "axial_col", "conv"]
TEXT_LEN, HEIGHT, WIDTH, WORDS, SHADES = 5, 3, 4, 11, 7


def small(**options: Any) -> TextToImageTransformer:
    settings: dict[str, Any] = {"attention": BLOCKS, "depth": 4, "heads": 2, "dim_head": 8, **options}
    with seeded(0):
        model = TextToImageTransformer(
            num_text_tokens=WORDS,
            text_len=TEXT_LEN,
            num_image_tokens=SHADES,
            height=HEIGHT,
            width=WIDTH,
            dim=16,
            **settings,
        )
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def sample(batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    with seeded(seed):
        text = torch.randint(0, WORDS, (batch, TEXT_LEN))
        text[0, 3:] = 0
        return text, torch.randint(0, SHADES, (batch, HEIGHT * WIDTH))


def in_steps(model: TextToImageTransformer, tokens: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    state, outs, start = None, [], 0
    for size in sizes:
        part = None if mask is None else mask[:, start : start + size]
        out, state = model.step(tokens[:, start : start + size], state, mask=part)
        outs.append(out)
        start += size
    return torch.cat(outs, dim=1)


VARIANTS: dict[str, dict[str, Any]] = {
    "all blocks": {},
    "learned positions, sandwich": {"positions": "learned", "residual": "sandwich"},
    "no shift, block-sparse": {
        "token_shift": False,
        "attention": [("block_sparse", {"block_size": 4, "local_blocks": 1, "random_blocks": 1}), "conv"],
        "feedforward": "gelu",
    },
    "reversible, shared weights, tied": {
        "reversible": True,
        "attention": ["axial_row", ("conv", {"kernel_size": 3})],
        "shared_attn_ids": [0, 1, 0, 1],
        "shared_ff_ids": [0, 0],
        "tie_embeddings": True,
    },
    "no biases": {"bias": False},
}


@pytest.mark.parametrize(
    "splits", [pytest.param([1] * 17, marks=pytest.mark.slow), [17], [3, 5, 9], [6, 2, 1, 8], [10, 7]], ids=str
)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_steps_over_any_split_equal_the_full_pass(options: dict[str, Any], splits: list[int]) -> None:
    model, (text, image) = small(**options), sample()
    mask = torch.ones(3, TEXT_LEN, dtype=torch.bool)
    mask[0, 3:] = False
    mask[1, :2] = False
    tokens = model.tokens(text, image)[:, :17]
    sequence_mask = torch.ones(3, 17, dtype=torch.bool)
    sequence_mask[:, 1 : 1 + TEXT_LEN] = mask
    with torch.no_grad():
        for given, padding in ((None, None), (mask, sequence_mask)):
            want = model(text, image, mask=given)
            got = in_steps(model, tokens, splits, padding)
            finite = want.isfinite()
            if padding is not None:
                finite &= padding[..., None]
            assert torch.equal(got.isfinite() | ~finite, torch.ones_like(finite))
            assert relative_error(got.masked_fill(~finite, 0), want.masked_fill(~finite, 0)) < 1e-5


def test_logits_do_not_depend_on_later_tokens() -> None:
    model, (text, image) = small(), sample()
    other = sample(seed=2)[1]
    for known in (0, 1, 5):
        mixed = torch.cat((image[:, :known], other[:, known:]), dim=1)
        until = 1 + TEXT_LEN + known
        assert torch.equal(model(text, image)[:, :until], model(text, mixed)[:, :until])


def test_ids_of_the_other_modality_have_no_probability() -> None:
    model, (text, image) = small(), sample()
    logits = model(text, image)
    assert logits.shape == (3, 17, WORDS + TEXT_LEN + SHADES)
    ids = model.num_text_ids
    assert bool((logits[:, :TEXT_LEN, ids:] == -torch.inf).all())
    assert bool(logits[:, :TEXT_LEN, :ids].isfinite().all())
    assert bool((logits[:, TEXT_LEN:, :ids] == -torch.inf).all())
    assert bool(logits[:, TEXT_LEN:, ids:].isfinite().all())


def test_loss_is_the_weighted_mean_of_text_and_image() -> None:
    model, (text, image) = small(image_loss_weight=3.0), sample()
    logits, tokens = model(text, image), model.tokens(text, image)
    each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    want = (each[:, :TEXT_LEN].mean() + 3 * each[:, TEXT_LEN:].mean()) / 4
    assert relative_error(model.loss(text, image), want) < 1e-6


def test_loss_terms_are_those_of_text_and_image() -> None:
    model, (text, image) = small(image_loss_weight=3.0), sample()
    mask = torch.arange(TEXT_LEN) < torch.tensor([[3], [5], [1]])
    for given, count in ((None, 15), (mask, 9)):
        terms = model.loss_terms(text, image, mask=given)
        assert [int(term.count) for term in terms] == [count, 3 * HEIGHT * WIDTH]
        assert [term.weight for term in terms] == [0.25, 0.75]
        torch.testing.assert_close(0.25 * terms[0].mean + 0.75 * terms[1].mean, model.loss(text, image, mask=given))


def test_padding_has_its_own_id_at_each_position() -> None:
    model, (text, image) = small(), sample()
    tokens = model.tokens(text, image)
    assert tokens[:, 0].tolist() == [0, 0, 0]
    assert tokens[0, 4:6].tolist() == [WORDS + 3, WORDS + 4]
    assert torch.equal(tokens[:, 6:] - WORDS - TEXT_LEN, image)


def test_null_prob_replaces_texts_and_does_not_modify_the_input() -> None:
    model, (text, image) = small(), sample(64)
    before = text.clone()
    nothing = model.loss(torch.zeros_like(text), image)
    with seeded(0):
        almost_all = model.loss(text, image, null_prob=0.999999)
    assert torch.equal(text, before)
    assert relative_error(almost_all, nothing) < 1e-6


def test_loaded_model_computes_the_same(tmp_path: Path) -> None:
    model, (text, image) = small(shared_attn_ids=[0, 1, 2, 3, 0], tie_embeddings=True), sample()
    model.save(tmp_path)
    assert torch.equal(TextToImageTransformer.load(tmp_path).eval()(text, image), model(text, image))


def test_bfloat16_logits_are_close_to_float32() -> None:
    model, (text, image) = small(), sample()
    want = model(text, image)
    got = model.bfloat16()(text, image)
    assert got.dtype == torch.bfloat16
    assert relative_error(got.masked_fill(~want.isfinite(), 0), want.masked_fill(~want.isfinite(), 0)) < 5e-2


def invalid_calls() -> dict[str, tuple[Any, str]]:
    text, image = sample()
    wrong_shades = GreyTokenizer(height=HEIGHT, width=WIDTH, levels=5)
    return {
        "text id": (lambda m: m(text + WORDS, image), "text must lie in"),
        "image id": (lambda m: m(text, image + SHADES), "image must lie in"),
        "text length": (lambda m: m(text[:, 1:], image), r"text must hold text_len = 5 tokens.*\(3, 4\)"),
        "too much text": (lambda m: m(torch.cat((text, text), 1)), r"text must hold text_len = 5 tokens.*\(3, 10\)"),
        "image length": (lambda m: m(text, torch.cat((image, image), 1)), r"image must be .*at most 12.*\(3, 24\)"),
        "part of an image": (lambda m: m.loss(text, image[:, 1:]), r"image must hold 12 tokens.*\(3, 11\)"),
        "batch": (lambda m: m(text, image[:2]), r"image must be .*b = 3.*\(2, 12\)"),
        "complete prime": (lambda m: generate_image_tokens(m, text, prime=image), r"prime must hold fewer.*\(3, 12\)"),
        "null_prob": (lambda m: m.loss(text, image, null_prob=1.5), "null_prob must lie in"),
        "vocabulary": (
            lambda m: generate_images(m, wrong_shades, text),
            "tokenizer must have .* 7 image ids, got 5",
        ),
        "too long": (lambda m: m.step(torch.zeros(1, 30, dtype=torch.int64)), "tokens must fit layout.length=18"),
        "modality": (lambda m: m.step(torch.zeros(1, 8, dtype=torch.int64)), "tokens must be text up to position 5"),
        "state": (
            lambda m: m.step(torch.zeros(1, 1, dtype=torch.int64), "x"),
            "state must be a StackState of an earlier step, got str",
        ),
        "positions": (lambda m: small(positions="t5"), "positions must be one of"),
        "different layers": (
            lambda m: small(shared_attn_ids=[0]),
            "shared_attn_ids must give the same id only to layers of one kind",
        ),
        "shift": (lambda m: TextToImageTransformer(**{**m.arguments, "dim": 18}), "dim must be divisible by 4"),
        "levels": (lambda m: GreyTokenizer(height=2, width=2, levels=1), "levels must be at least 2"),
        "brightness": (lambda m: wrong_shades.encode(torch.full((1, HEIGHT, WIDTH), 2.0)), "images must lie in 0"),
    }


@pytest.mark.parametrize("name", invalid_calls())
def test_invalid_arguments_raise(name: str) -> None:
    call, message = invalid_calls()[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(small())
