"""The zoo: one file is one block, and BLOCKS names them all."""

from attention_zoo.attention.base import AttentionBlock, Mix, SelfAttention
from attention_zoo.attention.cosine_sim import CosineSimAttention
from attention_zoo.attention.cross import CrossAttention
from attention_zoo.attention.full import FullAttention

BLOCKS: dict[str, type[AttentionBlock]] = {
    "full": FullAttention,
    "cross": CrossAttention,
    "cosine_sim": CosineSimAttention,
}

__all__ = ["BLOCKS", "AttentionBlock", "CosineSimAttention", "CrossAttention", "FullAttention", "Mix", "SelfAttention"]
