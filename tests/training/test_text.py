"""Byte-level text: files read, training and validation splits, batches, windows, and baselines."""

from __future__ import annotations

import builtins
import itertools
import os
import tracemalloc
from pathlib import Path

import pytest
import torch

from attention_zoo import LanguageModel
from attention_zoo.training import (
    FilePart,
    as_tokens,
    find_text_files,
    gzip_bits_per_byte,
    packed_batches,
    random_batch,
    read_documents,
    read_text,
    unigram_entropy,
    windows,
)


def write_files(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<{name}>")


def files_of(split: bytes) -> list[str]:
    return [line.strip("<>") for line in split.decode().split("\n")]


NAMES = [f"{folder}{index:02d}.txt" for folder in ("", "a/", "a/b/") for index in range(20)]


def test_every_file_of_a_folder_is_in_exactly_one_split(tmp_path: Path) -> None:
    write_files(tmp_path, NAMES)
    text = read_text(tmp_path)
    training, validation = files_of(text.training), files_of(text.validation)
    assert sorted(training + validation) == sorted(NAMES)
    assert (len(training), len(validation)) == (text.training_files, text.validation_files)


def test_about_a_tenth_of_many_files_is_held_out_for_validation(tmp_path: Path) -> None:
    write_files(tmp_path, [f"{index}.txt" for index in range(400)])
    assert 20 <= read_text(tmp_path).validation_files <= 60


def test_adding_files_does_not_change_the_split_of_a_file(tmp_path: Path) -> None:
    write_files(tmp_path, NAMES)
    before = read_text(tmp_path)
    write_files(tmp_path, [f"more/{index}.txt" for index in range(40)])
    after = read_text(tmp_path)
    assert set(files_of(before.training)) <= set(files_of(after.training))
    assert set(files_of(before.validation)) <= set(files_of(after.validation))


def test_file_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, NAMES)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda root: ((f, sorted(s), sorted(n)) for f, s, n in walk(root)))
    forward = read_text(tmp_path)
    monkeypatch.setattr(os, "walk", lambda root: ((f, s, sorted(n, reverse=True)) for f, s, n in walk(root)))
    assert read_text(tmp_path) == forward


@pytest.mark.parametrize("count", [2, 3])
def test_each_split_gets_at_least_one_of_few_files(tmp_path: Path, count: int) -> None:
    write_files(tmp_path, [f"{index}.txt" for index in range(count)])
    text = read_text(tmp_path)
    assert text.training
    assert text.validation
    assert text.training_files + text.validation_files == count


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_single_file_is_split_at_ninety_percent(tmp_path: Path, in_folder: bool) -> None:
    data = bytes(range(32, 127)) * 10
    (tmp_path / "one.txt").write_bytes(data)
    text = read_text(tmp_path if in_folder else tmp_path / "one.txt")
    assert text.training + text.validation == data
    assert len(text.training) == 855


def test_read_text_skips_binary_hidden_and_empty_files(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.txt", "b/c.md", ".hidden", ".git/config"])
    (tmp_path / "nul").write_bytes(b"abc\0")
    (tmp_path / "latin").write_bytes("ä".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    text = read_text(tmp_path)
    assert sorted(files_of(text.training) + files_of(text.validation)) == ["a.txt", "b/c.md"]


def test_default_text_is_the_standard_library_without_its_tests() -> None:
    text = read_text()
    both = text.training + text.validation
    assert b"class OrderedDict(dict):" in both
    assert b"class ArgumentParser(" in both
    assert b"class TestCase(object):" in both  # the package unittest is included
    assert b"class AutoCompleteWindowTest(" not in both
    assert b"\0" not in both
    assert 0.05 < text.validation_files / (text.training_files + text.validation_files) < 0.2
    assert read_text() == text


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "nothing", FileNotFoundError, "nothing does not exist"),
        (lambda path: path, ValueError, "path must hold text"),
        (lambda path: path / "empty", ValueError, "path must hold text"),
    ],
    ids=["missing", "no text", "empty"],
)
def test_read_text_rejects_a_path_without_text(tmp_path: Path, make, error: type[Exception], message: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(error, match=message):
        read_text(make(tmp_path))


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], NAMES[:1]], ids=["many", "two", "one"])
def test_documents_joined_by_newlines_are_the_text(tmp_path: Path, names: list[str]) -> None:
    write_files(tmp_path, names)
    files, text = find_text_files(tmp_path), read_text(tmp_path)
    assert b"\n".join(read_documents(files.training)) == text.training
    assert b"\n".join(read_documents(files.validation)) == text.validation
    assert files.source == text.source
    assert files.training_bytes == sum(map(len, read_documents(files.training)))
    assert files.validation_bytes == sum(map(len, read_documents(files.validation)))


