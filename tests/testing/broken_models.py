"""Models with one defect each, and the check that must detect it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import LanguageModel
from tests.testing.gpt import GPT, NUM_TOKENS


class Base(LanguageModel):
    """A small model without defects."""

    def __init__(self) -> None:
        super().__init__(num_tokens=NUM_TOKENS, dim=16, depth=1, heads=2, dim_head=8)


class ReturnsFeatures(GPT):
    """Features instead of logits."""

    def logits(self, x: Tensor) -> Tensor:
        return x


class ReplacesPaddingInPlace(GPT):
    """The largest id of the caller's tokens is replaced."""

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        tokens[tokens == NUM_TOKENS - 1] = 0
        return super().forward(tokens, mask=mask)


class DropsInEvalMode(GPT):
    """Dropout in eval mode."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(F.dropout(x, 0.1))


class SeesTheNextToken(GPT):
    """The embedding of the next token is added."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x + 1e-3 * F.pad(x[:, 1:], (0, 0, 0, 1)))


class LeaksInTheGradient(GPT):
    """The logits are right, but have a gradient to the next token."""

    def logits(self, x: Tensor) -> Tensor:
        later = F.pad(x[:, 1:], (0, 0, 0, 1))
        return super().logits(x + later - later.detach())


class NormalisesOverTheSequence(GPT):
    """Statistics over all tokens, in training mode only."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x - x.mean(1, keepdim=True) if self.training else x)


class NormalisesOverTheBatch(GPT):
    """Batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(16)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(self.batch_norm(x.mT).mT)


class MixesRows(GPT):
    """The mean over the batch is added."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x + 1e-3 * x.mean(0))


class IgnoresItsMask(GPT):
    """Padding is attended to."""

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


class CountsPaddingInPositions(GPT):
    """The position of a token includes the padding on its left."""

    def position_of(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return torch.arange(tokens.shape[1])


class PoolsOverPadding(GPT):
    """A running mean over all tokens, masked ones included."""

    def logits(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return super().logits(x + 1e-2 * x.cumsum(1) / count)


class StepsFromTheWrongPosition(LanguageModel):
    """Decoding counts one valid token too many."""

    def __init__(self) -> None:
        super().__init__(
            num_tokens=NUM_TOKENS, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=70, positions="learned"
        )

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        logits, new = super().step(tokens, state, mask=mask)
        return logits, replace(new, valid_count=(new.valid_count + 1).clamp(max=60))


class StepsWithoutTheMask(Base):
    """The mask of later steps is ignored."""

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        return super().step(tokens, state, mask=mask if state is None else None)


class ReusesItsState(Base):
    """The state belongs to the model: a newer step changes an older state."""

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        logits, self.last = super().step(tokens, None if state is None else self.last, mask=mask)
        return logits, "the model's own"


class DecodesInTrainingMode(Base):
    """Decoding in inference mode uses other logits."""

    def step(self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        logits, state = super().step(tokens, state, mask=mask)
        return -logits if torch.is_inference_mode_enabled() else logits, state


class CountsPaddingInTheLoss(GPT):
    """The mean is over all targets, masked ones included."""

    def loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        logits = self(tokens[:, :-1], mask=None if mask is None else mask[:, :-1])
        losses = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return (losses if mask is None else losses * (mask[:, 1:] & mask[:, :-1])).mean()


class PredictsPadding(GPT):
    """Masked targets are predicted too."""

    def loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        logits = self(tokens[:, :-1], mask=None if mask is None else mask[:, :-1])
        return F.cross_entropy(logits.mT, tokens[:, 1:])


class PredictsTheTokenItself(GPT):
    """The targets are not shifted."""

    def loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return F.cross_entropy(self(tokens, mask=mask).mT, tokens)


class AveragesRows(GPT):
    """The mean of the rows' means: rows with few targets count as much as others."""

    def loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        rows = [super(AveragesRows, self).loss(t[None], mask=None if mask is None else m[None]) for t, m in zip(
            tokens, tokens if mask is None else mask, strict=True)]  # fmt: skip
        return torch.stack(rows).mean()


class OverflowsInHalf(GPT):
    """Squares that overflow in float16."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x * (1000 * x).square().mean(-1, keepdim=True).rsqrt())


class RoundsPositions(GPT):
    """Positions in the dtype of the weights: bfloat16 has 8 bits."""

    def position_of(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        position = super().position_of(tokens, mask).to(self.norm.weight.dtype)
        return ((position + 1000) - 1000).long()


class BranchesOnValues(GPT):
    """A branch on the value of a tensor, which cannot be traced."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x if float(x.detach().sum()) > 0 else x + 0)


class ForgetsATensor(GPT):
    """A random tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1 + torch.rand(16)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x * self.scale.to(x))


class SavesWithoutItsNorm(GPT):
    """`save` drops the weights of the last norm."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith("norm.")}
        torch.save(weights, Path(folder, "weights.pt"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        model = cls()
        model.load_state_dict(torch.load(Path(folder, "weights.pt")), strict=False)
        return model


class ScalesInTraining(GPT):
    """Another scale in training mode."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) * (1.1 if self.training else 1.0)


class DropsWithoutRescaling(GPT):
    """Dropout that does not scale up what it keeps."""

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return logits * (torch.rand_like(logits) > 0.1) if self.training else logits


BROKEN_MODELS: list[tuple[type[nn.Module], str]] = [
    (ReturnsFeatures, "shapes"),
    (ReplacesPaddingInPlace, "shapes"),
    (DropsInEvalMode, "shapes"),
    (SeesTheNextToken, "causality"),
    (LeaksInTheGradient, "causality"),
    (NormalisesOverTheSequence, "causality"),
    (NormalisesOverTheBatch, "rows"),
    (MixesRows, "rows"),
    (IgnoresItsMask, "padding"),
    (CountsPaddingInPositions, "padding"),
    (PoolsOverPadding, "padding"),
    (StepsFromTheWrongPosition, "steps"),
    (StepsWithoutTheMask, "steps"),
    (ReusesItsState, "steps"),
    (StepsFromTheWrongPosition, "generation"),
    (DecodesInTrainingMode, "generation"),
    (CountsPaddingInTheLoss, "loss"),
    (PredictsPadding, "loss"),
    (PredictsTheTokenItself, "loss"),
    (AveragesRows, "loss"),
    (OverflowsInHalf, "half precision"),
    (RoundsPositions, "half precision"),
    (BranchesOnValues, "compile"),
    (BranchesOnValues, "synchronisation"),
    (ForgetsATensor, "saving"),
    (SavesWithoutItsNorm, "saving"),
    (ScalesInTraining, "training"),
    (DropsWithoutRescaling, "training"),
    (GPT, "arguments"),
]
