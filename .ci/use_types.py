"""A user's script, for a type checker: the types of an installed attention_zoo are found."""

from typing import assert_type

import torch
from torch import Tensor

from attention_zoo import FullAttention, LanguageModel

tokens = torch.zeros(2, 9, dtype=torch.long)
assert_type(LanguageModel(num_tokens=256, dim=64, depth=2).loss(tokens), Tensor)
block = FullAttention(64, heads=2)
assert_type(block.heads, int)
