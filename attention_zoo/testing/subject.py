"""The block or model under test and its random inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, is_builtin
from attention_zoo.testing.report import Note

MakeInputs = Callable[[int, int], Mapping[str, Tensor]]

BATCH = 3
LENGTHS = (1, 2, 7, 64, 65, 131)
LONG_LENGTHS = (128, 255, 256, 257, 389, 511, 512, 513, 777, 1023, 1024, 1025, 1100)


class Padding(NamedTuple):
    """One way to pad a batch.

    Attributes:
        where: the length and the name of the mask, for messages.
        mask: (b, n) bool, or None.
        others: the block's other arguments by name.
    """

    where: str
    mask: Tensor | None
    others: dict[str, Tensor]

    @property
    def extra(self) -> dict[str, Tensor]:
        """Keyword arguments of forward: the other arguments, and the mask unless it is None."""
        return self.others if self.mask is None else {**self.others, "mask": self.mask}

    def rows(self, rows: slice) -> Padding:
        """The same padding of some rows of the batch."""
        others = {name: value[rows] for name, value in self.others.items()}
        return Padding(self.where, None if self.mask is None else self.mask[rows], others)

    def replace_masked(self, x: Tensor, other: Tensor | float) -> Tensor:
        """Features (b, n, d) or (b, s, n, d) with those of `other` at masked tokens."""
        if self.mask is None:
            return x
        return torch.where(self.mask[..., None] if x.ndim == 3 else self.mask[:, None, :, None], x, other)


@dataclass(frozen=True)
class Subject:
    """A block and what the checks need to know about it.

    Args:
        make_block: makes a new block for features of size `dim`, on the CPU, in float32.
        dim: features d.
        causal: whether the block is causal.
        lengths: sequence lengths n to test; they should cross every tile boundary of the block. Empty: 1 ... 131, and
            with effort="full" some up to 1,100.
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
        strict: whether argument validation and other properties beyond a right result are checks. None: only for the
            classes of this library; for others a violation is a note in the report.
        long_lengths: further lengths, for parts of some checks; set if `lengths` is empty and effort is "full".
        effort: "quick", or "full" for more lengths, batch sizes and samples, in about ten times the time.
        device: device to run on.
    """

    noun: ClassVar[str] = "block"  # in messages
    takes_tokens: ClassVar[bool] = False  # x holds the ids of tokens

    make_block: Callable[[], nn.Module]
    dim: int
    causal: bool
    lengths: Sequence[int] = ()
    inputs: MakeInputs | None = None
    reference: Callable[[], nn.Module] | None = None
    streams: int | None = None
    shift_invariant: bool = True
    empty_is_zero: bool | None = None
    double_backward: bool = True
    gradient_is_exact: bool = True
    bf16_error: float = 3e-2
    fp16_error: float = 4e-3
    strict: bool | None = None
    effort: str = "full"
    device: str = "cpu"
    long_lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_choice("effort", self.effort, ("quick", "full"))
        if not self.lengths:
            object.__setattr__(self, "lengths", LENGTHS)
            object.__setattr__(self, "long_lengths", LONG_LENGTHS if self.thorough else ())

    @property
    def thorough(self) -> bool:
        """Whether to run the slower part of each check."""
        return self.effort == "full"

    @property
    def sampled_lengths(self) -> Sequence[int]:
        """The lengths for variants of a check: all up to 131, or one of at least 4 tokens for quick effort."""
        if self.thorough:
            return [n for n in self.lengths if n <= 131]
        return [next((n for n in self.lengths if n >= 4), self.lengths[-1])]

    def block(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A new block in eval mode, with perturbed weights so that none is 0 or 1 by initialisation."""
        with seeded(seed):
            block = copy.deepcopy(self.make_block())  # it may be the caller's own
            _perturb(block)
        return self.adapt(block.to(self.device, dtype)).eval()

    def adapt(self, block: nn.Module) -> nn.Module:
        """The module that the checks call: the block itself."""
        return block

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

    def other(self, length: int, *, batch: int = BATCH) -> Tensor:
        """Other features of the same shape, ten times as large."""
        return 10 * self.x(length, batch=batch, seed=9)

    def weight(self, length: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random weights of the outputs, with which the checks of gradients make them a scalar."""
        return self.x(length, dtype=dtype, seed=5)

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
        """No mask, left padding, right padding and a mask with holes; every row has a valid token."""
        masks: dict[str, Tensor | None] = {"no mask": None}
        if length > 1:
            counts = torch.tensor([length, length // 2, 1] if batch > 1 else [(length + 1) // 2]).repeat(batch)[:batch]
            left = torch.arange(length) >= length - counts[:, None]
            with seeded(3):
                holes = torch.rand(batch, length) < 0.6
            holes[:, length // 2] = True
            masks |= {"left padding": left, "right padding": left.flip(1), "a mask with holes": holes}
        others = self.others(length, batch=batch, dtype=dtype)
        return {
            name: Padding(f"n={length}, {name}", None if mask is None else mask.to(self.device), others)
            for name, mask in masks.items()
        }

    def need_mask(self, block: nn.Module) -> None:
        """Raise NotApplicable if the block takes no mask."""

    def has_step(self, block: nn.Module) -> bool:
        """Whether the block decodes: it has a method `step` that is implemented."""
        step = getattr(block, "step", None)
        if not self.causal or not callable(step):
            return False
        try:
            with torch.no_grad():
                step(self.x(1), **self.others(1))
        except NotImplementedError:
            return False
        return True

    def is_strict(self, block: nn.Module) -> bool:
        """Whether the block must also satisfy what is a note for a user's block; see `strict`."""
        return is_builtin(block) if self.strict is None else self.strict

    @contextmanager
    def note_unless_strict(self, block: nn.Module) -> Iterator[None]:
        """A context in which a failure becomes a note unless the checks of this block are strict."""
        try:
            yield
        except AssertionError as failure:
            if self.is_strict(block):
                raise
            raise Note(str(failure)) from failure


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context with its own random seed; the caller's random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _perturb(block: nn.Module) -> None:
    for parameter in block.parameters():
        if parameter.is_floating_point():
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn_like(parameter) * max(0.1 * spread, 0.02))
