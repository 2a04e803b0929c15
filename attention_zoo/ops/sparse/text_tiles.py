"""The tiles of the text in a sequence of text and image: what every pattern over an image has in common."""

from __future__ import annotations

import torch

from attention_zoo.ops.masks import causal_mask
from attention_zoo.ops.sparse.tiles import Tile

QUERIES = 64  # text queries that share a tile


def text_tiles(n: int, text_len: int, device: torch.device) -> list[Tile]:
    """Each text token before what it sees of the text, and all image tokens before the whole text.

    Args:
        n: tokens of the sequence.
        text_len: text tokens of the layout; fewer where n is smaller.
        device: where masks are built.
    """
    text = min(n, text_len)
    tiles = []
    for start in range(0, text, QUERIES):
        stop = min(start + QUERIES, text)
        tiles.append(Tile(slice(start, stop), slice(0, stop), causal_mask(stop - start, stop, device=device)))
    if text and n > text:
        tiles.append(Tile(slice(text, n), slice(0, text)))
    return tiles
