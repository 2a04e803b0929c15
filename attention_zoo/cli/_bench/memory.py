"""What memory costs: Memformer beside its reference form, replay beside full back-propagation, layers recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention_zoo.cli._bench.measure import Setup, compare, peak_bytes
from attention_zoo.models import LanguageModel, Memformer, MemoryLanguageModel
from attention_zoo.ops.implementation import reference
from attention_zoo.ops.losses import next_token_loss
from attention_zoo.training import memory_replay

NUM_TOKENS = 256
LENGTH = 1024  # tokens of source, and of target
DEPTH = 2
SLOTS = 128
SEGMENT = 128  # tokens of a segment that is replayed
SEGMENTS = (2, 8, 32)
READ = 1024  # tokens that checkpointed layers read
DEPTHS = (4, 16)  # layers whose activations are computed again
MIB = 2**20


@dataclass(frozen=True)
class MemoryCost:
    """One comparison.

    Attributes:
        what: what is compared.
        unit: "ms" or "MiB".
        ours, beside: the fast path or replay, and what it is held against.
        ratio: beside over ours.
    """

    what: str
    unit: str
    ours: float
    beside: float
    ratio: float


def measure_memory(setup: Setup) -> Iterator[MemoryCost]:
    """Compare, one after the other: Memformer's times, then the peak memory of training over segments and of layers."""
    yield from _memformer_times(setup)
    yield from _replay_peaks(setup)
    yield from _layer_peaks(setup)


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
        beside, ours, ratio = compare(partial(_slowly, call), call, setup.device, setup.runs)
        yield MemoryCost(f"Memformer {name}, beside its reference", "ms", ours * 1000, beside * 1000, ratio)


def _slowly(call: Callable[[], object]) -> None:
    with reference():
        call()


def _replay_peaks(setup: Setup) -> Iterator[MemoryCost]:
    model = MemoryLanguageModel(
        num_tokens=NUM_TOKENS, dim=128, depth=DEPTH, heads=4, dim_head=32, memory_slots=16, segment_len=SEGMENT
    ).to(setup.device)
    for count in SEGMENTS:
        segments = list(torch.randint(NUM_TOKENS, (count, 1, SEGMENT), device=setup.device))
        calls = (partial(_replay, model, segments), partial(_full, model, segments))
        ours, beside = (peak_bytes(call, setup.device) / MIB for call in calls)
        yield MemoryCost(f"replay of {count} segments, beside full", "MiB", ours, beside, beside / ours)


def _loss(output: Any, tokens: Tensor) -> Tensor:
    return next_token_loss(output.logits[:, :-1], tokens)


def _replay(model: MemoryLanguageModel, segments: list[Tensor]) -> None:
    model.zero_grad()
    memory_replay(model, segments, segments, loss=_loss)


def _full(model: MemoryLanguageModel, segments: list[Tensor]) -> None:
    """Back-propagation through all segments at once."""
    model.zero_grad()
    memory, total = model.initial_memory(1), torch.zeros((), device=segments[0].device)
    for segment in segments:
        output = model(segment, memory=memory)
        memory, total = output.memory, total + _loss(output, segment)
    total.backward()  # type: ignore[no-untyped-call]


def _layer_peaks(setup: Setup) -> Iterator[MemoryCost]:
    tokens = torch.randint(NUM_TOKENS, (1, READ + 1), device=setup.device)

    def peak(depth: int, *, saving: bool) -> float:
        model = LanguageModel(
            num_tokens=NUM_TOKENS, dim=128, depth=depth, heads=4, dim_head=32, checkpoint_layers=saving
        )
        model = model.to(setup.device)
        return peak_bytes(lambda: model.loss(tokens).backward(), setup.device) / MIB  # type: ignore[no-untyped-call]

    for depth in DEPTHS:
        ours, beside = peak(depth, saving=True), peak(depth, saving=False)
        yield MemoryCost(f"{depth} checkpointed layers, beside kept", "MiB", ours, beside, beside / ours)
