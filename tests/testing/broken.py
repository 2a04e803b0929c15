"""Blocks broken on purpose, each in one way, with the check that must catch it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import FullAttention, KeyValueState
from attention_zoo.ops import softmax_attention, softmax_attention_weights
from attention_zoo.ops.implementation import choose
from tests.cases import DIM


class Base(FullAttention):
    """A sound block, small."""

    def __init__(self) -> None:
        super().__init__(DIM, heads=2, dim_head=8)


class LeaksOneToken(Base):
    """Every token sees the next one as well."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        seen = torch.ones(i, j, dtype=torch.bool).tril(j - i + 1)[None, None]
        return softmax_attention(q, k, v, mask=seen if mask is None else seen & mask[:, None, None])


class LeaksAtATileEdge(Base):
    """Token 63 sees token 64, and no other sees its future."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        seen = torch.ones(i, j, dtype=torch.bool).tril(j - i)
        if i == j and i > 64:
            seen[63, 64] = True
        return softmax_attention(q, k, v, mask=seen[None, None] if mask is None else seen & mask[:, None, None])


class LeaksInTheGradient(Base):
    """The output is right, but a gradient flows back from it to the next token."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        later = F.pad(x[:, 1:], (0, 0, 0, 1))
        return super().forward(x, mask=mask) + (later - later.detach())


class IgnoresItsMask(Base):
    """Padding is attended to."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().attend(q, k, v, None)


class HidesPaddingSoftly(Base):
    """Padding keeps a small weight, as a fill of -8 in place of minus infinity leaves it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else -8.0 * (~mask)[:, None, None].to(q.dtype)
        return softmax_attention(q, k, v, bias=bias, causal=self.causal)


class CacheOffByOne(Base):
    """Decoding forgets the first token."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, KeyValueState]:
        if state is not None and state.length > 1:
            rest = None if state.mask is None else state.mask[:, 1:]
            state = KeyValueState(state.keys[:, :, 1:], state.values[:, :, 1:], rest)
        return super().step(x, state, mask=mask)


class ForgetsTheEarlierMask(Base):
    """Decoding sees the padding of earlier steps."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, KeyValueState]:
        return super().step(x, state if state is None else replace(state, mask=None), mask=mask)


class ChangesAnOldState(Base):
    """A newer step writes over the last key that the older state holds."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, KeyValueState]:
        out, new = super().step(x, state, mask=mask)
        if state is not None and not torch.is_grad_enabled():
            state.keys[:, :, -1] = new.keys[:, :, -1]
        return out, new


class EditsItsInput(Base):
    """The input is normalised where it lies."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            x.div_(x.norm(dim=-1, keepdim=True))
        return super().forward(x, mask=mask)


class NaNOnAnEmptyRow(Base):
    """Scores of minus infinity everywhere go through a bare softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        seen = torch.ones(i, j, dtype=torch.bool).tril(j - i)
        seen = seen if mask is None else seen & mask[:, None, None]
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1) @ v


class AveragesAnEmptyRow(Base):
    """A finite fill in place of minus infinity: a row with nothing to see attends to all of it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        seen = torch.ones(i, j, dtype=torch.bool).tril(j - i)
        seen = seen if mask is None else seen & mask[:, None, None]
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -1e9).softmax(-1) @ v


class MixesBatchRows(Base):
    """Every row gets a little of the batch's mean."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * x.mean(dim=0, keepdim=True), mask=mask)


class ReturnsFloat32(Base):
    """Whatever comes in, float32 goes out."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask).float()


class OverflowsInHalf(Base):
    """Squares that float16 cannot hold."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask) * ((x * 1000).square().mean() / (x * 1000).square().mean())


class FastPathIsOff(Base):
    """The fast path takes another scale than the reference."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale = 8**-0.5 if choose("auto", ()) == "reference" else 8**-0.5 * 1.001
        return softmax_attention(q, k, v, mask=mask, causal=True, scale=scale)


class _Square(torch.autograd.Function):
    """x^2 whose backward hides from a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.detach()


class SecondDerivativeIsWrong(Base):
    """Its own backward is right once, and silently wrong twice."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(_Square.apply(x), mask=mask)


class DecidesOnValues(Base):
    """A branch on what a tensor holds, which no trace can follow."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask=mask)
        return out if float(out.sum()) > 0 else out + 0


class ForgetsAWeight(Base):
    """A random tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.secret = torch.randn(DIM)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x * self.secret.to(x), mask=mask)


class TakesAnyMask(Base):
    """No argument is looked at."""

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        """Look away."""


class MapOfSomethingElse(Base):
    """The map shows the scores without their scale."""

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return super().weights(q * 8**0.5, k, mask)


class MapShowsTheFuture(Base):
    """The map is that of the bidirectional block."""

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return softmax_attention_weights(q, k, mask=mask)


BROKEN: list[tuple[type[nn.Module], str]] = [
    (LeaksOneToken, "causality"),
    (LeaksAtATileEdge, "causality"),
    (LeaksInTheGradient, "causality"),
    (IgnoresItsMask, "padding"),
    (HidesPaddingSoftly, "padding"),
    (CacheOffByOne, "steps"),
    (ForgetsTheEarlierMask, "steps"),
    (ChangesAnOldState, "steps"),
    (EditsItsInput, "shapes"),
    (NaNOnAnEmptyRow, "empty rows"),
    (AveragesAnEmptyRow, "empty rows"),
    (MixesBatchRows, "rows"),
    (ReturnsFloat32, "shapes"),
    (ReturnsFloat32, "half precision"),
    (OverflowsInHalf, "half precision"),
    (FastPathIsOff, "fast path"),
    (SecondDerivativeIsWrong, "derivatives"),
    (DecidesOnValues, "compile"),
    (ForgetsAWeight, "saving"),
    (TakesAnyMask, "arguments"),
    (MapOfSomethingElse, "map"),
    (MapShowsTheFuture, "map"),
]
