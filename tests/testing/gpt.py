"""A decoder-only transformer in plain torch, as users write it: no part of this library, no `step`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_TOKENS = 32


class Attention(nn.Module):
    """Causal multi-head self-attention with `scaled_dot_product_attention`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        allowed = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            itself = torch.eye(n, dtype=torch.bool, device=x.device)  # no query without a key
            allowed = allowed & mask[:, None, None, :] | itself
        out = F.scaled_dot_product_attention(q, k, v, allowed, dropout_p=self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """Pre-norm attention and feedforward."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Learned positions, tied embeddings, and a loss over the valid tokens."""

    def __init__(self, num_tokens: int = NUM_TOKENS, dim: int = 16, depth: int = 1, max_seq_len: int = 70) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.tokens = nn.Embedding(num_tokens, dim)
        self.positions = nn.Embedding(max_seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads=2, dropout=0.1) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = self.tokens(tokens) + self.positions(self.position_of(tokens, mask))
        for block in self.blocks:
            x = block(x, mask)
        return self.logits(self.norm(x))

    def position_of(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return torch.arange(tokens.shape[1], device=tokens.device)
        return (mask.cumsum(1) - 1).clamp(min=0)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.tokens.weight.T

    def loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        targets = tokens[:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
        logits = self(tokens[:, :-1], mask=None if mask is None else mask[:, :-1])
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
        return total / (targets != -100).sum().clamp(min=1)
