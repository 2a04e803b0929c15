"""Settings for all tests."""

import torch

# The tensors here are small: a second thread costs more than it gives.
torch.set_num_threads(1)
