"""Attention layers with one subtle defect each: in training mode, at some lengths, in states, in gradients."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import KeyValueState
from attention_zoo.ops import softmax_attention, softmax_attention_weights
from attention_zoo.ops.implementation import choose
from tests.cases import DIM
from tests.testing.broken import Base


class Wrapped(nn.Module):
    """A layer of the user's own around a correct one, whose forward subclasses change."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.block = Base()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.block(x, mask=mask)


def previous(x: Tensor) -> Tensor:
    """The token before each."""
    return F.pad(x[:, :-1], (0, 0, 1, 0))


def following(x: Tensor) -> Tensor:
    """The token after each."""
    return F.pad(x[:, 1:], (0, 0, 0, 1))


# Shapes and side effects


class CountsCalls(Wrapped):
    """A buffer counts the calls in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, mask=mask)


class DrawsInEvalMode(Wrapped):
    """Random numbers are drawn and not used."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        torch.rand(1)
        return super().forward(x, mask=mask)


class DrawsFromPython(Wrapped):
    """Python's random state advances."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        random.random()
        return super().forward(x, mask=mask)


class AssumesStrides(Wrapped):
    """x is read as if it were contiguous."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        return super().forward(x.as_strided((b, n, d), (n * d, d, 1)), mask=mask)


class DiffersInInferenceMode(Wrapped):
    """Another scale without gradients."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask=mask)
        return 1.001 * out if torch.is_inference_mode_enabled() else out


# Causality


class LeaksInTraining(Wrapped):
    """The next token is added in training mode."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * following(x) if self.training else x, mask=mask)


class CentresInTraining(Wrapped):
    """The mean over the sequence is subtracted in training mode."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True) if self.training else x, mask=mask)


class LeaksAt256(Wrapped):
    """Sequences of exactly 256 tokens take a path that leaks."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * following(x) if x.shape[1] == 256 else x, mask=mask)


class LeaksBeyond1000(Wrapped):
    """The last token is added to sequences of more than 1,000."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * x[:, -1:] if x.shape[1] > 1000 else x, mask=mask)


class LeaksForOneRow(Wrapped):
    """A batch of one row takes a path that leaks."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * following(x) if x.shape[0] == 1 else x, mask=mask)


class LeaksWithoutGradient(Wrapped):
    """The next token has an effect, but no gradient."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * following(x).detach(), mask=mask)


# Rows


class NormalisesOverTheBatch(Wrapped):
    """Batch normalisation: statistics of the batch in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(self.norm(x.mT).mT, mask=mask)


class CutsLargeBatches(Wrapped):
    """Rows beyond 32 get the result of row 0."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        index = torch.arange(x.shape[0]) % 32
        return super().forward(x[index], mask=None if mask is None else mask[index])


class NumbersItsRows(Wrapped):
    """The index in the batch is added."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * torch.arange(x.shape[0])[:, None, None].to(x), mask=mask)


# Padding


class UsesTheFirstMask(Wrapped):
    """The mask of row 0 holds for all rows."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=None if mask is None else mask[:1].expand_as(mask))


class IgnoresTheMaskOfOneRow(Wrapped):
    """The mask is ignored in a batch of one row."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask if x.shape[0] > 1 else None)


class AddsPaddingInTraining(Wrapped):
    """The token before is added in training mode, masked or not."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-2 * previous(x) if self.training else x, mask=mask)


class TakesMasksForLengths(Wrapped):
    """A mask is reduced to its last valid token, so that holes are filled."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = mask.flip(1).cumsum(1).flip(1) > 0
        return super().forward(x, mask=mask)


class RescalesWithAMask(Wrapped):
    """Another scale if there is a mask."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask) * (1.001 if mask is not None and bool(mask.all()) else 1.0)


class LearnsFromPadding(Wrapped):
    """Masked tokens change the gradient of a parameter, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        extra = self.scale * x.detach().mean()
        return super().forward(x, mask=mask) + (extra - extra.detach())


class MultipliesByTheMask(Wrapped):
    """A running sum over valid tokens multiplies the others by 0, which keeps NaN."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        valid = x if mask is None else x * mask[..., None]
        return super().forward(x, mask=mask) + 1e-2 * valid.cumsum(1)


class ReplacesNaN(Wrapped):
    """NaN becomes 0 in the output."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask).nan_to_num()


# Training mode


class DropsWithoutRescaling(Wrapped):
    """A tenth of the features is dropped, and the others are not scaled up."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask=mask)
        return out * (torch.rand_like(out) > 0.1) if self.training else out


class ScalesInTraining(Wrapped):
    """Another scale in training mode."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask) * (1.1 if self.training else 1.0)


class DecaysItsWeights(Wrapped):
    """Forward in training mode shrinks a parameter."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if self.training:
            self.block.to_out.weight.data.mul_(0.999)
        return super().forward(x, mask=mask)


class SeedsGlobally(Wrapped):
    """The same elements are dropped in every step of training."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if self.training:
            torch.manual_seed(0)
        return F.dropout(super().forward(x, mask=mask), 0.1, self.training)


