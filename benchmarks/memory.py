"""Memory across segments: Memformer and its reference, memory replay and full back-propagation, recomputed layers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention_zoo.cli._bench.measure import compare, peak_bytes
from attention_zoo.cli._bench.setup import Setup
from attention_zoo.cli._table import print_rows
from attention_zoo.models import LanguageModel, Memformer, MemoryLanguageModel
from attention_zoo.ops import next_token_loss, reference
from attention_zoo.training import memory_replay

NUM_TOKENS = 256
LENGTH = 1024  # tokens of the source and of the target
DEPTH = 2
SLOTS = 128
SEGMENT = 128  # tokens per replayed segment
SEGMENTS = (2, 8, 32)
SMALL = {"num_tokens": NUM_TOKENS, "dim": 128, "heads": 4, "dim_head": 32}
READ = 1024  # tokens that recomputed layers read
DEPTHS = (4, 16)  # numbers of recomputed layers
MIB = 2**20
COLUMNS = {"what": "<40", "unit": "<4", "ours": ">8", "beside": ">8", "beside/ours": ">11"}


@dataclass(frozen=True)
class MemoryCost:
    """One comparison.

    Attributes:
        what: what is compared.
        unit: "ms" or "MiB".
        ours: the fast implementation, memory replay, or recomputed layers.
        beside: the baseline.
        ratio: baseline over ours.
    """

    what: str
    unit: str
    ours: float
    beside: float
    ratio: float


def run(setup: Setup, args: argparse.Namespace) -> list[MemoryCost]:
    """Compare times of Memformer, then peak memory of training over segments and of recomputed layers."""

    def costs() -> Iterator[MemoryCost]:
        yield from _memformer_times(setup)
        yield from _replay_peaks(setup)
        yield from _layer_peaks(setup)

    return print_rows(COLUMNS, costs(), astuple)


def _memformer_times(setup: Setup) -> Iterator[MemoryCost]:
    sides = {"num_tokens": NUM_TOKENS, "depth": DEPTH, "heads": setup.heads}
    encoder, decoder = ({f"{side}_{name}": size for name, size in sides.items()} for side in ("enc", "dec"))
    model = Memformer(dim=setup.dim, memory_slots=SLOTS, **encoder, **decoder).to(setup.device, setup.dtype)
    source, target = torch.randint(NUM_TOKENS, (2, 1, LENGTH), device=setup.device)

    def forward() -> None:
        with torch.no_grad():
            model(source, target)

    def training() -> None:
        model.zero_grad()
        model.loss(source, target).backward()  # type: ignore[no-untyped-call]

    for name, call in (("forward", forward), ("training", training)):
        beside, ours, ratio = compare(partial(_in_reference, call), call, setup.device, setup.runs)
        yield MemoryCost(f"Memformer {name}, beside its reference", "ms", ours * 1000, beside * 1000, ratio)


def _in_reference(call: Callable[[], object]) -> None:
    with reference():
        call()


def _replay_peaks(setup: Setup) -> Iterator[MemoryCost]:
    model = MemoryLanguageModel(depth=DEPTH, memory_slots=16, segment_len=SEGMENT, **SMALL).to(setup.device)
    for count in SEGMENTS:
        segments = list(torch.randint(NUM_TOKENS, (count, 1, SEGMENT), device=setup.device))
        calls = (partial(_replay, model, segments), partial(_back_propagation, model, segments))
        ours, beside = (peak_bytes(call, setup.device) / MIB for call in calls)
        yield MemoryCost(f"replay of {count} segments, beside full", "MiB", ours, beside, beside / ours)


def _loss(output: Any, tokens: Tensor) -> Tensor:
    return next_token_loss(output.logits[:, :-1], tokens)


def _replay(model: MemoryLanguageModel, segments: list[Tensor]) -> None:
    model.zero_grad()
    memory_replay(model, segments, segments, loss=_loss)


def _back_propagation(model: MemoryLanguageModel, segments: list[Tensor]) -> None:
    """Back-propagation through all segments at once."""
    model.zero_grad()
    memory, total = model.initial_memory(1), torch.zeros((), device=segments[0].device)
    for segment in segments:
        output = model(segment, memory=memory)
        memory, total = output.memory, total + _loss(output, segment)
    total.backward()


def _layer_peaks(setup: Setup) -> Iterator[MemoryCost]:
    tokens = torch.randint(NUM_TOKENS, (1, READ + 1), device=setup.device)

    def peak(depth: int, *, recompute: bool) -> float:
        model = LanguageModel(depth=depth, checkpoint_layers=recompute, **SMALL).to(setup.device)
        return peak_bytes(lambda: model.loss(tokens).backward(), setup.device) / MIB

    for depth in DEPTHS:
        ours, beside = peak(depth, recompute=True), peak(depth, recompute=False)
        yield MemoryCost(f"{depth} checkpointed layers, beside kept", "MiB", ours, beside, beside / ours)
