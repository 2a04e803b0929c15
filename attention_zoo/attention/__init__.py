"""Attention layers, one per file, and BLOCKS, the registry of their names."""

from torch import nn

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
from attention_zoo.attention.window import WindowAttention

BLOCKS: dict[str, type[nn.Module]] = {
    "full": FullAttention,
    "window": WindowAttention,
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


def register_block(name: str, cls: type[nn.Module]) -> None:
    """Register a block under a name, for `attention=` of all models and for saving and loading models with it.

    Args:
        name: the name; it is written in saved models.
        cls: a subclass of nn.Module whose constructor takes dim first and whose `forward(x)` keeps the shape (b, n, d).
            For padding, decoding and maps it has the methods and arguments of `AttentionBlock`.

    Raises:
        TypeError: `name` is not a non-empty string, or `cls` is no subclass of nn.Module.
        ValueError: another class has the name.

    Example:
        >>> register_block("mine", MyBlock)
        >>> model = LanguageModel(num_tokens=256, dim=512, depth=2, attention=["full", ("mine", {"alpha": 0.1})])
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a non-empty string, got {name!r}")
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls must be a subclass of nn.Module, got {cls!r}")
    if BLOCKS.setdefault(name, cls) is not cls:
        raise ValueError(f"name must not be that of another block, but {name!r} is {BLOCKS[name].__name__}")


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
    "WindowAttention",
    "capabilities",
    "register_block",
]