class KeepsARunningMean(Wrapped):
    """Training mode updates a statistic that is no buffer and that eval mode uses."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Any = 0.0

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x, mask=mask) - (0.0 if self.training else self.mean)


class DropsInForwardOnly(Base):
    """Decoding in training mode drops nothing."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        return F.dropout(super().forward(x, mask=mask), 0.1, self.training)


# Decoding


class StepsOverAWindow(Base):
    """Decoding keeps the last 300 tokens."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        if state is not None and state.length > 300:
            rest = None if state.mask is None else state.mask[:, -300:]
            state = KeyValueState(state.keys[:, :, -300:], state.values[:, :, -300:], rest)
        return super().step(x, state, mask=mask)


@dataclass
class Cache:
    """Keys and values in buffers that the next step writes to."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    length: int


class SharesItsCache(Base):
    """All branches of a state write to the same buffers."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        b, t, _d = x.shape
        start = 0 if state is None else state.length
        q, k, v = self.project(x, start=start)
        if state is None:
            shape = (b, self.heads, 256, self.dim_head)
            state = Cache(x.new_zeros(shape), x.new_zeros(shape), torch.ones(b, 256, dtype=torch.bool), 0)
        state.keys.data[:, :, start : start + t] = k
        state.values.data[:, :, start : start + t] = v
        if mask is not None:
            state.mask[:, start : start + t] = mask
        end = start + t
        out = self.attend(q, state.keys[:, :, :end], state.values[:, :, :end], state.mask[:, :end])
        return self.merge(out, x), Cache(state.keys, state.values, state.mask, end)


class BranchesOnTheMask(Base):
    """A mask without padding is dropped, which reads its values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().attend(q, k, v, None if mask is not None and mask.all() else mask)


class StepsBranchOnTheMask(Base):
    """As BranchesOnTheMask, while decoding only."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        return super().step(x, state, mask=None if mask is not None and bool(mask.all()) and state is None else mask)


class KeepsTheInput(Base):
    """The state is the caller's tensors, from which keys and values are computed again."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        parts = [*(state or []), (x, mask)]
        whole, masks = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return self(whole, mask=masks)[:, -x.shape[1] :], parts


class KeepsItsOutput(Base):
    """The state holds the last output, which belongs to the caller, and subtracts it twice."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        inner, last, copy = state or (None, 0, 0)
        out, inner = super().step(x, inner, mask=mask)
        shown = out + 0 if state is None else out + (last - copy).mean(1, keepdim=True)
        return shown, (inner, shown, shown.clone())


class ForgetsTheFirstMask(Base):
    """A step without a mask makes all earlier tokens valid."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        if state is not None and mask is None:
            state = KeyValueState(state.keys, state.values, None)
        return super().step(x, state, mask=mask)


class NeedsTheFirstMask(Base):
    """A mask is ignored if the first step had none."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        if state is not None and state.mask is None:
            mask = None
        return super().step(x, state, mask=mask)


class StepsSeeTheWholeChunk(Base):
    """The new tokens of a later step see each other in both directions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.shape[-2] < k.shape[-2]:
            return softmax_attention(q, k, v, mask=mask)
        return super().attend(q, k, v, mask)


class ForgetsGradients(Base):
    """The state is detached."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        return super().step(x, None if state is None else state.detach(), mask=mask)


class StepsWithFrozenWeights(Base):
    """Decoding has no gradient to the output projection."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        out, state = super().step(x, state, mask=mask)
        weight = self.to_out.weight
        scale = (weight.detach().sum() + 100) / (weight.sum() + 100)
        return out * scale, state


class OverwritesWithSeveral(Base):
    """A step of several tokens changes the last key of the old state."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        out, new = super().step(x, state, mask=mask)
        if state is not None and x.shape[1] > 1 and not torch.is_grad_enabled():
            state.keys[:, :, -1] = new.keys[:, :, -1]
        return out, new


class StepsOneRowWithoutMask(Base):
    """The mask is ignored while decoding one row."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        return super().step(x, state, mask=mask if x.shape[0] > 1 else None)


# Fast paths, derivatives, half precision


class FastPathHasAWindow(Base):
    """The fast path drops keys at a distance of 600 and more."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = k.shape[-2]
        if choose("auto", ()) == "reference" or n <= 600 or q.shape[-2] != n:
            return super().attend(q, k, v, mask)
        near = torch.ones(n, n, dtype=torch.bool).tril().triu(-599)[None, None]
        return softmax_attention(q, k, v, mask=near if mask is None else near & mask[:, None, None])


class DetachesAWeight(Wrapped):
    """Half of the output projection gets no gradient."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask=mask)
        detached = torch.func.functional_call(
            self.block, {"to_out.weight": self.block.to_out.weight.detach()}, (x,), {"mask": mask}
        )
        return 0.5 * out + 0.5 * detached


