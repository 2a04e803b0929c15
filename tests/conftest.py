"""Settings for all tests."""

import pytest
import torch

# The tensors here are small: a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Start every test from one seed, so that it sees the same numbers alone and among others."""
    torch.manual_seed(0)
