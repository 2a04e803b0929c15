"""Attention layers, one per file, and BLOCKS, the registry of their names."""

from attention_zoo.attention.axial import AxialAttention, AxialColumnAttention, AxialRowAttention
from attention_zoo.attention.base import AttentionBlock, SelfAttention, ValuesAndOutput
from attention_zoo.attention.block_sparse import BlockSparseAttention
from attention_zoo.attention.capabilities import Capabilities, capabilities
from attention_zoo.attention.conv import ConvAttention
from attention_zoo.attention.cosine_sim import CosineSimAttention
from attention_zoo.attention.cross import CrossAttention
from attention_zoo.attention.full import FullAttention
from attention_zoo.attention.gate_loop import GateLoopAttention
from attention_zoo.attention.relative_gate import RelativeGateAttention
from attention_zoo.attention.simple_gate_loop import SimpleGateLoop
from attention_zoo.attention.talking_heads import TalkingHeadsAttention

BLOCKS: dict[str, type[AttentionBlock]] = {
    "full": FullAttention,
    "cross": CrossAttention,
    "cosine_sim": CosineSimAttention,
    "conv": ConvAttention,
    "axial_row": AxialRowAttention,
    "axial_col": AxialColumnAttention,
    "block_sparse": BlockSparseAttention,
    "talking_heads": TalkingHeadsAttention,
    "gate_loop": GateLoopAttention,
    "relative_gate": RelativeGateAttention,
    "simple_gate_loop": SimpleGateLoop,
}

__all__ = [
    "BLOCKS",
    "AttentionBlock",
    "AxialAttention",
    "AxialColumnAttention",
    "AxialRowAttention",
    "BlockSparseAttention",
    "Capabilities",
    "ConvAttention",
    "CosineSimAttention",
    "CrossAttention",
    "FullAttention",
    "GateLoopAttention",
    "RelativeGateAttention",
    "SelfAttention",
    "SimpleGateLoop",
    "TalkingHeadsAttention",
    "ValuesAndOutput",
    "capabilities",
]
