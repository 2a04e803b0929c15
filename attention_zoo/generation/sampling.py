"""One loop that samples from anything with `step`: prefill once, then a token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_padding, check_positive, check_token_range, check_tokens
from attention_zoo.generation.filters import min_p, top_k, top_p


class Decoder(Protocol):
    """What can be sampled from: logits (b, t, num_tokens) for new tokens (b, t), and a state to go on from."""

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits after each new token, and the new state."""


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from logits.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k, top_p, min_p: filters, applied in this order after the temperature; None leaves one out.
        generator: source of randomness, on the device of the logits.

    Raises:
        ValueError: a number outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got temperature={self.temperature}")
        check_positive(top_k=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got top_p={self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got min_p={self.min_p}")

    def __call__(self, logits: Tensor) -> Tensor:
        """(b, num_tokens) -> (b,) ids."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float()
        if self.temperature != 1:
            # The largest logit is 0 before the division and after it, so a tiny temperature overflows nothing.
            temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
            logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=self.generator)[:, 0]


def generate(
    model: Decoder,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample `length` new tokens after each prompt; `generate_stream`, stacked.

    Args:
        model: anything with `step`; its training mode is put back at the end, whatever happens.
        prompt: (b, n) int, n >= 1.
        length: new tokens per row.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens whose probabilities reach p.
        min_p: keep the tokens at least p times as likely as the most likely one.
        eos: a token that ends its row; the rest of the row is filled with it.
        mask: (b, n) bool for prompts of different lengths, padded on the left.
        generator: source of randomness.
        progress: show a progress bar (needs tqdm, from the extra `examples`).

    Returns:
        (b, length) int, the new tokens alone.

    Raises:
        ValueError, TypeError: an argument does not fit, or the prompt and the new tokens exceed the model's
            `max_seq_len`; nothing has been computed then.
    """
    tokens = list(
        generate_stream(
            model,
            prompt,
            length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            eos=eos,
            mask=mask,
            generator=generator,
            progress=progress,
        )
    )
    new = torch.stack(tokens, dim=1) if tokens else prompt.new_empty(prompt.shape[0], 0)
    if eos is None or new.shape[1] == length:
        return new
    return torch.cat((new, new.new_full((new.shape[0], length - new.shape[1]), eos)), dim=1)


def generate_stream(
    model: Decoder,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Sample one token per row at a time: an iterator of (b,) tensors, at most `length` of them.

    Arguments and errors are those of `generate`, and are looked at now, not when the first token is asked for. The
    iterator ends early when every row has met `eos`. Between tokens the model has its own training mode.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p, generator)
    _check_prompt(model, prompt, length, mask, eos)
    if progress:
        try:
            import tqdm  # noqa: F401
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install attention-zoo[examples]") from error
    return _stream(model, prompt, length, sampler, eos, mask, progress)


def _check_prompt(model: Decoder, prompt: Tensor, length: int, mask: Tensor | None, eos: int | None) -> None:
    if not callable(getattr(model, "step", None)):
        raise TypeError(f"model must have step to be sampled from, got {type(model).__name__}")
    if not isinstance(length, int):
        raise TypeError(f"length must be an int, got {length=}")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length=}")
    num_tokens: int | None = getattr(model, "num_tokens", None)
    check_tokens(prompt, 2**62 if num_tokens is None else num_tokens, name="prompt")
    if num_tokens is not None:
        check_token_range(prompt, num_tokens, name="prompt")
        if eos is not None and not 0 <= eos < num_tokens:
            raise ValueError(f"eos must lie in 0 ... num_tokens - 1 = {num_tokens - 1}, got {eos=}")
    check_padding(mask, prompt)
    if mask is not None and not bool((mask[:, 1:] >= mask[:, :-1]).all() & mask[:, -1].all()):
        raise ValueError("mask must pad prompts on the left: False, ..., True with a real last token in every row")
    longest: int | None = getattr(model, "max_seq_len", None)
    needed = prompt.shape[1] + length - 1  # the last token is never fed back
    if longest is not None and length and needed > longest:
        raise ValueError(
            f"length must leave prompt and new tokens within max_seq_len={longest}, got a prompt of {prompt.shape[1]} "
            f"tokens and {length=}"
        )


def _stream(
    model: Decoder,
    prompt: Tensor,
    length: int,
    sampler: Sampler,
    eos: int | None,
    mask: Tensor | None,
    progress: bool,
) -> Iterator[Tensor]:
    tokens, state = prompt, None
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    with progress_bar(length, progress) as bar:
        for _ in range(length):
            # both modes close before each yield: the caller's own code must not run inside them
            with evaluating(model), torch.inference_mode():
                logits, state = model.step(tokens, state, mask=mask)
                token = sampler(logits[:, -1])
            token = token.clone()  # what leaves is an ordinary tensor, that training may use
            if eos is not None:
                token = token.masked_fill(done, eos)
                done = done | (token == eos)
            tokens, mask = token[:, None], None
            bar.update(1)
            yield token
            if eos is not None and bool(done.all()):
                return


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put a module and all its parts into eval mode, and back into the mode each had, whatever happens."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _NoBar:
    def update(self, count: int) -> None:
        """Show nothing."""


@contextmanager
def progress_bar(length: int, show: bool) -> Iterator[Any]:
    """A bar of `length` tokens with `update(count)`, or something silent in its place."""
    if not show:
        yield _NoBar()
        return
    from tqdm.auto import tqdm

    with tqdm(total=length, unit="token") as bar:
        yield bar
