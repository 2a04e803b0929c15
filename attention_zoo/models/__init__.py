"""Complete models, composed of the package's blocks."""

from attention_zoo.models.builders import cosine_sim_lm, gate_loop_lm
from attention_zoo.models.encoder import Encoder, image_to_patches
from attention_zoo.models.encoder_decoder import EncoderDecoder
from attention_zoo.models.image_tokenizer import GreyTokenizer, ImageTokenizer
from attention_zoo.models.language_model import LanguageModel, LanguageModelState
from attention_zoo.models.memformer import Memformer, MemformerOutput, TargetDecoder
from attention_zoo.models.memory_lm import MemoryLanguageModel, MemoryOutput, MemoryState
from attention_zoo.models.multi_stream import MultiStreamState, MultiStreamTransformer
from attention_zoo.models.replace import Replacement, replace_block
from attention_zoo.models.stack import Layer, Stack, StackState
from attention_zoo.models.text_to_image import TextToImageTransformer

__all__ = [
    "Encoder",
    "EncoderDecoder",
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
    "Replacement",
    "Stack",
    "StackState",
    "TargetDecoder",
    "TextToImageTransformer",
    "cosine_sim_lm",
    "gate_loop_lm",
    "image_to_patches",
    "replace_block",
]