def test_order_of_documents_depends_only_on_the_generator(tmp_path: Path) -> None:
    write_files(tmp_path, NAMES)
    parts = find_text_files(tmp_path).training
    want = sorted(read_documents(parts))

    def drawn(seed: int) -> list[bytes]:
        return list(read_documents(parts, epochs=2, generator=torch.Generator().manual_seed(seed)))

    assert drawn(0) == drawn(0) != drawn(1)
    first, second = drawn(0)[: len(parts)], drawn(0)[len(parts) :]
    assert first != second
    assert sorted(first) == sorted(second) == want


def test_documents_without_end_repeat_the_files(tmp_path: Path) -> None:
    write_files(tmp_path, NAMES[:3])
    parts = find_text_files(tmp_path).training
    once = list(read_documents(parts))
    assert list(itertools.islice(read_documents(parts, epochs=None), 3 * len(once))) == once * 3


@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 19, 20, 100])
def test_large_files_are_read_in_pieces_that_share_one_byte(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(b"before" + data + b"after")
    pieces = list(read_documents([FilePart(tmp_path / "file", 6, 6 + size)], max_bytes=10))
    assert b"".join([pieces[0], *(piece[1:] for piece in pieces[1:])]) == data
    assert all(last[-1:] == piece[:1] for last, piece in itertools.pairwise(pieces))
    assert {len(piece) for piece in pieces[:-1]} <= {10}
    assert len(pieces[-1]) <= 10


def test_memory_of_packing_files_does_not_grow_with_their_sizes(tmp_path: Path) -> None:
    def peak(copies: int) -> int:
        folder = tmp_path / str(copies)
        folder.mkdir()
        for index in range(copies):
            (folder / f"{index}.txt").write_bytes(b"text\n" * 2_000)
        tracemalloc.start()
        stream = read_documents(find_text_files(folder).training, max_bytes=2**12)
        # documents as lists, because tracemalloc does not see the memory of tensors
        for batch in packed_batches((list(document) for document in stream), length=64, batch=8, buffer=16):
            assert batch.tokens.shape[1] == 64
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)
    assert peak(20) < 1.5 * peak(4)


def test_progress_bar_counts_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    write_files(tmp_path, NAMES)
    assert find_text_files(tmp_path, progress=True) == find_text_files(tmp_path)
    assert "60/60" in capfd.readouterr().err


