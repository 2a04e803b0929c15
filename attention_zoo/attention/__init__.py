"""The zoo: one file is one block, and BLOCKS names them all."""

from attention_zoo.attention.base import AttentionBlock, Mix, SelfAttention
from attention_zoo.attention.cosine_sim import CosineSimAttention
from attention_zoo.attention.cross import CrossAttention
from attention_zoo.attention.full import FullAttention
from attention_zoo.attention.talking_heads import TalkingHeadsAttention

BLOCKS: dict[str, type[AttentionBlock]] = {
    "full": FullAttention,
    "cross": CrossAttention,
    "cosine_sim": CosineSimAttention,
    "talking_heads": TalkingHeadsAttention,
}

__all__ = [
    "BLOCKS",
    "AttentionBlock",
    "CosineSimAttention",
    "CrossAttention",
    "FullAttention",
    "Mix",
    "SelfAttention",
    "TalkingHeadsAttention",
]
