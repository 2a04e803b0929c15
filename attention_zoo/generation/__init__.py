"""Sampling from anything with `step`."""

from attention_zoo.generation.filters import min_p, top_k, top_p
from attention_zoo.generation.images import draw_image_tokens, draw_images, write_and_draw, write_text
from attention_zoo.generation.sampling import Decoder, Sampler, evaluating, generate, stream

__all__ = [
    "Decoder",
    "Sampler",
    "draw_image_tokens",
    "draw_images",
    "evaluating",
    "generate",
    "min_p",
    "stream",
    "top_k",
    "top_p",
    "write_and_draw",
    "write_text",
]
