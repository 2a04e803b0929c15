"""Upstream checkpoints: weights of the packages that introduced these layers, loaded into this library's modules."""

from attention_zoo.interop.files import convert, load, read_weights
from attention_zoo.interop.packages import PACKAGES, from_upstream

__all__ = ["PACKAGES", "convert", "from_upstream", "load", "read_weights"]
