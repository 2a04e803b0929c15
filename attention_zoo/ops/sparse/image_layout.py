"""Sequences of text followed by an image, and which of their tokens see each other.

The masks are the definitions: dense attention under them is the reference of `ops.conv` and `ops.axial`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WINDOWS = ("quadrant", "causal")
AXES = ("row", "column")


@dataclass(frozen=True)
class TextImageLayout:
    """The geometry of a sequence: text tokens, then an image of height x width tokens in row-major order.

    A sequence may be any prefix of it. Drawn for text_len=3, height=2, width=4, with the index of each token:

        text  0 1 2
        image 3 4 5 6
              7 8 9 10

    Args:
        text_len: text tokens, whatever stands before the image included; 0 for an image alone.
        height, width: rows and columns of the image.

    Raises:
        TypeError: a size is not an int.
        ValueError: it is below 1, text_len below 0.
    """

    text_len: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name, smallest in (("text_len", 0), ("height", 1), ("width", 1)):
            check_size(name, getattr(self, name), smallest)

    @property
    def image_len(self) -> int:
        """Tokens of the image."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.text_len + self.image_len

    def check(self, tokens: int, *, name: str = "x") -> None:
        """Refuse a sequence longer than text and image.

        Raises:
            ValueError: it is.
        """
        if tokens > self.length:
            raise ValueError(f"{name} must hold at most the {self.length} tokens of {self}, got {tokens} tokens")

    def rows_and_columns(self, start: int, stop: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Row and column of the tokens start ... stop - 1; meaningless, below 0, for text."""
        index = torch.arange(start, stop, device=device) - self.text_len
        return index.div(self.width, rounding_mode="floor"), index % self.width


def check_size(name: str, size: int, smallest: int) -> None:
    """Refuse a size that is not a whole number of at least `smallest`.

    Raises:
        TypeError, ValueError: it is so.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int, got {name}={size!r}")
    if size < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {name}={size}")


def check_axis(axis: str) -> None:
    """Refuse an axis that an image has not.

    Raises:
        ValueError: it is so.
    """
    if axis not in AXES:
        raise ValueError(f"axis must be one of {AXES}, got {axis=}")


def check_kernel(kernel_size: int, dilation: int, window: str) -> None:
    """Refuse a window that has no middle, no size, or no name.

    Raises:
        TypeError, ValueError: it is so.
    """
    check_size("kernel_size", kernel_size, 1)
    check_size("dilation", dilation, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size=}")
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {WINDOWS}, got {window=}")


def reach(kernel_size: int, dilation: int, window: str) -> int:
    """How many rows above its own a token sees."""
    return (kernel_size - 1) * dilation // (1 if window == "quadrant" else 2)


def conv_mask(
    layout: TextImageLayout,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    window: str = "quadrant",
    start: int = 0,
    stop: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Convolution-like visibility: all text before a token, and in the image a window that ends at it.

    kernel 3 (x the token, o what it sees of the image), window "quadrant" and window "causal":

        o o o . .        . o o o .
        o o o . .        . o x . .
        o o x . .        . . . . .

    Args:
        layout: the sequence.
        kernel_size: odd. The quadrant is kernel_size wide and high; the causal window is the kernel around the token,
            cut off after it.
        dilation: distance between neighbouring rows and columns of the window.
        window: "quadrant" or "causal".
        start, stop: the queries; stop is the number of keys as well. None: the whole sequence.
        device: where the mask is built.

    Returns:
        (stop - start, stop) bool, True where query (row) sees key (column).

    Raises:
        ValueError: kernel_size is even, an unknown window, stop exceeds the layout.
    """
    check_kernel(kernel_size, dilation, window)
    down, right, past = _offsets(layout, start, stop, device)
    side = (kernel_size - 1) * dilation
    if window == "quadrant":
        near = (down >= 0) & (down <= side) & (right >= 0) & (right <= side)
    else:
        near = (down.abs() <= side // 2) & (right.abs() <= side // 2)
    near &= (down % dilation == 0) & (right % dilation == 0)
    return _with_text(layout, near, past)


def axial_mask(
    layout: TextImageLayout,
    *,
    axis: str = "row",
    start: int = 0,
    stop: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Axial visibility: all text before a token, and in the image what precedes it in its own row, or column.

    axis "row" and axis "column" (x the token, o what it sees of the image):

        . . . . .        . . o . .
        . . . . .        . . o . .
        o o x . .        . . x . .

    Args:
        layout: the sequence.
        axis: "row" or "column".
        start, stop, device: as in `conv_mask`.

    Returns:
        (stop - start, stop) bool, True where query (row) sees key (column).

    Raises:
        ValueError: an unknown axis, stop exceeds the layout.
    """
    check_axis(axis)
    down, right, past = _offsets(layout, start, stop, device)
    return _with_text(layout, down == 0 if axis == "row" else right == 0, past)


def _offsets(
    layout: TextImageLayout, start: int, stop: int | None, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """How far key stands above and left of query, and whether it stands before it or is it: (i, j) each."""
    stop = layout.length if stop is None else stop
    layout.check(stop, name="stop")
    row, column = layout.rows_and_columns(0, stop, device=device)
    index = torch.arange(stop, device=device)
    past = index <= index[start:, None]
    return row[start:, None] - row, column[start:, None] - column, past


def _with_text(layout: TextImageLayout, near: Tensor, past: Tensor) -> Tensor:
    """Text keys are seen by all that come after them; image keys where they are near."""
    near[:, : layout.text_len] = True
    return near & past
