"""Packed documents: several documents in one row, between which no token interacts.

On the CPU an operation runs on the documents as a batch, so that its cost is the sum over the documents. On other
devices, in a compiled function and inside `reference()` it runs on whole rows with a mask of pairs, because the lengths
of the documents are values of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_zoo._checks import INTEGERS, SIGNED
from attention_zoo.ops.implementation import in_reference_mode
from attention_zoo.ops.masks import hide_keys, restrict

SHORT = 16  # tokens; shorter documents share a batch


class Documents:
    """The documents of packed rows. Layers and operations take it in place of the tensor `document_ids`.

    A document is a maximal run of equal ids: an id that occurs again later is another document. Models build one value
    per batch, so that its parts are computed once.

    Args:
        ids: (b, n), any integers.

    Attributes:
        ids: (b, n).
        starts: (b, n) bool, True = the first token of a document.
        first: (b, n) int64, the index of the first token of each token's document.
        positions: (b, n) int64, the position of each token in its document.
        origin: of the documents of folded streams, those of the rows; see `repeat`.

    Raises:
        TypeError: `ids` is not an integer tensor.
        ValueError: `ids` has another number of axes.
    """

    def __init__(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
            got = f"dtype {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"document_ids must be an integer tensor, got {got}")
        if ids.ndim != 2:
            raise ValueError(f"document_ids must be (b, n), got shape {tuple(ids.shape)}")
        ids = ids if ids.dtype in SIGNED else ids.long()  # torch 2.13 cannot compare wide unsigned integers
        self.ids = ids
        self.starts = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        index = torch.arange(ids.shape[1], device=ids.device)
        self.first = torch.where(self.starts, index, 0).cummax(dim=1).values
        self.positions = index - self.first
        self.origin: Documents | None = None
        # computed when first read; not functools.cached_property, which torch.compile cannot trace in Python 3.11
        self._pairs: Tensor | None = None
        self._batches: Batches | None = None

    @property
    def ends(self) -> Tensor:
        """(b, n) bool, True = the last token of a document."""
        return torch.nn.functional.pad(self.starts[:, 1:], (0, 1), value=True)

    @property
    def pairs(self) -> Tensor:
        """(b, n, n) bool, True where query i and key j are of one document."""
        if self._pairs is None:
            self._pairs = self.first[:, :, None] == self.first[:, None, :]
        return self._pairs

    def repeat(self, streams: int) -> Documents:
        """The documents of rows (b s), each row repeated for every stream."""
        repeated = Documents(self.ids.repeat_interleave(streams, dim=0))
        repeated.origin = self
        return repeated

    def mask_pairs(self, mask: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """The mask of pairs of one document, combined with padding (b, n) and an attention mask; see `combine_masks`.

        Returns:
            Four axes that broadcast to (b, h, n, n), of the dtype of `attn_mask`, or boolean.
        """
        pairs = hide_keys(self.pairs, mask)
        return pairs if attn_mask is None else restrict(attn_mask, pairs)

    def restart(self, count: Tensor) -> Tensor:
        """A running count (b, n) over rows as a running count over documents."""
        before = torch.nn.functional.pad(count, (1, 0))[:, :-1]  # the count before each token
        return count - before.gather(1, self.first)

    def apply(
        self,
        function: Callable[..., Tensor],
        *tensors: Tensor,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        causal: bool,
        whole: bool = False,
    ) -> Tensor:
        """Run an operation on each document by itself.

        Args:
            function: takes parts of `tensors` and `mask=`, None or as in `softmax_attention`, returns (b, h, n, f).
            tensors: (b, h, n, e) each.
            mask: (b, n) bool, True = a valid token, or of four axes and then in place of `attn_mask`.
            attn_mask: boolean or additive, see `combine_masks`; the operation then runs on whole rows.
            causal: whether the operation is causal, so that padding at the end of a document needs no mask.
            whole: whether the operation must run on whole rows, such as one with a bias over the row.

        Returns:
            (b, h, n, f).
        """
        if mask is not None and mask.ndim == 4:
            mask, attn_mask = None, mask
        on_cpu = self.ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if whole or not on_cpu or attn_mask is not None or in_reference_mode():
            return function(*tensors, mask=self.mask_pairs(mask, attn_mask))
        batches = self.batches
        if batches.tiles is not None:  # documents of one length fill the rows
            rows = (self.ids.shape[0] * self.ids.shape[1] // batches.tiles, batches.tiles)
            parts = [tensor.transpose(1, 2).reshape(*rows, *_heads(tensor)).transpose(1, 2) for tensor in tensors]
            out = function(*parts, mask=None if mask is None or bool(mask.all()) else mask.reshape(rows))
            return out.transpose(1, 2).reshape(*self.ids.shape, *_heads(out)).transpose(1, 2)
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors]  # (b n, h, e)
        taken = [_Take.apply(tensor, batches) for tensor in flat]  # type: ignore[no-untyped-call]
        masked = None if mask is None else ~mask.flatten()[batches.index] & batches.valid
        outs, start = [], 0
        for shape, padded in zip(batches.shapes, batches.padded, strict=True):
            part = slice(start, start + shape[0] * shape[1])
            own = batches.valid[part].view(shape) if padded and not causal else None
            if masked is not None and bool(masked[part].any()):  # kernels are faster without a mask
                own = (batches.valid & ~masked)[part].view(shape)
            parts = [tensor[part].view(*shape, *tensor.shape[1:]).transpose(1, 2) for tensor in taken]
            outs.append(function(*parts, mask=own).transpose(1, 2).flatten(0, 1))
            start = part.stop
        put: Tensor = _Put.apply(torch.cat(outs), batches)  # type: ignore[no-untyped-call]
        return put.view(*self.ids.shape, *put.shape[1:]).transpose(1, 2)

    @property
    def batches(self) -> Batches:
        """The documents sorted into batches of similar lengths. Reads the lengths, so it is for the CPU."""
        if self._batches is None:
            self._batches = self._make_batches()
        return self._batches

    def _make_batches(self) -> Batches:
        starts = self.starts.flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([self.starts.numel()]))
        shortest, longest = (int(end) for end in lengths.aminmax()) if lengths.numel() else (0, 0)
        if shortest == longest:
            return Batches(lengths, lengths, lengths, lengths, [], [], longest)
        # rounded up to three significant bits, so that padding is at most a quarter of a batch
        unit = 2 ** (lengths.clamp(min=SHORT).log2().floor().long() - 2)
        rounded = (lengths.clamp(min=SHORT) + unit - 1) // unit * unit
        index, valid, shapes, padded = [], [], [], []
        for length in sorted(set(rounded.tolist())):
            members = rounded == length
            size = int(lengths[members].max())
            offset = torch.arange(size)
            part = starts[members][:, None] + offset
            inside = offset < lengths[members][:, None]
            index.append(part.where(inside, 0).flatten())
            valid.append(inside.flatten())
            shapes.append((part.shape[0], size))
            padded.append(not bool(inside.all()))
        places, is_token = torch.cat(index), torch.cat(valid)
        inverse = torch.empty(self.starts.numel(), dtype=torch.long)
        inverse[places[is_token]] = is_token.nonzero()[:, 0]
        return Batches(places, is_token, (~is_token).nonzero()[:, 0], inverse, shapes, padded, None)


@dataclass(frozen=True)
class Batches:
    """Documents as batches.

    Attributes:
        index: (m,) the token in (b n) of each place in the batches, one batch after the other; 0 for padding.
        valid: (m,) bool, True = a token, False = padding.
        missing: the places of padding.
        inverse: (b n,) the place of each token.
        shapes: (documents, length) of each batch.
        padded: whether a batch has padding, at the end of its documents.
        tiles: the length of all documents if they have the same, and the other attributes are not used; or None.
    """

    index: Tensor
    valid: Tensor
    missing: Tensor
    inverse: Tensor
    shapes: list[tuple[int, int]]
    padded: list[bool]
    tiles: int | None


def as_documents(document_ids: Tensor | Documents | None, x: Tensor, *, name: str = "document_ids") -> Documents | None:
    """`document_ids` of a layer or model as `Documents`.

    Args:
        document_ids: (b, n) integers, `Documents`, or None.
        x: (b, n, ...).

    Raises:
        TypeError: `document_ids` is not an integer tensor.
        ValueError: it is not (b, n), or on another device than `x`.
    """
    return None if document_ids is None else to_documents(document_ids, x, name=name)


def to_documents(document_ids: Tensor | Documents, x: Tensor, *, name: str = "document_ids") -> Documents:
    """As `as_documents`, for ids that are given."""
    documents = document_ids if isinstance(document_ids, Documents) else Documents(document_ids)
    if documents.ids.shape != x.shape[:2]:
        raise ValueError(f"{name} must be (b, n) = {tuple(x.shape[:2])}, got shape {tuple(documents.ids.shape)}")
    if documents.ids.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {documents.ids.device}")
    return documents


def documents_of(document_ids: Tensor | Documents, q: Tensor, k: Tensor) -> Documents:
    """`document_ids` of an operation on queries (b, h, n, e) and keys (b, h, n, e).

    Raises:
        TypeError: `document_ids` is not an integer tensor.
        ValueError: there are not as many queries as keys, or `document_ids` is not (b, n).
    """
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"document_ids must be None with {q.shape[-2]} queries of {k.shape[-2]} keys")
    return to_documents(document_ids, q[:, 0])


class _Take(torch.autograd.Function):
    """Rows (b n, ...) of tokens to rows (m, ...) of `Batches`, 0 for padding. Backward is `_Put`: both are gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batches: Batches) -> Tensor:
        ctx.batches = batches
        return x.index_select(0, batches.index).index_fill_(0, batches.missing, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Put.apply(grad, ctx.batches), None  # type: ignore[no-untyped-call]


class _Put(torch.autograd.Function):
    """The inverse of `_Take`, which drops padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batches: Batches) -> Tensor:
        ctx.batches = batches
        return x.index_select(0, batches.inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Take.apply(grad, ctx.batches), None  # type: ignore[no-untyped-call]


def _heads(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[3]
