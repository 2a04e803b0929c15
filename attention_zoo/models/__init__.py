"""Whole models: thin compositions of the zoo's blocks."""

from attention_zoo.models.builders import cosine_sim_lm, gate_loop_lm
from attention_zoo.models.language_model import LanguageModel, LanguageModelState
from attention_zoo.models.memformer import Memformer, MemformerOutput, TargetDecoder
from attention_zoo.models.memory_lm import MemoryLanguageModel, MemoryOutput, MemoryState
from attention_zoo.models.multi_stream import MultiStreamState, MultiStreamTransformer
from attention_zoo.models.saving import SavedModel
from attention_zoo.models.stack import Layer, Stack, StackState

__all__ = [
    "LanguageModel",
    "LanguageModelState",
    "Layer",
    "Memformer",
    "MemformerOutput",
    "MemoryLanguageModel",
    "MemoryOutput",
    "MemoryState",
    "MultiStreamState",
    "MultiStreamTransformer",
    "SavedModel",
    "Stack",
    "StackState",
    "TargetDecoder",
    "cosine_sim_lm",
    "gate_loop_lm",
]
