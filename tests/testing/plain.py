"""Modules of torch as careful users wrap them: correct, without validation of arguments and without this library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import AttentionBlock
from tests.cases import DIM

Hidden = tuple[Tensor, Tensor]


class MultiHead(nn.Module):
    """`nn.MultiheadAttention` with a causal mask and key padding; a masked query attends to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        if mask is not None:
            itself = torch.eye(n, dtype=torch.bool, device=x.device)
            hidden = (hidden | ~mask[:, None]) & ~itself
            hidden = hidden.repeat_interleave(self.attention.num_heads, dim=0)
        return self.attention(x, x, x, attn_mask=hidden, need_weights=False)[0]


class Recurrent(nn.Module):
    """`nn.LSTMCell` over the tokens; a masked token leaves the state as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(DIM, DIM)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.step(x, mask=mask)[0]

    def step(self, x: Tensor, state: Hidden | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, Hidden]:
        h, c = (x.new_zeros(x.shape[0], DIM) for _ in range(2)) if state is None else state
        outs = []
        for t in range(x.shape[1]):
            new_h, new_c = self.cell(x[:, t], (h, c))
            if mask is not None:
                keep = mask[:, t, None]
                new_h, new_c = torch.where(keep, new_h, h), torch.where(keep, new_c, c)
            h, c = new_h, new_c
            outs.append(h)
        return torch.stack(outs, dim=1), (h, c)


class Convolution(nn.Module):
    """A causal `nn.Conv1d` over three tokens; masked tokens count as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, 3)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        return self.conv(F.pad(x.mT, (2, 0))).mT

    def step(self, x: Tensor, state: Tensor | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        last = x.new_zeros(x.shape[0], 2, DIM) if state is None else state
        whole = torch.cat((last, x), dim=1)
        return self.conv(whole.mT).mT, whole[:, -2:]


class TokenWise(nn.Module):
    """`nn.Linear` on each token; there is nothing to mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.dropout(self.linear(x))


class InFloat32(nn.Module):
    """A causal mean computed in float32 whatever the dtype of x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        valid = torch.ones_like(x[..., :1]) if mask is None else mask[..., None]
        total = torch.where(valid.bool(), x, 0).float().cumsum(1)
        return self.linear((total / valid.float().cumsum(1).clamp(min=1)).to(x.dtype))


class Incomplete(AttentionBlock):
    """A layer of the interface that decodes not and shows no map."""

    def __init__(self) -> None:
        super().__init__(DIM, heads=2, dim_head=8)
        self.inner = InFloat32()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        return self.inner(x, mask=mask)


class PostNorm(nn.Module):
    """Dropout and a LayerNorm after it: the mean under dropout is shorter than the output in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout, self.norm = Convolution(), nn.Dropout(0.5), nn.LayerNorm(DIM)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.dropout(self.conv(x, mask=mask)))


PLAIN = [MultiHead, Recurrent, Convolution, TokenWise, InFloat32, Incomplete, PostNorm]
