"""Talking heads over one or many streams: the maps of all heads are mixed before the softmax and after it.

Paper: Talking-Heads Attention, https://arxiv.org/abs/2003.02436; Multi-Stream Transformers,
    https://arxiv.org/abs/2107.10342
Upstream: quartic-transformer, Attention.
Differs: scale e^-0.5; any number of streams, never mixed across batch rows; causal decoding; memory linear in n.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_features, check_padding, check_positive
from attention_zoo.attention.base import AttentionBlock, ValuesAndOutput
from attention_zoo.layers.positions import RotaryEmbedding
from attention_zoo.layers.state import KeyValueState, State
from attention_zoo.ops.talking_heads import (
    HeadMix,
    HeadMLP,
    mix_heads,
    talking_heads_attention,
    talking_heads_weights,
)

MIXES = ("linear", "mlp")


class HeadMixer(nn.Module):
    """The weights of one mix of head maps: the identity at the start if linear, no change if an MLP.

    Args:
        heads: head maps C.
        kind: "linear" or "mlp".
    """

    def __init__(self, heads: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.weight = nn.Parameter(torch.eye(heads))
        else:
            self.norm = nn.Parameter(torch.ones(heads))
            self.w1 = nn.Parameter(torch.empty(2 * heads, heads))
            self.w2 = nn.Parameter(torch.zeros(heads, 2 * heads))
            nn.init.normal_(self.w1, std=heads**-0.5)

    def forward(self) -> HeadMix:
        """The mix as `talking_heads_attention` takes it."""
        return self.weight if self.kind == "linear" else HeadMLP(self.norm, self.w1, self.w2)


class TalkingHeadsAttention(AttentionBlock):
    """out = post_softmax(softmax(pre_softmax(q k^T / sqrt(e)))) v, gated per head and token by sigmoid(x Wg + bg), then projected.

    `pre_softmax` and `post_softmax` mix the maps of the C = streams * heads heads of one batch row, at every pair of query and key.
    Time O(n^2 (d + C^2)), memory O(n d). State: keys and values of all tokens of all streams.

    Args:
        dim: features d of input and output.
        heads: heads h of each stream.
        dim_head: features e of each head.
        streams: streams s; their heads talk to each other. The input is (b, n, d), or (b, s, n, d) with s streams.
        pre_softmax, post_softmax: the mixes before and after the softmax: "linear", "mlp" or None.
        scale: multiplies the scores; e^-0.5 where None.
        rotary: turns queries and keys by their position, the same in all streams.
        causal: hide the future from every token.
        dropout: probability with which an attention weight is dropped in training, before the mix after the softmax.

    Raises:
        ValueError: an unknown mix, a size below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        streams: int = 1,
        pre_softmax: str | None = "linear",
        post_softmax: str | None = "linear",
        scale: float | None = None,
        rotary: RotaryEmbedding | None = None,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, causal=causal, dropout=dropout)
        check_positive(streams=streams)
        if rotary is not None:
            rotary.prepare(dim_head)
        for name, kind in (("pre_softmax", pre_softmax), ("post_softmax", post_softmax)):
            if kind is not None:
                check_choice(name, kind, MIXES)
        self.streams = streams
        self.scale = scale
        self.rotary = rotary
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_gate = nn.Linear(dim, heads)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.pre_softmax = None if pre_softmax is None else HeadMixer(streams * heads, pre_softmax)
        self.post_softmax = None if post_softmax is None else HeadMixer(streams * heads, post_softmax)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attend over a whole sequence.

        Args:
            x: (b, n, d), or (b, s, n, d) with `streams=s`.
            mask: (b, n) bool over the tokens, the same for all streams of a row.

        Returns:
            The shape of x.
        """
        self._check(x, mask)
        q, k, v = self._project(x)
        return self._merge(self.talk(q, k, v, mask), x)

    def step(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValueState]:
        self._check_step(x, state, mask, KeyValueState)
        q, k, v = self._project(x, 0 if state is None else state.length)
        if isinstance(state, KeyValueState):
            want = (*k.shape[:2], state.length, self.dim_head)
            if state.keys.shape != want:
                raise ValueError(f"state must hold keys of shape {want}, got {tuple(state.keys.shape)}")
            state = state.append(k, v, mask)
        else:
            state = KeyValueState(k, v, mask)
        return self._merge(self.talk(q, state.keys, state.values, state.mask), x), state

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None, mixed: bool = True) -> Tensor:
        """The weights (b, s h, i, j) that multiply the values; `mixed=False` for the softmax before the last mix."""
        self._check(x, mask)
        q, k, _ = self._project(x)
        weights = talking_heads_weights(q, k, _mix(self.pre_softmax), mask=mask, causal=self.causal, scale=self.scale)
        return mix_heads(weights, _mix(self.post_softmax)) if mixed else weights

    def values_and_output(self, x: Tensor, *, mask: Tensor | None = None) -> ValuesAndOutput:
        self._check(x, mask)
        q, k, v = self._project(x)
        return ValuesAndOutput(v, self.talk(q, k, v, mask))

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor, HeadMix]:
        """Queries and keys (b, s h, n, e), and the mix before the softmax: what the diversity loss compares."""
        q, k, _ = self._project(x)
        return q, k, _mix(self.pre_softmax)

    def talk(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(b, s h, i, e) queries at the end of (b, s h, j, e) keys, mask (b, j) over the keys -> (b, s h, i, e)."""
        return talking_heads_attention(
            q,
            k,
            v,
            _mix(self.pre_softmax),
            _mix(self.post_softmax),
            causal=self.causal,
            mask=mask,
            scale=self.scale,
            dropout=self._drop,
        )

    def _project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        b, n = x.shape[0], x.shape[-2]
        q, k, v = (
            to(x)
            .view(b, self.streams, n, self.heads, self.dim_head)
            .transpose(2, 3)
            .reshape(b, self.streams * self.heads, n, self.dim_head)  # (b, s h, n, e)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        return q, k, v

    def _merge(self, out: Tensor, x: Tensor) -> Tensor:
        gate = self.to_gate(x).sigmoid()  # (..., n, h)
        heads = out.view(x.shape[0], self.streams, self.heads, x.shape[-2], self.dim_head).transpose(2, 3)
        projected: Tensor = self.to_out((heads.reshape(*gate.shape, self.dim_head) * gate[..., None]).flatten(-2))
        return projected

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if self.streams == 1 and (not isinstance(x, Tensor) or x.ndim != 4):
            check_features(x, self.dim)
            check_padding(mask, x)
            return
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating point tensor, got {got}")
        if x.ndim != 4 or x.shape[1] != self.streams or x.shape[-1] != self.dim:
            want = f"(b, streams, n, dim) with streams={self.streams}, dim={self.dim}"
            raise ValueError(f"x must be {want}, got shape {tuple(x.shape)}")
        if x.shape[2] == 0:
            raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
        check_padding(mask, x[:, 0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, streams={self.streams}"


def _mix(mixer: HeadMixer | None) -> HeadMix:
    return None if mixer is None else mixer()
