"""The block under test, its random inputs, and helpers shared by the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo.testing.report import NotApplicable

MakeInputs = Callable[[int, int], Mapping[str, Tensor]]

BATCH = 3
FLOAT32_ERROR = 1e-5  # relative 2-norm by which two orders of float32 additions may differ
GRADIENT_ERROR = 1e-4


class Padding(NamedTuple):
    """One way to pad a batch.

    where: the length and the name of the mask, for messages.
    mask: (b, n) bool, or None.
    extra: keyword arguments of forward: the other inputs of the block, and the mask unless it is None.
    """

    where: str
    mask: Tensor | None
    extra: dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A block and what the checks need to know about it.

    Args:
        make_block: makes a new block for features of size `dim`, on the CPU, in float32.
        dim: features d.
        causal: whether the block is causal.
        lengths: sequence lengths n to test; they should cross every tile boundary of the block.
        inputs: `inputs(batch, length)` returns the block's other arguments by name, such as a context and
            `context_mask`.
        reference: makes the reference of a block that does not use this library's operations; it takes the state_dict
            of the block.
        streams: number of streams s if the block takes (b, s, n, d); None for (b, n, d).
        shift_invariant: False for a block whose geometry is tied to the index, such as an image layout: a padded row
            then need not equal the unpadded one.
        empty_is_zero: whether the output of a row without valid tokens must be exactly 0. None: if no parameter is a
            bias.
        double_backward: False for a block that is exempt from second derivatives.
        gradient_is_exact: False for a block that scales gradients on purpose, so that finite differences disagree.
        bf16_error, fp16_error: largest relative 2-norm error against float64.
        device: device to run on.
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
        """A new block in eval mode, with perturbed weights so that none is 0 or 1 by initialisation."""
        with seeded(seed):
            block = self.make_block()
            _perturb(block)
        return block.to(self.device, dtype).eval()

    def reference_of(self, block: nn.Module) -> nn.Module:
        """The reference with the block's weights, or the block itself if its reference is the reference mode."""
        if self.reference is None:
            return block
        reference = self.reference().to(next(block.parameters()))
        reference.load_state_dict(block.state_dict())
        return reference.eval()

    def x(self, length: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """Random features (b, n, d), or (b, s, n, d) with streams."""
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

    def paddings(self, length: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> dict[str, Padding]:
        """No mask, left padding, right padding and a mask with holes; each row has a valid token."""
        others = self.others(length, batch=batch, dtype=dtype)
        masks: dict[str, Tensor] = {}
        if length > 1:
            counts = torch.tensor([length, max(1, length // 2), 1]).repeat(batch)[:batch]
            left = torch.arange(length) >= length - counts[:, None]
            with seeded(3):
                holes = torch.rand(len(counts), length) < 0.6
            holes[:, length // 2] = True
            masks = {"left padding": left, "right padding": left.flip(1), "a mask with holes": holes}
        found = {"no mask": Padding(f"n={length}, no mask", None, others)}
        for name, mask in masks.items():
            mask = mask.to(self.device)
            found[name] = Padding(f"n={length}, {name}", mask, {**others, "mask": mask})
        return found

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
        """One step over the tokens start ... start + size - 1; the other arguments are given with the first step."""
        extra = {} if others is None or state is not None else dict(others)
        if mask is not None:
            extra["mask"] = mask[:, start : start + size]
        return block.step(x[..., start : start + size, :], state, **extra)  # type: ignore[operator]

    def steps(
        self,
        block: nn.Module,
        x: Tensor,
        splits: Sequence[int],
        *,
        mask: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The concatenated outputs of `step` over consecutive pieces of x of these sizes."""
        outs, state, start = [], None, 0
        for size in splits:
            out, state = self.step(block, x, start, size, state, mask=mask, others=others)
            outs.append(out)
            start += size
        return torch.cat(outs, dim=-2)

    def require_step(self, block: nn.Module) -> None:
        """Raise NotApplicable if the block does not decode."""
        if not self.causal:
            raise NotApplicable("the block is not causal")
        if not callable(getattr(block, "step", None)):
            raise NotApplicable("the block has no step")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context with its own random seed; the caller's random state is restored."""
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
    """2-norm of the difference over the 2-norm of `want`, in float64; infinite if `got` is not finite."""
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


def expect_zero(tensor: Tensor, message: str) -> None:
    """Raise AssertionError unless the tensor is exactly 0; `{}` in the message becomes its largest magnitude."""
    size = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    expect(size == 0, message.format(f"{size:.2g}"))


def expect_close(got: Tensor, want: Tensor, limit: float, what: str) -> None:
    """Raise AssertionError if the relative error of `got` exceeds `limit`."""
    expect(got.shape == want.shape, f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)} differ")
    error = relative_error(got, want)
    if not error <= limit:
        _, at = _largest_gap(got, want)
        raise AssertionError(f"{what}: relative error {error:.2g} exceeds {limit:.2g}, largest at index {at}")


def expect_equal(got: Tensor, want: Tensor, what: str) -> None:
    """Raise AssertionError unless two tensors are bitwise equal."""
    if not torch.equal(got, want):
        gap, at = _largest_gap(got, want)
        raise AssertionError(f"{what}, by up to {gap:.2g}, at index {at}")


def _largest_gap(got: Tensor, want: Tensor) -> tuple[float, tuple[int, ...]]:
    gap = torch.nan_to_num((got.detach().double() - want.detach().double()).abs(), nan=float("inf"))
    return float(gap.max()), tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
