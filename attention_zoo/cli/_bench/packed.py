"""Speed of packed rows, next to padded rows and separate documents."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attention_zoo.attention import BLOCKS
from attention_zoo.cli._bench.blocks import PHASES, build_block, timed_call
from attention_zoo.cli._bench.measure import alternate
from attention_zoo.cli._bench.results import COLUMNS
from attention_zoo.cli._bench.setup import Setup
from attention_zoo.cli._table import format_number, print_rows
from attention_zoo.cli._targets import reads_context
from attention_zoo.training import find_text_files, pack_documents

BYTES_PER_TOKEN = 4  # about that of subword tokenizers
WAYS = ("packed", "padded", "separate")
PACKED_COLUMNS = {name: COLUMNS[name] for name in ("length", "phase")} | {
    title: f">{len(title)}"
    for title in (*(f"{way} tokens/s" for way in WAYS), "packed over padded", "packed over separate")
}


@dataclass(frozen=True)
class PackedCost:
    """Cost of one phase of a layer for the same documents in three batches, in median milliseconds.

    Attributes:
        block: name of the layer.
        length: tokens per packed row.
        phase: "forward" (without gradients) or "training" (forward and backward to inputs and weights).
        tokens: number of valid tokens.
        packed_ms: documents packed into rows of `length` tokens.
        padded_ms: one row per document, padded to the longest.
        separate_ms: one call per document.
        packed_tokens_per_second, padded_tokens_per_second, separate_tokens_per_second: valid tokens only.
    """

    block: str
    length: int
    phase: str
    tokens: int
    packed_ms: float
    padded_ms: float
    separate_ms: float
    packed_tokens_per_second: float
    padded_tokens_per_second: float
    separate_tokens_per_second: float


class Documents(NamedTuple):
    """Random features of documents, in three batches.

    Attributes:
        packed: (b, n, d).
        mask, ids: (b, n), of the packed rows.
        padded: (documents, longest, d).
        padded_mask: (documents, longest) bool.
        separate: (1, length, d) of each document.
    """

    packed: Tensor
    mask: Tensor
    ids: Tensor
    padded: Tensor
    padded_mask: Tensor
    separate: list[Tensor]


def document_lengths(rows: Sequence[int], count: int) -> dict[int, list[int]]:
    """For each row length, the lengths in tokens of `count` documents, cut to at most a row.

    The lengths are evenly spaced quantiles of those of the standard library's files.
    """
    files = find_text_files()
    sizes = sorted(part.stop for part in (*files.training, *files.validation))
    chosen = [sizes[int((index + 0.5) * len(sizes) / count)] // BYTES_PER_TOKEN + 1 for index in range(count)]
    return {length: [min(length, size) for size in chosen] for length in rows}


def make_documents(lengths: Sequence[int], length: int, setup: Setup) -> Documents:
    """Random features of documents with `lengths` tokens, packed into rows of `length`."""
    batch = pack_documents([torch.zeros(size, dtype=torch.uint8) for size in lengths], length)
    mask, ids = batch.mask.to(setup.device), batch.document_ids.to(setup.device)
    features = [setup.randn(size, setup.dim) for size in lengths]
    packed = setup.randn(*mask.shape, setup.dim)
    for index, document in enumerate(features):
        packed[ids == index] = document
    sizes = torch.tensor(lengths, device=setup.device)
    padded = pad_sequence(features, batch_first=True)
    padded_mask = torch.arange(padded.shape[1], device=setup.device) < sizes[:, None]
    return Documents(packed, mask, ids, padded, padded_mask, [document[None] for document in features])


def measure_packed(names: Sequence[str], lengths: Mapping[int, Sequence[int]], setup: Setup) -> Iterator[PackedCost]:
    """Measure each layer at each row length in both phases.

    Args:
        names: layers that take `document_ids`.
        lengths: result of `document_lengths`.
        setup: sizes, device and number of timed calls.
    """
    for length, sizes in lengths.items():
        documents = make_documents(sizes, length, setup)
        for name in names:
            block = build_block(name, length, setup)
            for phase in PHASES:
                block.train(phase == "training")
                times = _measure(block, documents, phase, setup)
                speeds = [sum(sizes) / time for time in times]
                yield PackedCost(name, length, phase, sum(sizes), *(time * 1000 for time in times), *speeds)


def _measure(block: nn.Module, documents: Documents, phase: str, setup: Setup) -> list[float]:
    """Median seconds of packed rows, padded rows and separate documents."""

    def packed(x: Tensor) -> Tensor:
        return block(x, mask=documents.mask, document_ids=documents.ids)

    def padded(x: Tensor) -> Tensor:
        return block(x, mask=documents.padded_mask)

    def separate(*inputs: Tensor) -> Tensor:
        return torch.cat([block(x) for x in inputs], dim=1)

    calls = (
        timed_call(phase, packed, [documents.packed], block),
        timed_call(phase, padded, [documents.padded], block),
        timed_call(phase, separate, documents.separate, block),
    )
    return [median(times) for times in zip(*alternate(calls, setup.device, setup.runs), strict=True)]


def print_packed(costs: Iterable[PackedCost], names: Sequence[str]) -> list[PackedCost]:
    """Print one row per cost of the layers `names`, as soon as it is measured. Returns the costs."""
    columns = {"block": f"<{max(map(len, names))}", **PACKED_COLUMNS}

    def cells(cost: PackedCost) -> Sequence[str | float]:
        speeds = [int(getattr(cost, f"{way}_tokens_per_second")) for way in WAYS]
        ratios = (f"{format_number(time / cost.packed_ms)}x" for time in (cost.padded_ms, cost.separate_ms))
        return (cost.block, cost.length, cost.phase, *speeds, *ratios)

    return print_rows(columns, costs, cells)


def describe_documents(length: int, sizes: Sequence[int]) -> str:
    """Number and lengths of documents, and fill ratios of their rows, in one line."""
    batch = pack_documents([b"\0" * size for size in sizes], length)
    return (
        f"{len(sizes)} documents of {min(sizes)} to {max(sizes)} tokens, {sum(sizes)} in total: "
        f"{len(batch.tokens)} packed rows of {length}, {batch.fill_ratio:.0%} full; "
        f"padded rows {sum(sizes) / len(sizes) / max(sizes):.0%} full"
    )


def packable_blocks(names: Sequence[str]) -> list[str]:
    """The named layers; without names, all layers of one sequence that take `document_ids`.

    Raises:
        ValueError: a named layer does not.
    """
    found = [name for name in names or BLOCKS if _takes_documents(name)]
    for name in names:
        if name not in found:
            raise ValueError(f"blocks must take document_ids and no context with --packed, got {name}")
    return found


def _takes_documents(name: str) -> bool:
    setup = Setup(dim=16, heads=2, dim_head=8, runs=1, device=torch.device("cpu"), dtype=torch.float32)
    block = build_block(name, 4, setup)
    takes = "document_ids" in inspect.signature(block.forward).parameters
    return takes and getattr(block, "no_documents", None) is None and not reads_context(block)
