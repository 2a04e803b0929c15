"""Formulas that several packages share."""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b, with b if it exists."""
    out = x @ weights[f"{name}.weight"].t()
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """LayerNorm with eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """The exact GELU."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def heads(x: Tensor, count: int) -> Tensor:
    """(b, n, h e) -> (b, h, n, e)."""
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """(b, h, n, e) -> (b, n, h e)."""
    return x.transpose(1, 2).flatten(2)


def softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax in which the scores of other keys are the lowest finite number."""
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)


def past(n: int) -> Tensor:
    """(n, n) bool, j <= i."""
    return torch.ones(n, n, dtype=torch.bool).tril()


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate interleaved pairs of the first features of (b, h, n, e) by angles (n, pairs)."""
    rotated = x[..., : 2 * angle.shape[-1]]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack((even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()), dim=-1)
    return torch.cat((pairs.flatten(-2), x[..., 2 * angle.shape[-1] :]), dim=-1)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of tokens, given the logits before each."""
    logs = logits.log_softmax(-1)
    return -logs.gather(-1, tokens[..., None]).mean()
