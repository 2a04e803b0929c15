"""Block-sparse attention: blocks of tokens see their own neighbourhood, the first blocks, and a few random ones.

Papers: Sparse Transformer, https://arxiv.org/abs/1904.10509; Big Bird, https://arxiv.org/abs/2007.14062
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo.ops.sparse.image_layout import check_size
from attention_zoo.ops.sparse.pattern import pattern_attention
from attention_zoo.ops.sparse.tiles import Tile, define_tiled_op


def choose_blocks(
    count: int,
    *,
    local_blocks: int = 4,
    global_blocks: int = 0,
    random_blocks: int = 4,
    causal: bool = False,
    seed: int = 0,
) -> Tensor:
    """Which blocks see which, causal, with groups of 2, one global and one random block a row (g, l, r; . is unseen):

        l
        l l
        g . l
        g r l l
        g . . r l

    Args:
        count: blocks of the sequence.
        local_blocks: neighbouring blocks that form a group, whose members see each other.
        global_blocks: first blocks, which all see.
        random_blocks: columns drawn for every row from all columns; causal, those after the row are lost.
        causal: hide later blocks.
        seed: of the draw.

    Returns:
        (count, count) bool on the CPU.

    Raises:
        TypeError, ValueError: a number below its smallest.
    """
    check_size("local_blocks", local_blocks, 1)
    check_size("global_blocks", global_blocks, 0)
    check_size("random_blocks", random_blocks, 0)
    row = torch.arange(count, device="cpu")
    blocks = row[:, None] // local_blocks == row // local_blocks
    blocks[:, :global_blocks] = True
    drawn = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), device="cpu")
    picked = drawn.topk(min(random_blocks, count), dim=-1).indices
    blocks.scatter_(1, picked, True)
    return blocks.tril() if causal else blocks


def block_sparse_mask(
    blocks: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """The pairs of tokens that a pattern of blocks makes visible.

    Args:
        blocks: (m, m) bool, which block (row) sees which (column).
        block_size: tokens of a block.
        causal: hide the tokens after a query, inside its own block too.
        start, stop: the queries; stop is the number of keys as well. None: m * block_size.

    Returns:
        (stop - start, stop) bool on the device of `blocks`.

    Raises:
        ValueError: stop exceeds the blocks.
    """
    stop = len(blocks) * block_size if stop is None else stop
    if stop > len(blocks) * block_size:
        raise ValueError(f"stop must be at most {len(blocks)} blocks of {block_size} tokens, got {stop=}")
    index = torch.arange(stop, device=blocks.device)
    block = index // block_size
    seen = blocks[block[start:, None], block]
    return seen & (index <= index[start:, None]) if causal else seen


@dataclass(frozen=True)
class BlockSparsePattern:
    """What `block_sparse_mask` makes visible, and the ways to compute it.

    Args:
        blocks, block_size, causal: see `block_sparse_mask`.
        length: tokens of the longest sequence.
    """

    blocks: Tensor
    block_size: int
    causal: bool
    length: int

    def check(self, tokens: int, *, name: str) -> None:
        if tokens > self.length:
            raise ValueError(f"{name} must hold at most {self.length} tokens, got {tokens} tokens")

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        return block_sparse_mask(
            self.blocks, block_size=self.block_size, causal=self.causal, start=start, stop=stop
        ).to(device)

    def keys(self, position: int) -> list[slice | list[int]]:
        size = self.block_size
        seen = self.blocks[position // size].nonzero()[:, 0].tolist()
        runs: list[tuple[int, int]] = []
        for block in seen:
            first, last = block * size, min((block + 1) * size, position + 1)
            if runs and runs[-1][1] == first:
                first = runs.pop()[0]
            if first < last:
                runs.append((first, last))
        return [slice(*run) for run in runs]

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _block_sparse_op(q, k, v, mask, self.blocks, [self.block_size, int(self.causal)])[0]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: Tensor,
    block_size: int,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T) v under `block_sparse_mask`.

    What all rows see is one tile; per block of queries, the run of blocks up to its own is another, and the other
    blocks are gathered side by side. Time in proportion to the
    visible blocks, memory O(n).

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, h, j, e).
        blocks, block_size, causal: see `block_sparse_mask`.
        mask, dropout, impl: see `pattern_attention`.

    Returns:
        (b, h, i, e). A query that sees no key gets exactly 0, and gives zero gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_size("block_size", block_size, 1)
    if blocks.dtype != torch.bool:
        raise TypeError(f"blocks must be a boolean tensor, got dtype {blocks.dtype}")
    if blocks.ndim != 2 or blocks.shape[0] != blocks.shape[1]:
        raise ValueError(f"blocks must be square, (m, m), got shape {tuple(blocks.shape)}")
    pattern = BlockSparsePattern(blocks, block_size, causal, len(blocks) * block_size)
    return pattern_attention(pattern, q, k, v, mask=mask, dropout=dropout, impl=impl)


def block_sparse_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """One tile for what all rows see; per row of blocks a run up to its own, and the rest gathered."""
    if extra is None:
        raise ValueError("blocks must be given, got None")
    size, causal = numbers
    count = -(-n // size)
    rows = extra[:count, :count].tolist()
    common = _common(rows)
    tiles = []
    if 0 < common < count:
        tiles.append(Tile(slice(common * size, n), slice(0, common * size)))
    for row, columns in enumerate(rows):
        queries = slice(row * size, min((row + 1) * size, n))
        skipped = common if row >= common else 0
        more = skipped > 0
        own = row  # the first block of the run that ends with the row's own
        while own > skipped and columns[own - 1]:
            own -= 1
        if columns[row]:
            keys = slice(own * size, queries.stop)
            index = torch.arange(n, device=device)
            seen = index[keys] <= index[queries, None] if causal else None
            tiles.append(Tile(queries, keys, seen, more))
            more = True
        rest = [c for c in range(skipped, row if causal else count) if columns[c] and not own <= c <= row]
        if rest or not more:
            tiles.append(Tile(queries, _places(rest, size, n, device), None, more))
    return tiles


def _common(rows: list[list[bool]]) -> int:
    """How many first blocks are seen by all rows from their own on."""
    for column in range(len(rows)):
        if not all(columns[column] for columns in rows[column:]):
            return column
    return len(rows)


def _places(blocks: list[int], size: int, n: int, device: torch.device) -> Tensor:
    """The tokens of some blocks."""
    within = torch.arange(size, device=device)
    places = (torch.tensor(blocks, dtype=torch.int64, device=device)[:, None] * size + within).flatten()
    return places[places < n]


_block_sparse_op = define_tiled_op("block_sparse_attention", block_sparse_tiles)
