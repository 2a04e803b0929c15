"""Drawing images from text, writing text, and both, with any model that holds text and image in one sequence.

Paper: classifier-free guidance, https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from attention_zoo.generation.sampling import Sampler, evaluating, progress_bar


class Layout(Protocol):
    """How long the parts of a sequence are."""

    @property
    def text_len(self) -> int:
        """Tokens before the image, the start token included."""

    @property
    def image_len(self) -> int:
        """Tokens of the image."""

    @property
    def length(self) -> int:
        """All of them."""


class TextImageModel(Protocol):
    """What can write and draw.

    Attributes:
        num_text_tokens: text ids, without those of padding.
        num_text_ids: text ids and those of padding; image ids come after them.
        num_image_tokens: image ids.
    """

    num_text_tokens: int
    num_text_ids: int
    num_image_tokens: int

    @property
    def layout(self) -> Layout:
        """Lengths of text and image."""

    def tokens(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        """Text and the beginning of an image as the one sequence that `step` takes."""

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits (b, t, text and image ids) after each new token, and the new state."""


class Tokenizer(Protocol):
    """What turns ids (b, height * width) into images."""

    num_tokens: int

    def decode(self, ids: Tensor) -> Tensor:
        """(b, height * width) int -> (b, ...)."""


def generate_image_tokens(
    model: TextImageModel,
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
    """Draw one image per row of text.

    Args:
        model: such as `TextToImageTransformer`; its training mode is put back at the end.
        text: (b, text_len) int, 0 = padding.
        prime: (b, m) int, the first tokens of each image, fewer than it has.
        guidance: logits are null + guidance * (with text - null), null being what the model predicts without any text;
            1 leaves null out. Train with `null_prob` above 0 to use it.
        temperature, top_k, top_p, min_p, generator: see `generate`; they act on image ids alone.
        progress: show a progress bar (needs tqdm, from the extra `examples`).

    Returns:
        (b, height * width) int, the prime included.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been computed then.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p, generator)
    length = model.layout.image_len
    if prime is not None and prime.ndim == 2 and prime.shape[1] >= length:
        raise ValueError(f"prime must hold fewer than the image's {length} tokens, got shape {tuple(prime.shape)}")
    prompt = model.tokens(text, text.new_zeros(len(text), 0) if prime is None else prime)
    if guidance != 1.0:
        prompt = torch.cat((prompt, model.tokens(torch.zeros_like(text), prime)))
    drawn = _sample(model, prompt, model.layout.length - prompt.shape[1], sampler, guidance, progress)
    return drawn if prime is None else torch.cat((prime.long(), drawn), dim=1)


def generate_images(model: TextImageModel, tokenizer: Tokenizer, text: Tensor, **options: Any) -> Tensor:
    """`generate_image_tokens`, decoded.

    Args:
        tokenizer: any object with `num_tokens` and `decode(ids) -> images`.
        options: those of `generate_image_tokens`.

    Raises:
        ValueError: the tokenizer has another number of ids than the model; and as `generate_image_tokens`.
    """
    if tokenizer.num_tokens != model.num_image_tokens:
        raise ValueError(
            f"tokenizer must have the model's {model.num_image_tokens} image ids, got {tokenizer.num_tokens}"
        )
    return tokenizer.decode(generate_image_tokens(model, text, **options))


def generate_text(
    model: TextImageModel,
    text: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Go on with each row of text up to the model's text_len.

    Args:
        text: (b, t) int with t <= text_len; (b, 0) starts from nothing.
        model, temperature, top_k, top_p, min_p, generator, progress: see `generate_image_tokens`.

    Returns:
        (b, text_len) int, 0 = padding.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p, generator)
    prompt = model.tokens(text)
    written = _sample(model, prompt, model.layout.text_len - prompt.shape[1], sampler, 1.0, progress)
    whole = torch.cat((text.long(), written), dim=1)
    return torch.where(whole < model.num_text_tokens, whole, 0)


def _sample(
    model: TextImageModel, prompt: Tensor, length: int, sampler: Sampler, guidance: float, progress: bool
) -> Tensor:
    """`length` new ids of one kind per row; with guidance the second half of the prompts has no text."""
    rows = len(prompt) if guidance == 1.0 else len(prompt) // 2
    is_image = prompt.shape[1] >= model.layout.text_len
    ids = slice(model.num_text_ids, None) if is_image else slice(0, model.num_text_ids)
    tokens, state, drawn = prompt, None, [prompt.new_empty(rows, 0)]
    with evaluating(model), torch.no_grad(), progress_bar(length, progress) as bar:
        for _ in range(length):
            logits, state = model.step(tokens, state)
            allowed = logits[:, -1, ids]
            if guidance != 1.0:
                null = allowed[rows:]
                allowed = null + guidance * (allowed[:rows] - null)
            new = sampler(allowed)[:, None]
            drawn.append(new)
            tokens = new + model.num_text_ids if is_image else new
            if guidance != 1.0:
                tokens = tokens.repeat(2, 1)
            bar.update(1)
    return torch.cat(drawn, dim=1)
