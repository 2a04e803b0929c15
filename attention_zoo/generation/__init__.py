"""Sampling from anything with `step`."""

from attention_zoo.generation.filters import min_p, top_k, top_p
from attention_zoo.generation.sampling import Decoder, Sampler, evaluating, generate, stream

__all__ = ["Decoder", "Sampler", "evaluating", "generate", "min_p", "stream", "top_k", "top_p"]
