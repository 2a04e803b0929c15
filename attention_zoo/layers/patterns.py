"""Sparse attention patterns as modules of attention layers."""

from __future__ import annotations

from dataclasses import fields, replace

from torch import Tensor, nn

from attention_zoo.ops.sparse import MaskPattern, Pattern


class PatternBuffer(nn.Module):
    """A sparse pattern whose table, if it has one, is a buffer: moved and saved with the layer.

    Args:
        pattern: a pattern of `attention_zoo.ops.sparse`: `ConvPattern`, `AxialPattern`, `BlockSparsePattern` or
            `MaskPattern`.
    """

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self._pattern = pattern
        self._tables = [field.name for field in fields(pattern) if isinstance(getattr(pattern, field.name), Tensor)]
        for name in self._tables:
            self.register_buffer(name, getattr(pattern, name))

    def forward(self) -> Pattern:
        """The pattern with its table on the device of the layer."""
        if not self._tables:  # nothing to move: no need to validate the pattern again at every decoding step
            return self._pattern
        return replace(self._pattern, **{name: getattr(self, name) for name in self._tables})

    def extra_repr(self) -> str:
        return type(self._pattern).__name__ if self._tables else repr(self._pattern)


def make_pattern(pattern: Pattern | Tensor, *, causal: bool) -> PatternBuffer:
    """A pattern as a module of a layer.

    Args:
        pattern: a pattern, or an (N, N) bool tensor, True where query i (row) may attend to key j (column), for
            sequences of up to N tokens.
        causal: whether an (N, N) tensor is combined with causal masking.

    Raises:
        TypeError: `pattern` is a tensor that is not boolean.
        ValueError: `pattern` is a tensor that is not square.
    """
    if not isinstance(pattern, Tensor):
        return PatternBuffer(pattern)
    return PatternBuffer(MaskPattern(pattern, causal))
