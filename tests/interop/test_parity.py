"""Loaded weights reproduce the outputs and gradients that were recorded with the upstream packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.replay import replay

RECORDS = sorted((Path(__file__).parents[1] / "data" / "upstream").glob("*.pt"))


def error(got: Tensor, want: Tensor) -> float:
    """Relative 2-norm of the difference, in float64."""
    assert got.shape == want.shape, f"shapes {tuple(got.shape)} and {tuple(want.shape)}"
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def check(got: dict[str, Any], record: dict[str, Any]) -> None:
    """Compare outputs, where they are defined, and gradients with a record."""
    assert set(got["outputs"]) == set(record["outputs"])
    for name, want in record["outputs"].items():
        out, counts = got["outputs"][name], record.get("compare", {}).get(name)
        if counts is not None:
            out, want = out[counts], want[counts]
        forbidden = want < -1e30
        assert torch.equal(out < -1e30, forbidden), name
        assert error(out.masked_fill(forbidden, 0), want.masked_fill(forbidden, 0)) < 1e-4, name
    assert set(got["grads"]) == set(record["grads"])
    for name, want in record["grads"].items():
        assert error(got["grads"][name].double(), torch.as_tensor(want).double()) < 1e-4, name


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_loaded_weights_reproduce_the_recorded_outputs_and_gradients(path: Path) -> None:
    record: dict[str, Any] = torch.load(path, weights_only=True)
    check(replay(record), record)
