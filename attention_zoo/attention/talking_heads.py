"""Talking-heads attention: the attention maps of all heads are mixed before and after the softmax.

Papers: Talking-Heads Attention, https://arxiv.org/abs/2003.02436; Multi-Stream Transformers,
    https://arxiv.org/abs/2107.10342
Upstream: quartic-transformer, Attention.
Differs: the scale is dim_head^-0.5 and not dim_head^0.5; any number of streams, never mixed across batch rows; causal
decoding; memory linear in the sequence length. From the first paper: an output gate by default, as upstream; one
`dim_head` for queries, keys and values; mixes start at the identity where the number of heads stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_int, check_positive
from attention_zoo.attention.base import SelfAttention, ValuesAndOutput
from attention_zoo.layers.output_gate import make_output_gate
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.layers.projections import Projections, map_queries_and_keys, split_heads
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.talking_heads import (
    HeadMix,
    HeadMLP,
    mix_heads,
    talking_heads_attention,
    talking_heads_weights,
)

MIXES = ("linear", "mlp")


class HeadMixer(nn.Module):
    """Parameters of head mixing, a map across the heads of attention maps.

    It starts at the identity, or where the number of maps changes, at normal random numbers of variance 1 / before.

    Args:
        before: number of maps that are mixed.
        after: number of maps of the result; with "mlp" the same.
        kind: "linear" or "mlp".
    """

    def __init__(self, before: int, after: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.weight = nn.Parameter(torch.eye(before) if before == after else torch.empty(after, before))
            if before != after:  # equal rows would stay equal in training
                nn.init.normal_(self.weight, std=before**-0.5)
        else:
            self.norm = nn.Parameter(torch.ones(before))
            self.w1 = nn.Parameter(torch.empty(2 * before, before))
            self.w2 = nn.Parameter(torch.zeros(before, 2 * before))
            nn.init.normal_(self.w1, std=before**-0.5)

    def forward(self) -> HeadMix:
        """The parameters as an argument of `talking_heads_attention`."""
        return self.weight if self.kind == "linear" else HeadMLP(self.norm, self.w1, self.w2)


class TalkingHeadsAttention(SelfAttention):
    """out = post_softmax(softmax(pre_softmax(q k^T / sqrt(e)))) v, times an output gate, by default per head and token.

    `pre_softmax` and `post_softmax` mix the maps of all heads of one batch row at every pair of query and key, and may
    change their number: queries and keys have h_k heads, the softmax is over h heads, and values have h_v heads. With s
    streams the mixes are (s h, s h_k) and (s h_v, s h) matrices. An output projection follows. An additive `attn_mask`
    is added after `pre_softmax`; its heads are those of the softmax.

    Time O(n^2 (d + s^2 h (h_k + h_v))), memory O(n d), in query tiles of limited memory, whose number grows with the
    length and, on other devices than the CPU beyond about a thousand tokens, with the batch. State: keys and values of
    all tokens of all streams, n s (h_k + h_v) e numbers per row.

    Args:
        dim, heads, dim_head, scale, rotary, causal, dropout, output_gate, output_gate_per: see `SelfAttention`; `heads`
            is the number of heads h of the softmax of each stream. Dropout is applied before `post_softmax`. With
            `output_gate_per="head"` there is a gate for each head of the values.
        qk_heads: number of heads h_k of queries and keys of each stream. Default: `heads`.
        v_heads: number of heads h_v of values and output of each stream. Default: `heads`.
        streams: number of streams s whose heads are mixed. The input is (b, n, d), or (b, s, n, d) with s streams.
        pre_softmax, post_softmax: head mixing before and after the softmax: "linear", "mlp" or None; "linear" where the
            number of heads changes.

    Raises:
        ValueError: `pre_softmax` or `post_softmax` is unknown, or is not "linear" where the number of heads changes; or
            a size is below 1.

    Example:
        The layer of the paper, without a gate, with 6 heads of queries, keys and values, and 24 softmax maps:

        >>> layer = TalkingHeadsAttention(512, heads=24, qk_heads=6, v_heads=6, dim_head=128, output_gate=None)
        >>> layer.attention_map(torch.randn(1, 10, 512)).shape
        torch.Size([1, 6, 10, 10])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        qk_heads: int | None = None,
        v_heads: int | None = None,
        dim_head: int = 64,
        streams: int = 1,
        pre_softmax: str | None = "linear",
        post_softmax: str | None = "linear",
        scale: float | None = None,
        rotary: RotaryArgument = None,
        causal: bool = True,
        dropout: float = 0.0,
        output_gate: str | None = "sigmoid",
        output_gate_per: str = "head",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            scale=scale,
            rotary=rotary,
            output_gate=output_gate,
            output_gate_per=output_gate_per,
        )
        check_int(1, streams=streams)
        check_positive(qk_heads=qk_heads, v_heads=v_heads)
        self.streams = streams
        self.qk_heads = heads if qk_heads is None else qk_heads
        self.v_heads = heads if v_heads is None else v_heads
        if (self.qk_heads, self.v_heads) != (heads, heads):
            qk_inner, inner = self.qk_heads * dim_head, self.v_heads * dim_head
            self.to_qkv = Projections(dim, q=qk_inner, k=qk_inner, v=inner)
            self.to_out = nn.Linear(inner, dim, bias=False)
            self.to_gate = make_output_gate(
                dim, heads=self.v_heads, dim_head=dim_head, activation=output_gate, per=output_gate_per
            )
        self.pre_softmax = self._mixer("pre_softmax", pre_softmax, "qk_heads", self.qk_heads, heads)
        self.post_softmax = self._mixer("post_softmax", post_softmax, "v_heads", heads, self.v_heads)

    def _mixer(self, name: str, kind: str | None, other: str, before: int, after: int) -> HeadMixer | None:
        """The mix of the heads of all streams."""
        if kind is not None:
            check_choice(name, kind, MIXES)
        if kind != "linear" and before != after:
            given = f"{kind!r}, {other}={getattr(self, other)}, heads={self.heads}"
            raise ValueError(f'{name} must be "linear" where {other} differs from heads, got {given}')
        return None if kind is None else HeadMixer(self.streams * before, self.streams * after, kind)

    def project(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (b, s h_k, n, e), and values (b, s h_v, n, e)."""
        heads = split_heads(self.to_qkv(x), self.dim_head)  # (..., 2 h_k + h_v, n, e)
        qk, v = heads[..., : -self.v_heads, :, :], heads[..., -self.v_heads :, :, :]
        q, k = map_queries_and_keys(lambda qk: self.prepare(qk, start), qk, self.qk_heads)
        if self.rotary is not None:
            q, k = self.rotary.decay(q, k, start)
        return (q, k, v) if x.ndim == 3 else (q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return talking_heads_attention(
            q,
            k,
            v,
            _mix(self.pre_softmax),
            _mix(self.post_softmax),
            causal=self.causal,
            mask=mask,
            scale=self.scale,
            dropout=self.dropout_now,
        )

    def softmax_weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The softmax (b, s h, i, j), before `post_softmax`."""
        return talking_heads_weights(q, k, _mix(self.pre_softmax), mask=mask, causal=self.causal, scale=self.scale)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return mix_heads(self.softmax_weights(q, k, mask), _mix(self.post_softmax))

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        return super().merge(
            out if x.ndim == 3 else out.view(out.shape[0], self.streams, self.v_heads, *out.shape[2:]), x
        )

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
        mixed: bool = True,
    ) -> Tensor:
        """The weights (b, s h_v, i, j) on the values; with `mixed=False` the softmax (b, s h, i, j)."""
        q, k, _, pairs = self.project_rows(x, mask, attn_mask, document_ids, position_ids)
        return self.weights(q, k, pairs) if mixed else self.softmax_weights(q, k, pairs)

    def values_and_output(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> ValuesAndOutput:
        q, k, v, pairs = self.project_rows(x, mask, attn_mask, document_ids, position_ids)
        return ValuesAndOutput(v, self.attend(q, k, v, pairs))

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor, HeadMix]:
        """Queries and keys (b, s h_k, n, e) and `pre_softmax`, the inputs of the stream diversity loss."""
        q, k, _ = self.project(x, start=0)
        return q, k, _mix(self.pre_softmax)

    @property
    def num_maps(self) -> int:
        """Number of maps of the softmax, s h: the heads of `attn_mask`."""
        return self.streams * self.heads

    def check_inputs(
        self,
        x: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
        *,
        earlier: int = 0,
    ) -> Documents | None:
        if isinstance(x, Tensor) and (self.streams > 1 or x.ndim == 4):
            if x.ndim != 4 or x.shape[1] != self.streams:
                want = f"(b, streams, n, dim) with streams={self.streams}, dim={self.dim}"
                raise ValueError(f"x must be {want}, got shape {tuple(x.shape)}")
            x = x[:, 0]
        return super().check_inputs(x, mask, attn_mask, document_ids, position_ids, earlier=earlier)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, qk_heads={self.qk_heads}, v_heads={self.v_heads}, streams={self.streams}"


def _mix(mixer: HeadMixer | None) -> HeadMix:
    return None if mixer is None else mixer()
