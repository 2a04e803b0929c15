"""Packing: rows hold every document once, as full as best-fit decreasing makes them, in bounded memory."""

from __future__ import annotations

import array
import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_zoo import LanguageModel
from attention_zoo.training import PackedBatch, pack_documents, packed_batches


def random_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, 100, (length,), generator=generator).tolist() for length in lengths]


def pieces(batch: PackedBatch) -> dict[int, list[list[int]]]:
    """The pieces of each document, in the order of the rows."""
    found = defaultdict(list)
    for tokens, ids, mask in zip(*batch, strict=True):
        for document in ids[mask].unique_consecutive().tolist():
            found[document].append(tokens[ids == document].tolist())
    return dict(found)


def unpack(*batches: PackedBatch) -> dict[int, list[int]]:
    """Documents by index, pieces joined without the token that they share."""
    joined: dict[int, list[int]] = {}
    for batch in batches:
        for document, parts in pieces(batch).items():
            for part in parts:
                joined[document] = joined[document] + part[1:] if document in joined else part
    return joined


def best_fit_decreasing(sizes: list[int], length: int) -> list[list[int]]:
    """Slow formula: the sizes in each row."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= length]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@pytest.mark.parametrize("longest", [16, 60])
def test_rows_hold_every_token_of_every_document(longest: int) -> None:
    documents = random_documents(50, longest)
    batch = pack_documents(documents, 16)
    assert unpack(batch) == dict(enumerate(documents))
    assert batch.tokens.dtype == batch.document_ids.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert batch.tokens.shape == batch.document_ids.shape == batch.mask.shape
    assert batch.tokens.shape[1] == 16


def test_example_of_packed_rows() -> None:
    batch = pack_documents([b"\1\2", b"\3\4\5", b"\6", b"\7\7\7\7"], 5, pad_id=9)
    assert batch.tokens.tolist() == [[7, 7, 7, 7, 6], [3, 4, 5, 1, 2]]
    assert batch.document_ids.tolist() == [[3, 3, 3, 3, 2], [1, 1, 1, 0, 0]]
    assert batch.mask.all()
    batch = pack_documents([[1, 2, 3]], 5, pad_id=9)
    assert batch.tokens.tolist() == [[1, 2, 3, 9, 9]]
    assert batch.document_ids.tolist() == [[0, 0, 0, -1, -1]]
    assert batch.mask.tolist() == [[True, True, True, False, False]]


def test_padding_follows_the_documents_of_a_row_with_an_id_of_its_own() -> None:
    batch = pack_documents(random_documents(20, 7), 12, pad_id=101)
    assert torch.equal(batch.mask, batch.document_ids >= 0)
    assert torch.equal(~batch.mask, batch.tokens == 101)
    assert (batch.mask[:, :-1] | ~batch.mask[:, 1:]).all()


def test_ids_are_unique_within_a_row() -> None:
    batch = pack_documents(random_documents(60, 40), 16)
    for ids in batch.document_ids:
        runs = ids.unique_consecutive()
        assert len(runs) == len(runs.unique())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [3, 10, 32])
def test_rows_are_those_of_best_fit_decreasing(longest: int, seed: int) -> None:
    documents = random_documents(80, longest, seed)
    batch = pack_documents(documents, 32)
    got = [[len(documents[i]) for i in ids[ids >= 0].unique_consecutive().tolist()] for ids in batch.document_ids]
    assert got == best_fit_decreasing([len(document) for document in documents], 32)


@pytest.mark.parametrize("seed", range(5))
def test_number_of_rows_is_within_the_bound_of_best_fit_decreasing(seed: int) -> None:
    documents = random_documents(200, 32, seed)
    batch = pack_documents(documents, 32)
    total = sum(map(len, documents))
    # no packing has fewer rows than `least`; best-fit decreasing has at most 11/9 of the optimum, plus 4
    least = max(-(-total // 32), sum(len(document) > 16 for document in documents))
    assert len(batch.tokens) <= 11 / 9 * least + 4
    assert batch.fill_ratio == total / batch.tokens.numel()


def test_many_short_documents_fill_rows_almost_completely() -> None:
    assert pack_documents(random_documents(2000, 32), 64).fill_ratio > 0.99


def test_packing_is_deterministic() -> None:
    documents = random_documents(100, 40)
    first = pack_documents(documents, 16)
    torch.manual_seed(1)
    assert all(torch.equal(got, want) for got, want in zip(pack_documents(iter(documents), 16), first, strict=True))


def test_pieces_of_a_long_document_fill_rows_and_share_one_token() -> None:
    document = list(range(1, 24))
    batch = pack_documents([[50, 51], document], 8)
    parts = pieces(batch)[1]
    assert parts == [document[0:8], document[7:15], document[14:22], document[21:23]]
    targets = [target for part in parts for target in part[1:]]
    assert targets == document[1:]


@pytest.mark.parametrize(("size", "rows"), [(8, 1), (9, 2), (15, 2), (16, 3)])
def test_no_piece_is_without_a_target(size: int, rows: int) -> None:
    batch = pack_documents([list(range(size))], 8)
    assert len(batch.tokens) == rows
    assert min(len(part) for part in pieces(batch)[0]) >= 2


def test_long_documents_are_rejected_without_split() -> None:
    assert len(pack_documents([[1] * 8], 8, split=False).tokens) == 1
    with pytest.raises(ValueError, match=r"documents\[1\] must hold at most length=8 tokens with split=False, got 9"):
        pack_documents([[1], [1] * 9], 8, split=False)


def test_empty_documents_are_dropped_and_keep_their_index() -> None:
    batch = pack_documents([b"", [], [5, 6], torch.empty(0, dtype=torch.int8)], 4)
    assert unpack(batch) == {2: [5, 6]}


@pytest.mark.parametrize(
    "document",
    [
        b"\1\2\3",
        bytearray(b"\1\2\3"),
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        array.array("H", [1, 2, 3]),
        np.array([1, 2, 3], dtype=np.uint16),
        *(
            torch.tensor([1, 2, 3]).to(dtype)
            for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64)
        ),
    ],
    ids=lambda document: f"{type(document).__name__}-{getattr(document, 'dtype', '')}",
)
def test_documents_of_every_type_give_the_same_batch(document: object) -> None:
    assert pack_documents([document], 4).tokens.tolist() == [[1, 2, 3, 0]]


def test_a_packed_batch_does_not_share_memory_with_its_documents() -> None:
    document = torch.ones(8, dtype=torch.int64)
    batch = pack_documents([document], 8)
    batch.tokens.zero_()
    assert document.sum() == 8


BAD = [
    ([[1, 2]], {"length": 1}, ValueError, "length must be at least 2, got length=1"),
    ([[1, 2]], {"length": 2.0}, TypeError, "length must be an int, got length=2.0"),
    ([[1, 2]], {"pad_id": -1}, ValueError, "pad_id must be at least 0, got pad_id=-1"),
    ([[1, 2]], {"split": 1}, TypeError, "split must be a bool, got split=1"),
    (b"text", {}, TypeError, "documents must be an iterable of documents, got bytes"),
    ("text", {}, TypeError, "documents must be an iterable of documents, got str"),
    (7, {}, TypeError, "documents must be an iterable of documents, got int"),
    (["text"], {}, TypeError, r"documents\[0\] must be bytes, a sequence of ints or a 1-D .* got str"),
    ([[1], [1.5]], {}, TypeError, r"documents\[1\] must be .* got dtype torch.float32"),
    ([[True]], {}, TypeError, r"documents\[0\] must be .* got dtype torch.bool"),
    ([[2**70]], {}, TypeError, r"documents\[0\] must be .* got list"),
    ([torch.ones(3)], {}, TypeError, r"documents\[0\] must be .* got dtype torch.float32"),
    ([torch.empty(0)], {}, TypeError, r"documents\[0\] must be .* got dtype torch.float32"),
    ([torch.ones(2, 3).long()], {}, ValueError, r"documents\[0\] must be 1-D, got shape \(2, 3\)"),
    (torch.ones(3).long(), {}, ValueError, r"documents\[0\] must be 1-D, got shape \(\)"),
    ([[1], [2, -3]], {}, ValueError, r"documents\[1\] must hold token ids of at least 0, got -3"),
    ([], {}, ValueError, "documents must hold at least one token, got none"),
    ([b"", []], {}, ValueError, "documents must hold at least one token, got none"),
]


@pytest.mark.parametrize(("documents", "options", "error", "message"), BAD)
def test_invalid_input_is_rejected(
    documents: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pack_documents(documents, **{"length": 8, **options})
    with pytest.raises(error, match=message):
        list(packed_batches(documents, batch=2, **{"length": 8, **options}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 1}, ValueError, "length must be at least 2"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got batch=0"),
        ({"buffer": 3}, ValueError, "buffer must be at least batch, got buffer=3, batch=4"),
        ({"buffer": 2.5}, TypeError, "buffer must be an int"),
    ],
)
def test_options_of_a_stream_are_checked_in_the_call(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        packed_batches([[1, 2]], **{"length": 8, "batch": 4, **options})


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_of_a_stream_hold_every_document_once(shuffled: bool) -> None:
    documents = random_documents(300, 16)
    generator = torch.Generator().manual_seed(0) if shuffled else None
    batches = list(packed_batches(documents, length=16, batch=4, buffer=20, generator=generator))
    assert unpack(*batches) == dict(enumerate(documents))
    assert {len(batch.tokens) for batch in batches[:-1]} == {4}
    assert 1 <= len(batches[-1].tokens) <= 4


def test_a_stream_has_the_rows_of_one_packing_if_it_fits_the_buffer() -> None:
    documents = random_documents(40, 30)
    want = pack_documents(documents, 16)
    got = list(packed_batches(documents, length=16, batch=4, buffer=1000))
    assert torch.equal(torch.cat([batch.tokens for batch in got]), want.tokens)


def test_rows_of_a_stream_are_about_as_full_as_those_of_one_packing() -> None:
    documents = random_documents(1000, 40)
    batches = list(packed_batches(documents, length=64, batch=8, buffer=32))
    fill = sum(int(batch.mask.sum()) for batch in batches) / sum(batch.mask.numel() for batch in batches)
    assert fill > 0.98 * pack_documents(documents, 64).fill_ratio


def test_a_stream_depends_only_on_its_generator() -> None:
    def tokens(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        stream = packed_batches(random_documents(100, 16), length=16, batch=4, buffer=100, generator=generator)
        return torch.cat([batch.tokens for batch in stream])

    assert torch.equal(tokens(0), tokens(0))
    assert not torch.equal(tokens(0), tokens(1))


def test_a_stream_is_read_as_far_as_its_buffer() -> None:
    read = 0

    def endless() -> Iterator[list[int]]:
        nonlocal read
        while True:
            read += 1
            yield [1] * 10

    stream = packed_batches(endless(), length=20, batch=4, buffer=8)
    assert read == 0
    for count, batch in enumerate(itertools.islice(stream, 50), start=1):
        assert batch.fill_ratio == 1
        assert read * 10 <= (4 * count + 8) * 20


def test_pieces_of_a_stream_do_not_keep_long_documents_in_memory() -> None:
    from attention_zoo.training.packing import _split_documents

    document = torch.ones(10_000, dtype=torch.uint8)
    for piece in _split_documents([document], 16, True):
        assert piece.tokens.untyped_storage().nbytes() <= 16


@pytest.mark.parametrize("longest", [24, 70])
def test_loss_of_a_packed_batch_is_the_mean_over_separate_documents(longest: int) -> None:
    torch.manual_seed(0)
    attention = ["gate_loop", "full", "talking_heads"]
    model = LanguageModel(num_tokens=100, dim=16, depth=3, heads=2, dim_head=8, attention=attention).double().eval()
    documents = random_documents(12, longest)
    batch = pack_documents(documents, 24)
    assert batch.fill_ratio < 1
    separate = [torch.tensor([part]) for parts in pieces(batch).values() for part in parts]
    losses = [model.loss(tokens) * (tokens.shape[1] - 1) for tokens in separate if tokens.shape[1] > 1]
    targets = sum(len(document) - 1 for document in documents)
    loss = model.loss(batch.tokens, document_ids=batch.document_ids, mask=batch.mask)
    torch.testing.assert_close(loss, sum(losses) / targets, rtol=1e-10, atol=0)
