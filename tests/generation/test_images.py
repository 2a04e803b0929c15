"""Generation of images and text with `TextToImageTransformer`."""

from __future__ import annotations

import pytest
import torch

from attention_zoo import GreyTokenizer, generate_image_tokens, generate_images, generate_text
from tests.models.test_text_to_image import HEIGHT, SHADES, TEXT_LEN, WIDTH, WORDS, in_steps, sample, small


def test_greedy_image_tokens_equal_argmax_of_forward() -> None:
    model, (text, _) = small(), sample()
    drawn = generate_image_tokens(model, text, temperature=0)
    image = torch.empty(3, 0, dtype=torch.int64)
    for _ in range(HEIGHT * WIDTH):
        image = torch.cat((image, model(text, image)[:, -1:].argmax(-1) - model.num_text_ids), dim=1)
    assert torch.equal(drawn, image)


def test_guidance_extrapolates_from_logits_without_text() -> None:
    model, (text, image) = small(), sample()
    prime, before = image[:, :5].clone(), text.clone()
    drawn = generate_image_tokens(model, text, prime=prime, guidance=3.0, temperature=0)
    want = prime
    for _ in range(HEIGHT * WIDTH - 5):
        cond, null = (model(words, want)[:, -1, model.num_text_ids :] for words in (text, torch.zeros_like(text)))
        want = torch.cat((want, (null + 3 * (cond - null)).argmax(-1)[:, None]), dim=1)
    assert torch.equal(drawn, want)
    assert torch.equal(text, before)
    assert torch.equal(prime, image[:, :5])


def test_filters_apply_to_image_ids_only() -> None:
    model, (text, _) = small(), sample()
    assert torch.equal(generate_image_tokens(model, text, top_k=1), generate_image_tokens(model, text, temperature=0))
    drawn = generate_image_tokens(model, text, top_p=0.5, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, HEIGHT * WIDTH)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < SHADES


def test_greedy_text_equals_argmax_of_forward() -> None:
    model, (text, _) = small(), sample()
    written = generate_text(model, text[:, :2], temperature=0)
    tokens = model.tokens(text[:, :2])
    for _ in range(TEXT_LEN - 2):
        logits = in_steps(model, tokens, [tokens.shape[1]])
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, torch.where(tokens[:, 1:] < WORDS, tokens[:, 1:], 0).masked_fill(written == 0, 0))
    assert generate_text(model, torch.empty(2, 0, dtype=torch.int64)).shape == (2, TEXT_LEN)


def test_images_of_a_model_in_training_mode_are_generated_in_eval_mode() -> None:
    model, (text, _) = small(attn_dropout=0.5, ff_dropout=0.5), sample()
    want = generate_image_tokens(model.eval(), text, guidance=2.0, temperature=0)
    model.train().stack.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen = []

    class Recorder:
        """An object, whose reference to the model is not replaced in a copy."""

        model = None

        def __call__(self, *_: object) -> None:
            seen.append([module.training for module in self.model.modules()])

    Recorder.model = model
    model.to_logits.register_forward_hook(Recorder())
    assert torch.equal(generate_image_tokens(model, text, guidance=2.0, temperature=0), want)
    assert seen == [before] * HEIGHT * WIDTH


def test_images_of_a_model_in_eval_mode_are_generated_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_zoo.generation.decoding.eval_copy", lambda model: pytest.fail("copied"))
    generate_image_tokens(small().eval(), sample()[0])


def test_grey_tokenizer_round_trip_is_exact() -> None:
    tokenizer = GreyTokenizer(height=2, width=3, levels=17)
    images = torch.randint(0, 17, (4, 2, 3)) / 16
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), images)
    model, (text, _) = small(), sample()
    drawn = generate_images(model, GreyTokenizer(height=HEIGHT, width=WIDTH, levels=SHADES), text, temperature=0)
    assert torch.equal(drawn.flatten(1) * (SHADES - 1), generate_image_tokens(model, text, temperature=0).float())