def test_progress_bar_without_tqdm_names_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, NAMES)
    original = builtins.__import__

    def without_tqdm(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install attention-zoo\[examples\]"):
        find_text_files(tmp_path, progress=True)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (1, {"epochs": 0}, "epochs must be at least 1, got epochs=0"),
        (1, {"max_bytes": 1}, "max_bytes must be at least 2, got max_bytes=1"),
        (0, {}, "parts must hold at least one byte, got 0 empty parts"),
    ],
)
def test_read_documents_checks_its_arguments_in_the_call(
    tmp_path: Path, parts: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_documents([FilePart(tmp_path / "none", 0, 5)] * parts, **options)


def test_batch_rows_are_substrings_of_the_text() -> None:
    data = os.urandom(300)
    batch = random_batch(as_tokens(data), 16, 20)
    assert batch.dtype == torch.int64
    assert batch.shape == (16, 20)
    assert all(bytes(row.tolist()) in data for row in batch)


def test_random_batch_depends_only_on_the_generator() -> None:
    text = as_tokens(os.urandom(300))
    first = random_batch(text, 8, 20, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    assert torch.equal(first, random_batch(text, 8, 20, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, random_batch(text, 8, 20, generator=torch.Generator().manual_seed(2)))


def test_random_batches_include_the_first_and_last_byte() -> None:
    batch = random_batch(as_tokens(b"abcd"), 100, 3)
    assert {bytes(row.tolist()) for row in batch} == {b"abc", b"bcd"}


def test_windows_predict_every_byte_but_the_first_exactly_once() -> None:
    data = os.urandom(7 * 12 + 1)
    pieces = windows(as_tokens(data), 8)
    assert pieces.dtype == torch.int64
    assert pieces.shape == (12, 8)
    assert bytes(pieces[:, 1:].flatten().tolist()) == data[1:]


def test_windows_drop_a_shorter_remainder() -> None:
    assert windows(as_tokens(b"abcdefg"), 3).tolist() == [list(b"abc"), list(b"cde"), list(b"efg")]
    assert windows(as_tokens(b"abcdefgh"), 3).tolist() == [list(b"abc"), list(b"cde"), list(b"efg")]


def test_at_most_selects_windows_evenly_spaced_over_the_text() -> None:
    text = as_tokens(bytes(range(101)))
    assert windows(text, 11, at_most=4)[:, 0].tolist() == [0, 20, 50, 70]
    assert torch.equal(windows(text, 11, at_most=99), windows(text, 11))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda text: random_batch(text, 2, 11), ValueError, "at least length=11 bytes, got 10"),
        (lambda text: windows(text, 11), ValueError, "at least length=11 bytes, got 10"),
        (lambda text: windows(text, 1), ValueError, "length must be at least 2"),
        (lambda text: windows(text, 4, at_most=0), ValueError, "at_most must be at least 1"),
        (lambda text: random_batch(text, 0, 4), ValueError, "batch must be at least 1"),
        (lambda text: random_batch(text, None, 4), TypeError, "batch must be an int, got batch=None"),
        (lambda text: random_batch(text, 2, "4"), TypeError, "length must be an int, got length='4'"),
        (lambda text: windows(text, 4.0), TypeError, "length must be an int, got length=4.0"),
        (lambda text: random_batch([1, 2], 2, 4), TypeError, "text must be a uint8 tensor, .*got list"),
        (lambda text: as_tokens("text"), TypeError, "data must be bytes, got str"),
        (lambda text: unigram_entropy("text"), TypeError, "data must be bytes, got str"),
        (lambda text: random_batch(text.long(), 2, 4), TypeError, "text must be a uint8 tensor"),
        (lambda text: windows(text[None], 4), ValueError, r"text must be \(n,\)"),
        (lambda text: windows(as_tokens(b""), 4), ValueError, "got 0 bytes"),
    ],
)
def test_batches_and_windows_reject_invalid_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(as_tokens(b"0123456789"))


@pytest.mark.parametrize(
    ("data", "bits"), [(b"aaaa", 0.0), (b"abab", 1.0), (bytes(range(256)), 8.0), (b"aaab", 0.8112781244591328)]
)
def test_unigram_entropy_is_the_entropy_of_byte_frequencies(data: bytes, bits: float) -> None:
    assert unigram_entropy(data) == pytest.approx(bits, abs=1e-12)


def test_gzip_compresses_repetition_and_not_noise() -> None:
    assert gzip_bits_per_byte(b"abc" * 10000) < 0.1
    assert 8.0 <= gzip_bits_per_byte(os.urandom(10000)) < 8.1


@pytest.mark.parametrize("baseline", [unigram_entropy, gzip_bits_per_byte])
def test_baselines_reject_empty_data(baseline) -> None:
    with pytest.raises(ValueError, match="data must hold at least one byte"):
        baseline(b"")


def test_model_takes_the_bytes_of_as_tokens() -> None:
    model = LanguageModel(num_tokens=256, dim=16, depth=1, heads=2, dim_head=8)
    tokens = as_tokens(b"a line of text")[None]
    assert tokens.dtype == torch.uint8
    assert torch.equal(model.loss(tokens), model.loss(tokens.long()))
    assert model.generate(tokens, 3).shape == (1, 3)
