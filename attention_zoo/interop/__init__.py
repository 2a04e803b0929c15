"""Checkpoints of other packages: weights of the packages that introduced these layers, and of today's decoders."""

from attention_zoo.interop.files import convert, load, read_weights
from attention_zoo.interop.packages import PACKAGES, from_upstream
from attention_zoo.interop.pretrained import from_pretrained_folder

__all__ = ["PACKAGES", "convert", "from_pretrained_folder", "from_upstream", "load", "read_weights"]
