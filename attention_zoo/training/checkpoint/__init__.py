"""Checkpoints of training runs: a single file for one process, a directory of shards for several."""

from attention_zoo.training.checkpoint.sharded import ShardedCheckpoint, read_sharded, save_sharded
from attention_zoo.training.checkpoint.single_file import Checkpoint, read_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "ShardedCheckpoint",
    "read_checkpoint",
    "read_sharded",
    "save_checkpoint",
    "save_sharded",
]
