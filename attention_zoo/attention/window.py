"""Window attention: softmax attention over the last tokens, and over the first, with a state of constant size.

Papers: Mistral 7B, https://arxiv.org/abs/2310.06825 (the window); Efficient Streaming Language Models with Attention
    Sinks, https://arxiv.org/abs/2309.17453 (the sinks)
Differs: positions are those in the row, also for sinks, whose keys are cached after `rotary`; StreamingLLM counts
positions inside the cache. Sinks are the first valid tokens of every row and document, so that padding moves none.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.layers.state import State, WindowState, check_state_shape
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.window import cached_window_attention, check_window, window_attention, window_pairs


class WindowAttention(SelfAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the last `window` tokens, i included, and the first `sinks`.

    What a token x attends to with window=3 and sinks=1:

        x
        o x
        o o x
        o o o x
        o . o o x
        o . . o o x

    The window counts positions in the row or document, masked tokens included; the sinks are the first valid tokens of
    the row or document. With causal=False the window holds the tokens less than `window` positions away, on both sides.

    Time O(n (window + sinks) d), memory O(n d) with torch's fused kernels; O(n^2) with `attn_mask`, and with packed
    documents on a GPU. State: keys and values of the last window - 1 tokens and of the sinks,
    2 (window - 1 + sinks) kv_heads dim_head elements per row, however long the sequence is.

    Args:
        dim, heads, kv_heads, dim_head, causal, dropout, scale, rotary, qk_norm, qk_norm_eps, qkv_bias, out_bias,
            output_gate, output_gate_per: see `SelfAttention`.
        window: number of tokens that a query attends to, its own included.
        sinks: number of first tokens that every later query attends to as well.

    Raises:
        ValueError: `window` is below 1, or `sinks` is negative; and as `SelfAttention`.
        TypeError: `window` or `sinks` is not an int; and as `SelfAttention`.

    Example:
        A layer of Mistral 7B:

        >>> layer = WindowAttention(4096, window=4096, heads=32, kv_heads=8, dim_head=128, rotary=True)
    """

    state_class: ClassVar[type[State]] = WindowState

    def __init__(
        self,
        dim: int,
        *,
        window: int,
        sinks: int = 0,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
        rotary: RotaryArgument = None,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        out_bias: bool = False,
        output_gate: str | None = None,
        output_gate_per: str = "feature",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            scale=scale,
            rotary=rotary,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            output_gate=output_gate,
            output_gate_per=output_gate_per,
        )
        check_window(window, sinks)
        self.window = window
        self.sinks = sinks

    def attend_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        return window_attention(
            q,
            k,
            v,
            window=self.window,
            sinks=self.sinks,
            causal=self.causal,
            mask=mask,
            attn_mask=attn_mask,
            scale=self.scale,
            dropout=self.dropout_now,
            document_ids=documents,
        )

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        old = state if isinstance(state, WindowState) else WindowState.empty(k, v)
        held, sinks = min(old.length, self.window - 1), min(old.length, self.sinks)
        check_state_shape(old.keys, "(b, kv_heads, w, dim_head)", (*k.shape[:2], held, self.dim_head))
        first = old.keys[:, :, :0] if old.sink_keys is None else old.sink_keys
        check_state_shape(first, "sinks (b, kv_heads, s, dim_head)", (*k.shape[:2], sinks, self.dim_head))
        keys, values, valid, new = old.append(k, v, mask, window=self.window, sinks=self.sinks)
        out = cached_window_attention(
            q,
            keys,
            values,
            new.sinks,
            window=self.window,
            start=old.length - held,
            mask=valid,
            attn_mask=attn_mask,
            scale=self.scale,
            dropout=self.dropout_now,
        )
        return out, new

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As in `SelfAttention`; a mask of four axes is that of `mask_rows`, which has the window."""
        if mask is not None and mask.ndim == 4:
            return super().attend(q, k, v, mask)
        return self.attend_rows(q, k, v, mask, None, None)

    def mask_rows(
        self, k: Tensor, mask: Tensor | None, attn_mask: Tensor | None, documents: Documents | None
    ) -> Tensor:
        return window_pairs(
            k.shape[2],
            k.shape[2],
            window=self.window,
            sinks=self.sinks,
            causal=self.causal,
            mask=mask,
            attn_mask=attn_mask,
            documents=documents,
            device=k.device,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, sinks={self.sinks}"
