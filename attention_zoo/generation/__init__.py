"""Generation with any model that has `step`: the decoding loop, the sampler and its filters, text-to-image."""

from attention_zoo.generation.decoding import Decoder, generate, generate_stream
from attention_zoo.generation.images import generate_image_tokens, generate_images, generate_text
from attention_zoo.generation.sampling import Sampler, min_p, top_k, top_p

__all__ = [
    "Decoder",
    "Sampler",
    "generate",
    "generate_image_tokens",
    "generate_images",
    "generate_stream",
    "generate_text",
    "min_p",
    "top_k",
    "top_p",
]