class ForgetsGradientsWithAMask(Wrapped):
    """With a mask the gradient flows to one half of the projection only."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask=mask)
        return out if mask is None else 0.5 * out + 0.5 * out.detach()


class _Double(torch.autograd.Function):
    """x^3, whose backward reads the input of the latest forward pass."""

    latest: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _Double.latest = x
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * _Double.latest**2 * gradient


class SharesSavedTensors(Wrapped):
    """Backward uses the tensors of the latest forward pass."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(_Double.apply(x), mask=mask)


class _Rough(torch.autograd.Function):
    """The identity, whose gradient is halved in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (0.5 if gradient.dtype in (torch.float16, torch.bfloat16) else 1.0)


class WrongGradientsInHalf(Wrapped):
    """The gradient in half precision is half as large."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(_Rough.apply(x), mask=mask)


class OverflowsForLargeInputs(Wrapped):
    """An RMS norm that sums squares in the dtype of x."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x * (x.square().sum(-1, keepdim=True) + 1).rsqrt(), mask=mask)


class SumsInHalf(Wrapped):
    """A running sum in the dtype of x."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        totals = []
        for token in x.unbind(1):
            total = total + (token + 4)
            totals.append(total - 4 * (len(totals) + 1))
        return super().forward(x + torch.stack(totals, 1), mask=mask)


# Saving and maps


class KeepsOldWeights(Wrapped):
    """A product of weights is computed once."""

    product: Tensor | None = None

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if self.product is None or self.product.dtype != x.dtype:
            self.product = self.block.to_out.weight.detach().sum().exp()
        return super().forward(x, mask=mask) + self.product


class MapWithAnotherScale(Wrapped):
    """Without values and output to compare: the scores of the map have another scale."""

    factor = 1.5

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        q, k, _ = self.block.project(x, start=0)
        return softmax_attention_weights(self.factor * q, k, mask=mask, causal=True)


class MapOfRightWeights(MapWithAnotherScale):
    """The same without a defect."""

    factor = 1.0


class MapOfMeanHeads(MapWithAnotherScale):
    """Without values and output to compare: the mean over heads, repeated."""

    factor = 1.0

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        weights = super().attention_map(x, mask=mask)
        return weights.mean(1, keepdim=True).expand_as(weights)


class MapWithoutTheMask(MapWithAnotherScale):
    """The map ignores the mask."""

    factor = 1.0

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().attention_map(x)


BROKEN_MORE: list[tuple[type[nn.Module], str]] = [
    (CountsCalls, "shapes"),
    (DrawsInEvalMode, "shapes"),
    (DrawsFromPython, "shapes"),
    (AssumesStrides, "shapes"),
    (DiffersInInferenceMode, "shapes"),
    (LeaksInTraining, "causality"),
    (CentresInTraining, "causality"),
    (LeaksForOneRow, "causality"),
    (LeaksWithoutGradient, "causality"),
    (NormalisesOverTheBatch, "rows"),
    (CutsLargeBatches, "rows"),
    (NumbersItsRows, "rows"),
    (UsesTheFirstMask, "padding"),
    (IgnoresTheMaskOfOneRow, "padding"),
    (AddsPaddingInTraining, "padding"),
    (TakesMasksForLengths, "padding"),
    (RescalesWithAMask, "padding"),
    (LearnsFromPadding, "padding"),
    (MultipliesByTheMask, "not finite"),
    (ReplacesNaN, "not finite"),
    (DropsWithoutRescaling, "training"),
    (ScalesInTraining, "training"),
    (DecaysItsWeights, "training"),
    (SeedsGlobally, "training"),
    (KeepsARunningMean, "training"),
    (DropsInForwardOnly, "training"),
    (SharesItsCache, "steps"),
    (KeepsTheInput, "steps"),
    (KeepsItsOutput, "steps"),
    (ForgetsTheFirstMask, "steps"),
    (NeedsTheFirstMask, "steps"),
    (StepsSeeTheWholeChunk, "steps"),
    (ForgetsGradients, "steps"),
    (StepsWithFrozenWeights, "steps"),
    (OverwritesWithSeveral, "steps"),
    (StepsOneRowWithoutMask, "steps"),
    (DetachesAWeight, "derivatives"),
    (ForgetsGradientsWithAMask, "derivatives"),
    (SharesSavedTensors, "derivatives"),
    (WrongGradientsInHalf, "half precision"),
    (OverflowsForLargeInputs, "half precision"),
    (SumsInHalf, "half precision"),
    (KeepsARunningMean, "saving"),
    (KeepsOldWeights, "saving"),
    (MapWithAnotherScale, "map"),
    (MapOfMeanHeads, "map"),
    (MapWithoutTheMask, "map"),
    (BranchesOnTheMask, "synchronisation"),
    (StepsBranchOnTheMask, "synchronisation"),
]

# Detected with the default lengths only.
BROKEN_LONG: list[tuple[type[nn.Module], str]] = [
    (LeaksAt256, "causality"),
    (LeaksBeyond1000, "causality"),
    (StepsOverAWindow, "steps"),
    (FastPathHasAWindow, "fast path"),
]
