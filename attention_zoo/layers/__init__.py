"""Modules shared by several attention layers and models."""

from attention_zoo.layers.feedforward import FEEDFORWARDS, GEGLU, FeedForward, SwiGLU
from attention_zoo.layers.layer_scale import LayerScale
from attention_zoo.layers.memory_update import InitialMemory, MemoryUpdate
from attention_zoo.layers.norms import NORMS, LayerNorm, RMSNorm
from attention_zoo.layers.output_gate import OutputGate
from attention_zoo.layers.positions import LearnedPositions, RelativeBias, Rotary, RotaryEmbedding, TextImageRotary
from attention_zoo.layers.projections import Projections, merge_heads, split_heads
from attention_zoo.layers.residual import RESIDUALS, DeepNorm, PostNorm, PreNorm, Residual, SandwichNorm
from attention_zoo.layers.reversible import reversible
from attention_zoo.layers.state import KeyValueState, State, WindowState, count_tokens, register_state
from attention_zoo.layers.token_shift import TokenShift, TokenShiftState

__all__ = [
    "FEEDFORWARDS",
    "GEGLU",
    "NORMS",
    "RESIDUALS",
    "DeepNorm",
    "FeedForward",
    "InitialMemory",
    "KeyValueState",
    "LayerNorm",
    "LayerScale",
    "LearnedPositions",
    "MemoryUpdate",
    "OutputGate",
    "PostNorm",
    "PreNorm",
    "Projections",
    "RMSNorm",
    "RelativeBias",
    "Residual",
    "Rotary",
    "RotaryEmbedding",
    "SandwichNorm",
    "State",
    "SwiGLU",
    "TextImageRotary",
    "TokenShift",
    "TokenShiftState",
    "WindowState",
    "count_tokens",
    "merge_heads",
    "register_state",
    "reversible",
    "split_heads",
]
