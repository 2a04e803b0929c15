"""Whole models: thin compositions of the zoo's blocks."""

from attention_zoo.models.builders import cosine_sim_lm, gate_loop_lm
from attention_zoo.models.capabilities import Capabilities, capabilities
from attention_zoo.models.image_tokenizer import GreyTokenizer, ImageTokenizer
from attention_zoo.models.language_model import LanguageModel, LanguageModelState
from attention_zoo.models.memformer import Memformer, MemformerOutput, TargetDecoder
from attention_zoo.models.memory_lm import MemoryLanguageModel, MemoryOutput, MemoryState
from attention_zoo.models.multi_stream import MultiStreamState, MultiStreamTransformer
from attention_zoo.models.saving import SavedModel
from attention_zoo.models.stack import Layer, Stack, StackState
from attention_zoo.models.tensor_parallel import tensor_parallel_plan
from attention_zoo.models.text_to_image import TextToImageTransformer

__all__ = [
    "Capabilities",
    "GreyTokenizer",
    "ImageTokenizer",
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
    "TextToImageTransformer",
    "capabilities",
    "cosine_sim_lm",
    "gate_loop_lm",
    "tensor_parallel_plan",
]
