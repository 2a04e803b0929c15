"""A run that is killed at any moment resumes exactly from its last checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo import LanguageModel
from attention_zoo.training import random_batch, read_checkpoint, read_sharded, save_checkpoint, save_sharded

STEPS = 150
KILLS = 20
# Save and read functions, and the file that marks a complete save.
WAYS: dict[str, tuple[Any, Any, str]] = {
    "file": (save_checkpoint, read_checkpoint, "."),
    "shards": (save_sharded, read_sharded, "run.pt"),
}


def train(path: Path | None, steps: int, way: str = "file") -> list[float]:
    """Train with dropout, from the checkpoint if there is one, and save after every step. Returns all losses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LanguageModel(num_tokens=256, dim=16, depth=1, heads=2, dim_head=8, ff_dropout=0.2, attn_dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(1)
    parts: dict[str, Any] = {
        "model": model, "optimizer": optimizer, "schedule": schedule, "generator": generator,
    }  # fmt: skip
    text = torch.arange(1000).mul(37).remainder(251).to(torch.uint8)
    losses: list[float] = []
    save, read, mark = WAYS[way]
    if path is not None and (path / mark).exists():
        checkpoint = read(path)
        checkpoint.restore(**parts)
        losses = list(checkpoint.extra["losses"])
    while len(losses) < steps:
        loss = model.loss(random_batch(text, 2, 9, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if path is not None:
            save(path, **parts, step=len(losses), extra={"losses": losses})
    return losses


def train_on(path: Path, way: str, started: Any) -> None:
    """Warm up, set `started`, and train until killed."""
    train(None, 1)
    started.set()
    train(path, 10**9, way)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no kill -9")
@pytest.mark.parametrize("way", WAYS)
def test_run_killed_repeatedly_has_the_losses_of_an_uninterrupted_one(tmp_path: Path, way: str) -> None:
    path, (_, read, mark) = tmp_path / "checkpoint", WAYS[way]
    uninterrupted = train(None, STEPS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "attention_zoo", __name__])
    chance = random.Random(0)
    reached = []
    for kill in range(KILLS):
        before = (path / mark).stat().st_mtime_ns if kill else None
        started = context.Event()
        process = context.Process(target=train_on, args=(path, way, started))
        process.start()
        assert started.wait(60)
        # Every fourth process must complete a checkpoint; the others are killed at any moment.
        while kill % 4 == 0 and (not (path / mark).exists() or (path / mark).stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3))  # before, in or between writes
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = read(path)
        reached.append(found.step)
        assert found.extra["losses"][:STEPS] == uninterrupted[: found.step]
        assert found.step == len(found.extra["losses"])
    assert reached == sorted(reached)
    assert reached[-1] > reached[0]
    assert train(path, STEPS, way)[:STEPS] == uninterrupted
    assert len([file for file in tmp_path.iterdir() if file != path]) <= (way == "file")
