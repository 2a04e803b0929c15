"""Sampling a token from logits, and the filters that restrict the choice. A filtered logit is -inf.

Papers: top-p, https://arxiv.org/abs/1904.09751; min-p, https://arxiv.org/abs/2407.01082
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo._checks import check_floats, check_in, check_int


@dataclass(frozen=True)
class Sampler:
    """Draws a token from softmax(logits / temperature), restricted by filters.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens whose probabilities sum to p or more, p in (0, 1].
        min_p: keep the tokens at least p times as likely as the most likely one, p in [0, 1].
        generator: random number generator, on the device of the logits. None: the global one.

    The filters are applied in this order after the temperature; None leaves a filter out.

    Raises:
        TypeError: `top_k` is not an int, another argument not a number, or `generator` not a generator.
        ValueError: an argument is outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_in("[0, inf)", temperature=self.temperature)
        if self.top_k is not None:
            check_int(1, top_k=self.top_k)
        if self.top_p is not None:
            check_in("(0, 1]", top_p=self.top_p)
        if self.min_p is not None:
            check_in("[0, 1]", min_p=self.min_p)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(self.generator).__name__}")

    def __call__(self, logits: Tensor) -> Tensor:
        """(b, num_tokens) -> (b,) ids.

        Raises:
            TypeError: `logits` is not a floating point tensor.
            ValueError: `logits` has another shape, or holds NaN. NaN is noticed on the CPU only: elsewhere the check
                would synchronise, and with temperature 0 the id of a row with NaN is arbitrary.
        """
        _check_logits(logits)
        if logits.ndim != 2:
            raise ValueError(f"logits must be (b, num_tokens), got shape {tuple(logits.shape)}")
        if logits.device.type == "cpu" and bool(logits.amax(dim=-1).isnan().any()):
            raise ValueError("logits must not be NaN: the model has diverged, or its inputs hold NaN")
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float()
        if self.temperature != 1:
            # With a largest logit of 0 the division cannot overflow to inf.
            temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
            logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=self.generator)[:, 0]


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and those equal to the smallest of them.

    Args:
        logits: (b, num_tokens).
        k: at least 1; num_tokens or more keeps all.

    Raises:
        TypeError: `logits` is not a floating point tensor, or `k` is not an int.
        ValueError: `k` is below 1, or there are no tokens.
    """
    _check_logits(logits)
    check_int(1, k=k)
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to p or more; the most likely token is always kept.

    Args:
        logits: (b, num_tokens).
        p: in (0, 1].

    Raises:
        TypeError: `logits` is not a floating point tensor, or `p` is not a number.
        ValueError: `p` is outside (0, 1], or there are no tokens.
    """
    _check_logits(logits)
    check_in("(0, 1]", p=p)
    if p >= 1:  # the cumulative sum may round up to 1 before the last token
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    dropped = probabilities.cumsum(dim=-1) - probabilities >= p  # the more likely tokens already reach p
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -math.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the most likely one.

    Args:
        logits: (b, num_tokens).
        p: in [0, 1].

    Raises:
        TypeError: `logits` is not a floating point tensor, or `p` is not a number.
        ValueError: `p` is outside [0, 1], or there are no tokens.
    """
    _check_logits(logits)
    check_in("[0, 1]", p=p)
    floor = logits.amax(dim=-1, keepdim=True) + (math.log(p) if p > 0 else -math.inf)
    return logits.masked_fill(logits < floor, -math.inf)


def _check_logits(logits: Tensor) -> None:
    check_floats(logits=logits)
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits must be (..., num_tokens) with num_tokens >= 1, got shape {tuple(logits.shape)}")
