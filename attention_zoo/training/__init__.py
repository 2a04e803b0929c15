"""Parts of a training run: text as tokens, and checkpoints to resume from."""

from attention_zoo.training.checkpoint import Checkpoint, StopRequest, read_checkpoint, save_checkpoint
from attention_zoo.training.masked_tokens import mask_tokens, masked_token_loss
from attention_zoo.training.memory_replay import Replayed, memory_replay
from attention_zoo.training.text import (
    Text,
    as_tokens,
    gzip_bits_per_byte,
    random_batch,
    read_text,
    unigram_entropy,
    windows,
)

__all__ = [
    "Checkpoint",
    "Replayed",
    "StopRequest",
    "Text",
    "as_tokens",
    "gzip_bits_per_byte",
    "mask_tokens",
    "masked_token_loss",
    "memory_replay",
    "random_batch",
    "read_checkpoint",
    "read_text",
    "save_checkpoint",
    "unigram_entropy",
    "windows",
]
