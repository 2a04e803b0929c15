"""Packing of documents of different lengths into rows of one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo._checks import check_at_least, check_flag, check_positive

KINDS = "bytes, a sequence of ints or a 1-D integer tensor"
Document = bytes | Sequence[int] | Tensor


class PackedBatch(NamedTuple):
    """Rows of documents.

    Attributes:
        tokens: (b, n) int64.
        document_ids: (b, n) int64, the index of each token's document in the input; -1 for padding.
        mask: (b, n) bool, True = a valid token.
    """

    tokens: Tensor
    document_ids: Tensor
    mask: Tensor

    @property
    def fill_ratio(self) -> float:
        """Valid tokens over all tokens."""
        return int(self.mask.sum()) / self.mask.numel()


def pack_documents(documents: Iterable[Document], length: int, pad_id: int = 0, *, split: bool = True) -> PackedBatch:
    """Pack documents into as few rows as best-fit decreasing finds.

    Documents are placed from the longest to the shortest, equal lengths in the given order, each in the row with the
    least free space that suffices, else in a new row. The result depends only on the arguments. It is on the CPU.

    A document longer than `length` is split. Each piece starts with the last token of the previous one, as in
    `windows`, so that a next-token loss still predicts every token but the document's first exactly once. All pieces
    but the last fill a row, and follow each other in the order of the rows.

    Args:
        documents: bytes, sequences of ints or 1-D integer tensors of any integer dtype. Empty documents are dropped.
        length: tokens per row n, at least 2; a language model's loss predicts at most n - 1 of them.
        pad_id: token id of padding.
        split: whether to split documents longer than `length`; otherwise they raise.

    Raises:
        TypeError: a document is of another type or dtype.
        ValueError: `length` is below 2, a token id or `pad_id` is negative, a document is not 1-D or, without `split`,
            too long, or there is no token.

    Example:
        >>> batch = pack_documents(documents, length=2048)
        >>> loss = model.loss(batch.tokens, document_ids=batch.document_ids, mask=batch.mask)
    """
    _check_options(documents, length, pad_id, split)
    pieces = list(_split_documents(documents, length, split))
    if not pieces:
        raise ValueError("documents must hold at least one token, got none")
    return _as_batch(_fit(pieces, length), length, pad_id)


def packed_batches(
    documents: Iterable[Document],
    *,
    length: int,
    batch: int,
    pad_id: int = 0,
    buffer: int = 1024,
    split: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[PackedBatch]:
    """Pack a stream of documents, which may be endless, into batches.

    Documents are read until they fill `buffer` rows and packed by `pack_documents`. The rows that do not make up a full
    batch, those with the most free space, are packed again with the next documents. Memory is that of the buffer and
    of one document.

    Args:
        documents, length, pad_id, split: see `pack_documents`; arguments other than documents are checked in the call.
        batch: rows per batch b. Only the last batch of the stream may have fewer.
        buffer: number of rows that are packed at once, at least `batch`. The pieces of a long document are mostly in
            one buffer: to mix many documents in a batch, a buffer must hold many.
        generator: random number generator, on the CPU, that shuffles the rows of each buffer. None: rows with less free
            space come first.

    Raises:
        TypeError, ValueError: as in `pack_documents`, or `buffer` is below `batch`.
    """
    _check_options(documents, length, pad_id, split)
    check_positive(batch=batch, buffer=buffer)
    if buffer < batch:
        raise ValueError(f"buffer must be at least batch, got {buffer=}, {batch=}")

    def pack() -> Iterator[PackedBatch]:
        held: list[_Piece] = []
        count, packed = 0, False
        for piece in _split_documents(documents, length, split):
            held.append(piece)
            count += piece.tokens.numel()
            if count >= buffer * length:
                rows = _fit(held, length)
                rows.sort(key=_size, reverse=True)
                full = len(rows) // batch * batch
                yield from batches(rows[:full])
                held = [piece for row in rows[full:] for piece in row]
                count, packed = _size(held), True
        if not held and not packed:
            raise ValueError("documents must hold at least one token, got none")
        yield from batches(_fit(held, length))

    def batches(rows: list[list[_Piece]]) -> Iterator[PackedBatch]:
        if generator is not None:
            rows = [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]
        for start in range(0, len(rows), batch):
            yield _as_batch(rows[start : start + batch], length, pad_id)

    return pack()


class _Piece(NamedTuple):
    """Part of a document: the index of the document, and tokens (n,) of any integer dtype."""

    document: int
    tokens: Tensor


def _size(pieces: Sequence[_Piece]) -> int:
    return sum(piece.tokens.numel() for piece in pieces)


def _check_options(documents: Iterable[Document], length: int, pad_id: int, split: bool) -> None:
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
        raise TypeError(f"documents must be an iterable of documents, got {type(documents).__name__}")
    check_at_least(2, length=length)
    check_at_least(0, pad_id=pad_id)
    check_flag(split=split)


def _split_documents(documents: Iterable[Document], length: int, split: bool) -> Iterator[_Piece]:
    for index, document in enumerate(documents):
        tokens = _as_tensor(document, f"documents[{index}]")
        size = tokens.numel()
        if size > length and not split:
            raise ValueError(
                f"documents[{index}] must hold at most length={length} tokens with split=False, got {size}"
            )
        if 0 < size <= length:
            yield _Piece(index, tokens)
        elif size:
            for start in range(0, size - 1, length - 1):
                # a copy, because a view would keep the whole document in memory
                yield _Piece(index, tokens[start : start + length].clone())


def _as_tensor(document: Document, name: str) -> Tensor:
    """A document as an integer tensor (n,) on the CPU, of unchanged dtype if it is a tensor."""
    if isinstance(document, (bytes, bytearray)):
        return torch.frombuffer(bytearray(document), dtype=torch.uint8) if document else torch.empty(0).byte()
    given: Any = document
    try:
        tokens = given.detach().cpu() if isinstance(given, Tensor) else torch.tensor(given)
        if not isinstance(given, Tensor) and tokens.shape == (0,):
            return tokens.long()  # torch.tensor([]) is floating point
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a number beyond int64, an unknown type
        raise TypeError(f"{name} must be {KINDS}, got {type(document).__name__}: {error}") from error
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{name} must be {KINDS}, got dtype {tokens.dtype}")
    if tokens.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {tuple(tokens.shape)}")
    if tokens.dtype == torch.uint64:
        tokens = tokens.long()
    if tokens.numel() and torch.iinfo(tokens.dtype).min < 0 and (low := int(tokens.amin())) < 0:
        raise ValueError(f"{name} must hold token ids of at least 0, got {low}")
    return tokens


def _fit(pieces: Sequence[_Piece], length: int) -> list[list[_Piece]]:
    """Best-fit decreasing: the pieces of each row."""
    rows: list[list[_Piece]] = []
    spaces: list[int] = []  # the distinct free spaces of rows, ascending
    by_space: dict[int, list[int]] = {}  # a heap of rows for each of them: of equal rows the first is filled
    for piece in sorted(pieces, key=lambda piece: -piece.tokens.numel()):
        size = piece.tokens.numel()
        place = bisect_left(spaces, size)
        if place == len(spaces):
            row, space = len(rows), length
            rows.append([])
        else:
            space = spaces[place]
            row = heappop(by_space[space])
            if not by_space[space]:
                del by_space[space], spaces[place]
        rows[row].append(piece)
        if space > size:
            if space - size not in by_space:
                by_space[space - size] = []
                insort(spaces, space - size)
            heappush(by_space[space - size], row)
    return rows


def _as_batch(rows: Sequence[Sequence[_Piece]], length: int, pad_id: int) -> PackedBatch:
    pieces = [piece for row in rows for piece in row]
    mask = torch.arange(length) < torch.tensor([_size(row) for row in rows])[:, None]
    sizes = torch.tensor([piece.tokens.numel() for piece in pieces])
    tokens = torch.cat([piece.tokens.long() for piece in pieces])
    document_ids = torch.tensor([piece.document for piece in pieces]).repeat_interleave(sizes)
    return PackedBatch(
        torch.full(mask.shape, pad_id).masked_scatter(mask, tokens),
        torch.full(mask.shape, -1).masked_scatter(mask, document_ids),
        mask,
    )
