"""Autoregressive generation with any model that has `step`: the prompt in one step, then one token per step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_flag, check_int, check_padding, check_token_range, check_tokens
from attention_zoo.generation.eval_copy import eval_copy
from attention_zoo.generation.sampling import Sampler


class Decoder(Protocol):
    """A model that `generate` can sample from.

    Its attributes `num_tokens` and `max_seq_len`, where present, are limits that are checked before decoding.
    """

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits (b, t, num_tokens) after each of the new tokens (b, t), and the new state."""


def generate(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample new tokens after each prompt.

    Args:
        model: a module or object with `step`. A module in training mode is decoded through a copy in eval mode that
            shares its parameters and buffers (see `eval_copy`), so that other threads may train it meanwhile.
        prompt: (b, n), n >= 1, of any integer dtype; the model is given int64.
        max_new_tokens: number of new tokens per row.
        temperature, top_k, top_p, min_p, generator: see `Sampler`.
        eos_token_id: a token that ends its row; the rest of the row is filled with it. None: rows do not end.
        mask: (b, n) bool, True = a valid token, for prompts of different lengths, padded on the left.
        progress: whether to show a progress bar (needs tqdm, from the extra `examples`).

    Returns:
        (b, max_new_tokens) int64, the new tokens without the prompt.

    Raises:
        ValueError, TypeError: an argument is invalid, or the prompt and the new tokens exceed the model's
            `max_seq_len`; checked before decoding. While decoding, ValueError if logits are NaN (on the CPU).
        ImportError: progress=True without tqdm.
    """
    stream = generate_stream(
        model,
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_token_id=eos_token_id,
        mask=mask,
        generator=generator,
        progress=progress,
    )
    new = (
        torch.stack(tokens, dim=1)
        if (tokens := list(stream))
        else prompt.new_empty(prompt.shape[0], 0, dtype=torch.int64)
    )
    if new.shape[1] == max_new_tokens or eos_token_id is None:
        return new
    return nn.functional.pad(new, (0, max_new_tokens - new.shape[1]), value=eos_token_id)


def generate_stream(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Sample one token per row at a time.

    Arguments and errors as in `generate`; the arguments are checked in the call, before the first token.

    Returns:
        An iterator of at most `max_new_tokens` tensors (b,). It stops when every row has ended with `eos_token_id`.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p, generator)
    _check_arguments(model, prompt, max_new_tokens, eos_token_id, mask)
    check_flag(progress=progress)
    prompt = prompt.long()
    make_bar = _bar_class(progress)

    def decode() -> Iterator[Tensor]:
        tokens, tokens_mask, state, copy = prompt, mask, None, None
        ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        with make_bar(total=max_new_tokens, unit="token") as bar:
            for _ in range(max_new_tokens):
                decoder: Any = model
                if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
                    copy = decoder = eval_copy(model) if copy is None else copy
                # The mode ends before each yield, so that the caller's code does not run inside it.
                with torch.inference_mode():
                    logits, state = decoder.step(tokens, state, mask=tokens_mask)
                    token = sampler(logits[:, -1])
                token = token.clone()  # outside inference mode: an ordinary tensor, usable in training
                if eos_token_id is not None:
                    token = token.masked_fill(ended, eos_token_id)
                    ended = ended | (token == eos_token_id)
                tokens, tokens_mask = token[:, None], None
                bar.update(1)
                yield token
                if eos_token_id is not None and bool(ended.all()):
                    return

    return decode()


def _bar_class(show: bool) -> Any:
    """The class of progress bars: tqdm, or one that shows nothing."""
    if not show:
        return _NoBar
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install attention-zoo[examples]") from error
    return tqdm


class _NoBar:
    def __init__(self, *, total: int, unit: str) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int) -> None: ...


def _check_arguments(
    model: Decoder, prompt: Tensor, max_new_tokens: int, eos_token_id: int | None, mask: Tensor | None
) -> None:
    if not callable(getattr(model, "step", None)):
        raise TypeError(f"model must have step to be sampled from, got {type(model).__name__}")
    check_int(0, max_new_tokens=max_new_tokens)
    if eos_token_id is not None:
        check_int(0, eos_token_id=eos_token_id)
    num_tokens: int | None = getattr(model, "num_tokens", None)
    check_tokens(prompt, 2**62 if num_tokens is None else num_tokens, name="prompt")
    if num_tokens is not None:
        check_token_range(prompt, num_tokens, name="prompt")
        if eos_token_id is not None and eos_token_id >= num_tokens:
            raise ValueError(f"eos_token_id must lie in 0 ... num_tokens - 1 = {num_tokens - 1}, got {eos_token_id=}")
    check_padding(mask, prompt)
    if mask is not None and not bool((mask[:, 1:] >= mask[:, :-1]).all() & mask[:, -1].all()):
        raise ValueError("mask must pad prompts on the left: False, ..., True with a valid last token in every row")
    max_seq_len: int | None = getattr(model, "max_seq_len", None)
    fed = prompt.shape[1] + max_new_tokens - 1  # the last token is not fed back
    if max_seq_len is not None and max_new_tokens and fed > max_seq_len:
        raise ValueError(
            f"max_new_tokens must leave prompt and new tokens within {max_seq_len=}, got a prompt of "
            f"{prompt.shape[1]} tokens and {max_new_tokens=}"
        )
