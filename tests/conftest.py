"""Settings for all tests."""

import pytest
import torch

# The tensors are small: a second thread costs more time than it saves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seed every test, so that it gets the same numbers whether it runs alone or after others."""
    torch.manual_seed(0)
