"""Generation of images and text with a `TextToImageTransformer`.

Paper: classifier-free guidance, https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_in
from attention_zoo.generation.decoding import generate

if TYPE_CHECKING:  # the models import this package
    from attention_zoo.models import ImageTokenizer, TextToImageTransformer


def generate_image_tokens(
    model: TextToImageTransformer,
    text: Tensor,
    *,
    prime: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample the tokens of one image per row of text.

    Args:
        model: decodes in eval mode; see `generate`.
        text: (b, text_len) int, 0 = padding.
        prime: (b, m) int, the first tokens of each image, fewer than height * width.
        guidance: scale of classifier-free guidance: logits are null + guidance * (with text - null), where null are the
            logits for a text of padding. 1: no guidance. Train with `null_prob` above 0 to use it.
        temperature, top_k, top_p, min_p, generator: see `Sampler`; applied to image ids only.
        progress: see `generate`.

    Returns:
        (b, height * width) int, `prime` included.

    Raises:
        ValueError, TypeError: an argument is invalid; checked before decoding.
    """
    check_in("(-inf, inf)", guidance=guidance)
    length = model.layout.image_len
    if prime is not None and prime.ndim == 2 and prime.shape[1] >= length:
        raise ValueError(f"prime must hold fewer than the image's {length} tokens, got shape {tuple(prime.shape)}")
    prompt = model.tokens(text, text.new_zeros(len(text), 0) if prime is None else prime)
    null_prompt = None if guidance == 1.0 else model.tokens(torch.zeros_like(text), prime)
    tokens = generate(
        _OneModality(model, slice(model.num_text_ids, None), guidance, null_prompt),
        prompt,
        model.layout.length - prompt.shape[1],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        generator=generator,
        progress=progress,
    )
    return tokens if prime is None else torch.cat((prime.long(), tokens), dim=1)


def generate_images(model: TextToImageTransformer, tokenizer: ImageTokenizer, text: Tensor, **options: Any) -> Tensor:
    """Sample one image per row of text: `generate_image_tokens`, decoded by `tokenizer`.

    Args:
        model, text: see `generate_image_tokens`.
        tokenizer: any object with `num_tokens` and `decode(ids) -> images`.
        options: keyword arguments of `generate_image_tokens`.

    Raises:
        ValueError: the tokenizer does not have the model's number of image ids; see also `generate_image_tokens`.
    """
    if tokenizer.num_tokens != model.num_image_tokens:
        raise ValueError(
            f"tokenizer must have the model's {model.num_image_tokens} image ids, got {tokenizer.num_tokens}"
        )
    return tokenizer.decode(generate_image_tokens(model, text, **options))


def generate_text(
    model: TextToImageTransformer,
    text: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Complete each row of text to the model's text_len.

    Args:
        model, temperature, top_k, top_p, min_p, generator, progress: see `generate_image_tokens`.
        text: (b, t) int with t <= text_len; (b, 0) for text without a prompt.

    Returns:
        (b, text_len) int, 0 = padding.
    """
    prompt = model.tokens(text)
    new = generate(
        _OneModality(model, slice(0, model.num_text_ids)),
        prompt,
        model.layout.text_len - prompt.shape[1],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        generator=generator,
        progress=progress,
    )
    completed = torch.cat((text.long(), new), dim=1)
    return torch.where(completed < model.num_text_tokens, completed, 0)  # ids above are padding


class _OneModality(nn.Module):
    """A text-to-image model restricted to text ids or to image ids, which count from 0, with guidance.

    Args:
        model: the model.
        ids: the ids within the model's.
        guidance, null_prompt: the guidance scale, and the prompt (b, n) without text; None for no guidance.
    """

    def __init__(
        self, model: TextToImageTransformer, ids: slice, guidance: float = 1.0, null_prompt: Tensor | None = None
    ) -> None:
        super().__init__()
        self.training = False  # the mode of the model decides
        self.model = model
        self.ids = ids
        self.guidance = guidance
        self.null_prompt = null_prompt

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits (b, 1, ids) after the last of the new tokens: the prompt in the model's ids, then sampled ids."""
        if state is not None:
            tokens = tokens + self.ids.start
        if self.null_prompt is not None:
            tokens = torch.cat((tokens, self.null_prompt if state is None else tokens))
        logits, state = self.model.step(tokens, state, mask=mask)
        logits = logits[:, -1:, self.ids]
        if self.null_prompt is not None:
            with_text, null = logits.chunk(2)
            logits = null + self.guidance * (with_text - null)
        return logits, state
