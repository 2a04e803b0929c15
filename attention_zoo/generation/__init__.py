"""Sampling from anything with `step`."""

from attention_zoo.generation.filters import min_p, top_k, top_p
from attention_zoo.generation.images import generate_image_tokens, generate_images, generate_text
from attention_zoo.generation.sampling import Decoder, Sampler, evaluating, generate, generate_stream

__all__ = [
    "Decoder",
    "Sampler",
    "evaluating",
    "generate",
    "generate_image_tokens",
    "generate_images",
    "generate_stream",
    "generate_text",
    "min_p",
    "top_k",
    "top_p",
]
