"""The block under test: fresh copies of it, inputs for it, and the ways to run it that all checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.testing.report import NotApplicable

MakeInputs = Callable[[int, int], Mapping[str, Tensor]]

BATCH = 3
FLOAT32_ERROR = 1e-5  # relative 2-norm that two orders of float32 additions may differ by
GRADIENT_ERROR = 1e-4


@dataclass(frozen=True)
class Subject:
    """A block and what the checks need to know of it.

    Args:
        make_block: gives a fresh block for features of size `dim`, on the CPU, in float32.
        dim: features d.
        causal: whether the block promises to hide the future.
        lengths: sequence lengths n to test; they should cross every tile edge of the block.
        inputs: `inputs(batch, length)` gives the block's other arguments, a context and `context_mask` say, by name.
        reference: gives the slow twin of a block that does not use this library's ops; it takes the block's state_dict.
        streams: the block takes (b, s, n, d) with this many streams; None for (b, n, d).
        shift_invariant: False for a block whose geometry is tied to the index, such as an image's rows: a padded row
            then need not equal the unpadded one.
        empty_is_zero: whether a row with nothing to see must give exactly 0. None: where no parameter is a bias.
        double_backward: False for a block that is exempt from second derivatives.
        gradient_is_exact: False for a block that scales gradients on purpose, which no finite difference shows.
        bf16_error, fp16_error: largest 2-norm errors against float64.
        device: where to run.
    """

    make_block: Callable[[], nn.Module]
    dim: int
    causal: bool
    lengths: Sequence[int] = (1, 2, 7, 64, 65, 131)
    inputs: MakeInputs | None = None
    reference: Callable[[], nn.Module] | None = None
    streams: int | None = None
    shift_invariant: bool = True
    empty_is_zero: bool | None = None
    double_backward: bool = True
    gradient_is_exact: bool = True
    bf16_error: float = 3e-2
    fp16_error: float = 4e-3
    device: str = "cpu"

    def block(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A fresh block in eval mode, its weights moved off their initial values so that none is 0 by chance."""
        with seeded(seed):
            block = self.make_block()
            _perturb(block)
        return block.to(self.device, dtype).eval()

    def x(self, length: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """Random features (b, n, d), or (b, s, n, d)."""
        shape = (batch, length, self.dim) if self.streams is None else (batch, self.streams, length, self.dim)
        with seeded(seed):
            return torch.randn(shape).to(self.device, dtype)

    def others(self, length: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The block's other arguments for this batch and length."""
        if self.inputs is None:
            return {}
        with seeded(2):
            made = self.inputs(batch, length)
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else value.dtype)
            for name, value in made.items()
        }

    def steps(
        self,
        block: nn.Module,
        x: Tensor,
        splits: Sequence[int],
        *,
        mask: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The outputs of `step` over consecutive pieces of x, concatenated."""
        outs, state, start = [], None, 0
        for size in splits:
            out, state = self.step(block, x, start, size, state, mask=mask, others=others)
            outs.append(out)
            start += size
        return torch.cat(outs, dim=-2)

    def step(
        self,
        block: nn.Module,
        x: Tensor,
        start: int,
        size: int,
        state: Any,
        *,
        mask: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """One step over the tokens start ... start + size - 1; the other arguments come with the first."""
        part = x[..., start : start + size, :]
        extra = {} if others is None or state is not None else dict(others)
        if mask is not None:
            extra["mask"] = mask[:, start : start + size]
        out, state = block.step(part, state, **extra)  # type: ignore[operator]
        return out, state

    def twin(self, block: nn.Module) -> nn.Module:
        """The slow twin with the block's weights, or the block itself where reference mode makes it slow."""
        if self.reference is None:
            return block
        twin = self.reference().to(next(block.parameters()))
        twin.load_state_dict(block.state_dict())
        return twin.eval()

    def masks(self, length: int, *, batch: int = BATCH) -> dict[str, Tensor | None]:
        """Padding masks by name: none, left, right, and holes; the first token row is always real somewhere."""
        if length == 1:
            return {"no mask": None}
        index = torch.arange(length)
        counts = torch.tensor([length, max(1, length // 2), 1]).repeat(batch)[:batch]
        left = index >= length - counts[:, None]
        with seeded(3):
            holes = torch.rand(len(counts), length) < 0.6
        holes[:, length // 2] = True
        masks = {"no mask": None, "left padding": left, "right padding": left.flip(1), "a mask with holes": holes}
        return {name: None if mask is None else mask.to(self.device) for name, mask in masks.items()}

    def needs_step(self, block: nn.Module) -> None:
        """Leave a check that is about decoding where the block does not decode."""
        if not self.causal:
            raise NotApplicable("the block is not causal")
        if not callable(getattr(block, "step", None)):
            raise NotApplicable("the block has no step")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with a seed of its own, and leave the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _perturb(block: nn.Module) -> None:
    for parameter in block.parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta":
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn_like(parameter) * max(0.1 * spread, 0.02))


def relative_error(got: Tensor, want: Tensor) -> float:
    """2-norm of the difference over the 2-norm of `want`, in float64; infinite where one is not finite."""
    got, want = got.detach().double(), want.detach().double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = float(want.norm())
    gap = float((got - want).norm())
    return gap / scale if scale > 0 else gap


def expect(condition: object, message: str) -> None:
    """Raise AssertionError with `message` unless `condition` holds; unlike assert also under python -O."""
    if not condition:
        raise AssertionError(message)


def expect_close(got: Tensor, want: Tensor, limit: float, what: str) -> None:
    """Raise AssertionError with one sentence where `got` is further from `want` than `limit`, relatively."""
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)} differ")
    error = relative_error(got, want)
    if not error <= limit:
        gap = torch.nan_to_num((got.detach().double() - want.detach().double()).abs(), nan=float("inf"))
        at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)) if gap.numel() else ()
        raise AssertionError(f"{what}: relative error {error:.2g} exceeds {limit:.2g}, largest at index {at}")


def expect_equal(got: Tensor, want: Tensor, what: str) -> None:
    """Raise AssertionError with one sentence where two tensors are not equal to the last bit."""
    if torch.equal(got, want):
        return
    gap = (got.detach().double() - want.detach().double()).abs()
    at = tuple(int(i) for i in torch.unravel_index(torch.nan_to_num(gap, nan=float("inf")).argmax(), gap.shape))
    raise AssertionError(f"{what}, by up to {float(gap.max()):.2g}, at index {at}")
