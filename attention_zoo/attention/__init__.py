"""The zoo: one file is one block, and BLOCKS names them all."""

from attention_zoo.attention.axial import AxialAttention, AxialColumnAttention, AxialRowAttention
from attention_zoo.attention.base import AttentionBlock, Mix, PatternAttention, SelfAttention
from attention_zoo.attention.block_sparse import BlockSparseAttention
from attention_zoo.attention.conv import ConvAttention
from attention_zoo.attention.cosine_sim import CosineSimAttention
from attention_zoo.attention.cross import CrossAttention
from attention_zoo.attention.full import FullAttention

BLOCKS: dict[str, type[AttentionBlock]] = {
    "full": FullAttention,
    "cross": CrossAttention,
    "cosine_sim": CosineSimAttention,
    "conv": ConvAttention,
    "axial_row": AxialRowAttention,
    "axial_col": AxialColumnAttention,
    "block_sparse": BlockSparseAttention,
}

__all__ = [
    "BLOCKS",
    "AttentionBlock",
    "AxialAttention",
    "AxialColumnAttention",
    "AxialRowAttention",
    "BlockSparseAttention",
    "ConvAttention",
    "CosineSimAttention",
    "CrossAttention",
    "FullAttention",
    "Mix",
    "PatternAttention",
    "SelfAttention",
]
