"""Checkpoints of a training run: one file for one process, a folder of shards for many."""

from attention_zoo.training.checkpoint.sharded import ShardedCheckpoint, read_sharded, save_sharded
from attention_zoo.training.checkpoint.single_file import Checkpoint, StopRequest, read_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "ShardedCheckpoint",
    "StopRequest",
    "read_checkpoint",
    "read_sharded",
    "save_checkpoint",
    "save_sharded",
]
