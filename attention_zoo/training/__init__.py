"""Training utilities: byte-level text, packing, masked tokens, memory replay, distributed training, checkpoints,
and options and progress of scripts."""

from attention_zoo.training.checkpoint import (
    Checkpoint,
    ShardedCheckpoint,
    read_checkpoint,
    read_sharded,
    save_checkpoint,
    save_sharded,
)
from attention_zoo.training.distributed import (
    STRATEGIES,
    DataParallelLoss,
    World,
    gather_weights,
    join_world,
    scatter_weights,
)
from attention_zoo.training.masked_tokens import mask_tokens, masked_token_loss
from attention_zoo.training.memory_replay import Replayed, memory_replay
from attention_zoo.training.packing import PackedBatch, pack_documents, packed_batches
from attention_zoo.training.progress import Progress, parse_options
from attention_zoo.training.stop_request import StopRequest
from attention_zoo.training.tensor_parallel import tensor_parallel_plan
from attention_zoo.training.text import (
    FilePart,
    Text,
    TextFiles,
    as_tokens,
    find_text_files,
    gzip_bits_per_byte,
    random_batch,
    read_documents,
    read_text,
    unigram_entropy,
    windows,
)

__all__ = [
    "STRATEGIES",
    "Checkpoint",
    "DataParallelLoss",
    "FilePart",
    "PackedBatch",
    "Progress",
    "Replayed",
    "ShardedCheckpoint",
    "StopRequest",
    "Text",
    "TextFiles",
    "World",
    "as_tokens",
    "find_text_files",
    "gather_weights",
    "gzip_bits_per_byte",
    "join_world",
    "mask_tokens",
    "masked_token_loss",
    "memory_replay",
    "pack_documents",
    "packed_batches",
    "parse_options",
    "random_batch",
    "read_checkpoint",
    "read_documents",
    "read_sharded",
    "read_text",
    "save_checkpoint",
    "save_sharded",
    "scatter_weights",
    "tensor_parallel_plan",
    "unigram_entropy",
    "windows",
]
