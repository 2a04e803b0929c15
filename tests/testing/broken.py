"""Attention layers with one defect each, and the check that must detect it."""

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
    """A small layer without defects."""

    def __init__(self) -> None:
        super().__init__(DIM, heads=2, dim_head=8)


class LeaksOneToken(Base):
    """Each query also attends to the next token."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        allowed = torch.ones(i, j, dtype=torch.bool).tril(j - i + 1)[None, None]
        return softmax_attention(q, k, v, mask=allowed if mask is None else allowed & mask[:, None, None])


class LeaksAtATileEdge(Base):
    """Query 63 attends to key 64; all others are causal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        allowed = torch.ones(i, j, dtype=torch.bool).tril(j - i)
        if i == j and i > 64:
            allowed[63, 64] = True
        return softmax_attention(q, k, v, mask=allowed[None, None] if mask is None else allowed & mask[:, None, None])


class LeaksInTheGradient(Base):
    """The output is right, but has a gradient to the next token."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        later = F.pad(x[:, 1:], (0, 0, 0, 1))
        return super().forward(x, mask=mask) + (later - later.detach())


class IgnoresItsMask(Base):
    """Padding is attended to."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().attend(q, k, v, None)


class HidesPaddingSoftly(Base):
    """Padding keeps a small weight: its scores get -8 instead of minus infinity."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else -8.0 * (~mask)[:, None, None].to(q.dtype)
        return softmax_attention(q, k, v, bias=bias, causal=self.causal)


class CacheOffByOne(Base):
    """Decoding drops the first token."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, KeyValueState]:
        if state is not None and state.length > 1:
            rest = None if state.mask is None else state.mask[:, 1:]
            state = KeyValueState(state.keys[:, :, 1:], state.values[:, :, 1:], rest)
        return super().step(x, state, mask=mask)


class ForgetsTheEarlierMask(Base):
    """Decoding attends to the padding of earlier steps."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, KeyValueState]:
        return super().step(x, state if state is None else replace(state, mask=None), mask=mask)


class ChangesAnOldState(Base):
    """A newer step overwrites the last key of the older state."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, KeyValueState]:
        out, new = super().step(x, state, mask=mask)
        if state is not None and not torch.is_grad_enabled():
            state.keys[:, :, -1] = new.keys[:, :, -1]
        return out, new


class EditsItsInput(Base):
    """The input is normalised in place."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            x.div_(x.norm(dim=-1, keepdim=True))
        return super().forward(x, mask=mask)


class NaNOnAnEmptyRow(Base):
    """Softmax over scores that are all minus infinity."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        allowed = torch.ones(i, j, dtype=torch.bool).tril(j - i)
        allowed = allowed if mask is None else allowed & mask[:, None, None]
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


class AveragesAnEmptyRow(Base):
    """A finite fill instead of minus infinity: a row without valid tokens attends to all of them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        i, j = q.shape[-2], k.shape[-2]
        allowed = torch.ones(i, j, dtype=torch.bool).tril(j - i)
        allowed = allowed if mask is None else allowed & mask[:, None, None]
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -1e9).softmax(-1) @ v


class MixesBatchRows(Base):
    """A fraction of the mean over the batch is added to every row."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * x.mean(dim=0, keepdim=True), mask=mask)


class ReturnsFloat32(Base):
    """The output is float32 for every input dtype."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask).float()


class OverflowsInHalf(Base):
    """Squares that overflow in float16."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask) * ((x * 1000).square().mean() / (x * 1000).square().mean())


class FastPathIsOff(Base):
    """The fast path uses another scale than the reference."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale = 8**-0.5 if choose("auto", ()) == "reference" else 8**-0.5 * 1.001
        return softmax_attention(q, k, v, mask=mask, causal=True, scale=scale)


class _Square(torch.autograd.Function):
    """x^2 with a backward that detaches x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.detach()


class SecondDerivativeIsWrong(Base):
    """The first derivative is right, the second is wrong without an error."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(_Square.apply(x), mask=mask)


class DecidesOnValues(Base):
    """A branch on the values of a tensor, which cannot be traced."""

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
    """Arguments are not validated."""

    def check_inputs(self, x: Tensor, mask: Tensor | None, *arguments: Any, **options: Any) -> None:
        """Accept everything."""


class MapOfSomethingElse(Base):
    """The attention map is computed with another scale."""

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return super().weights(q * 8**0.5, k, mask)


class MapShowsTheFuture(Base):
    """The attention map is that of the bidirectional layer."""

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
