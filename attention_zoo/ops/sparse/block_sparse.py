"""Block-sparse pattern: blocks of tokens attend to their neighbourhood, the first blocks, and a few random blocks.

The layout is DeepSpeed's "variable" layout, VariableSparsityConfig, related to those of the papers.

Papers: Sparse Transformer, https://arxiv.org/abs/1904.10509; Big Bird, https://arxiv.org/abs/2007.14062
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo._checks import check_int
from attention_zoo.ops.sparse.pattern import Pattern, check_table
from attention_zoo.ops.sparse.tiles import Tile, tiled_operator


def choose_blocks(
    count: int,
    *,
    local_blocks: int = 4,
    global_blocks: int = 0,
    random_blocks: int = 4,
    causal: bool = False,
    seed: int = 0,
) -> Tensor:
    """Choose which blocks attend to which.

    Causal, with groups of 2, one global and one random block a row (g global, l local, r random, . masked):

        l
        l l
        g . l
        g r l l
        g . . r l

    Args:
        count: number of blocks m of the sequence.
        local_blocks: number of neighbouring blocks that form a group, whose members attend to each other.
        global_blocks: number of first blocks, to which all blocks attend.
        random_blocks: number of blocks drawn for every row from all columns; causal masking drops those after the row.
        causal: causal masking of the blocks.
        seed: seed of the random blocks.

    Returns:
        (m, m) bool on the CPU, True where the block of queries (row) attends to the block of keys (column).

    Raises:
        TypeError: a number is not an int.
        ValueError: `local_blocks` is below 1, or `global_blocks` or `random_blocks` below 0.
    """
    check_int(1, local_blocks=local_blocks)
    check_int(0, global_blocks=global_blocks, random_blocks=random_blocks, seed=seed)
    row = torch.arange(count, device="cpu")
    blocks = row[:, None] // local_blocks == row // local_blocks
    blocks[:, :global_blocks] = True
    drawn = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), device="cpu")
    blocks.scatter_(1, drawn.topk(min(random_blocks, count), dim=-1).indices, True)
    return blocks.tril() if causal else blocks


def block_sparse_mask(
    blocks: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Mask of block-sparse attention.

    Args:
        blocks: (m, m) bool, True where the block of queries (row) attends to the block of keys (column).
        block_size: tokens of a block.
        causal: causal masking of the tokens, also within a block.
        start, stop: range of the queries; stop is also the number of keys. None: m * block_size.

    Returns:
        (stop - start, stop) bool on the device of `blocks`, True where the query (row) attends to the key (column).

    Raises:
        ValueError: `stop` exceeds m * block_size.
    """
    length = len(blocks) * block_size
    stop = length if stop is None else stop
    if stop > length:
        raise ValueError(f"stop must be at most {len(blocks)} blocks of {block_size} tokens, got {stop=}")
    return BlockSparsePattern(blocks, block_size, causal, length).mask(start, stop, blocks.device)


@dataclass(frozen=True)
class BlockSparsePattern(Pattern):
    """The pattern of `block_sparse_mask`.

    Args:
        blocks, block_size, causal: see `block_sparse_mask`.
        length: number of tokens of the longest sequence.

    Raises:
        TypeError: `blocks` is not a boolean tensor, or `block_size` not an int.
        ValueError: `blocks` is not square, or `block_size` is below 1.
    """

    has_tiles = True

    blocks: Tensor
    block_size: int
    causal: bool
    length: int

    def __post_init__(self) -> None:
        check_int(1, block_size=self.block_size)
        check_table("blocks", self.blocks)

    @property
    def is_causal(self) -> bool:
        return self.causal

    def longest(self) -> int:
        return self.length

    def check(self, tokens: int, *, name: str) -> None:
        if tokens > self.length:
            raise ValueError(f"{name} must hold at most {self.length} tokens, got {tokens} tokens")

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        allowed = self.blocks[query // self.block_size, key // self.block_size]
        return allowed & (key <= query) if self.causal else allowed

    def keys(self, position: int) -> list[slice | list[int]]:
        size = self.block_size
        runs: list[tuple[int, int]] = []
        for block in self.blocks[position // size].nonzero()[:, 0].tolist():
            first, last = block * size, min((block + 1) * size, position + 1)
            if runs and runs[-1][1] == first:
                first = runs.pop()[0]
            if first < last:
                runs.append((first, last))
        return [slice(*run) for run in runs]

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _tiled_block_sparse(q, k, v, mask, self.blocks, [self.block_size, int(self.causal)])


def block_sparse_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """One tile of the blocks common to all rows; two per row: the consecutive blocks up to its own, and the others."""
    if extra is None:
        raise ValueError("extra must hold the blocks, got None")
    size, causal = numbers
    count = -(-n // size)
    rows = extra[:count, :count].tolist()  # one synchronisation on other devices, which by default are dense
    common = _common_blocks(rows)
    tiles = []
    if 0 < common < count:
        tiles.append(Tile(slice(common * size, n), slice(0, common * size)))
    for row, columns in enumerate(rows):
        queries = slice(row * size, min((row + 1) * size, n))
        skipped = common if row >= common else 0
        merge = skipped > 0
        first = row  # first of the consecutive blocks up to the row's own
        while first > skipped and columns[first - 1]:
            first -= 1
        if columns[row]:
            keys = slice(first * size, queries.stop)
            index = torch.arange(n, device=device)
            allowed = index[keys] <= index[queries, None] if causal else None
            tiles.append(Tile(queries, keys, allowed, merge))
            merge = True
        rest = [c for c in range(skipped, row if causal else count) if columns[c] and not first <= c <= row]
        if rest or not merge:
            tiles.append(Tile(queries, _tokens_of(rest, size, n, device), None, merge))
    return tiles


def _common_blocks(rows: list[list[bool]]) -> int:
    """Number of leading blocks that all rows from that of the block on attend to."""
    for column in range(len(rows)):
        if not all(columns[column] for columns in rows[column:]):
            return column
    return len(rows)


def _tokens_of(blocks: list[int], size: int, n: int, device: torch.device) -> Tensor:
    """The indices of the tokens of some blocks."""
    tokens = [token for block in blocks for token in range(block * size, min((block + 1) * size, n))]
    return torch.tensor(tokens, dtype=torch.int64, device=device)


_tiled_block_sparse = tiled_operator("block_sparse_attention", block_sparse_tiles)
