"""Full attention: softmax attention over all previous tokens, the baseline of the other layers.

Paper: Attention Is All You Need, https://arxiv.org/abs/1706.03762; grouped queries, https://arxiv.org/abs/2305.13245
"""

from __future__ import annotations

from torch import Tensor

from attention_zoo._checks import check_features, check_pair_bias
from attention_zoo.attention.base import SelfAttention, ValuesAndOutput
from attention_zoo.layers.state import State
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.masks import add_bias


class FullAttention(SelfAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e) + bias_ij) v_j over the visible keys, followed by an output projection.
    With `qk_norm` q and k are normalised per head before `rotary`.

    Time O(n^2 d). Memory O(n d), with `bias` in query tiles; O(n^2) with a mask or a pattern. State: keys and values of
    all tokens, 2 n kv_heads dim_head elements per row.

    Args and Raises: see `SelfAttention`, which holds the whole forward pass. All methods also take `bias`, a floating
    point number per head and pair, (h, i, j) or (b, h, i, j), which is added to the scores, such as a learned bias or
    the pair representation of a protein model. Gradients reach it; it is combined with every mask and with the position
    bias of the layer.

    Example:
        >>> layer = FullAttention(512, heads=8, kv_heads=2, rotary=Rotary())
        >>> y = layer(torch.randn(2, 100, 512))

        A prefix language model, whose first 20 tokens attend to each other in both directions:

        >>> index = torch.arange(100)
        >>> prefix = (index < 20) | (index <= index[:, None])
        >>> y = FullAttention(512, causal=False)(torch.randn(2, 100, 512), attn_mask=prefix)
    """

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        bias: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend over a whole sequence.

        Args:
            x, mask, attn_mask, document_ids, position_ids: see `AttentionBlock.forward`.
            bias: (h, n, n) or (b, h, n, n) floating point, added to the scores; b may be 1.

        Raises:
            TypeError: `bias` is not floating point; and as `AttentionBlock.forward`.
            ValueError: `bias` has the wrong shape or device; and as `AttentionBlock.forward`.
        """
        attn_mask = self.with_bias(x, attn_mask, bias)
        return super().forward(x, mask=mask, attn_mask=attn_mask, document_ids=document_ids, position_ids=position_ids)

    def step(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        bias: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Decode. `bias` holds the rows of `forward` for the new tokens, (h, t, j) or (b, h, t, j)."""
        attn_mask = self.with_bias(x, attn_mask, bias, earlier=0 if state is None or bias is None else state.length)
        return super().step(x, state, mask=mask, attn_mask=attn_mask, position_ids=position_ids)

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        bias: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        attn_mask = self.with_bias(x, attn_mask, bias)
        return super().attention_map(
            x, mask=mask, attn_mask=attn_mask, document_ids=document_ids, position_ids=position_ids
        )

    def values_and_output(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        bias: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> ValuesAndOutput:
        attn_mask = self.with_bias(x, attn_mask, bias)
        return super().values_and_output(
            x, mask=mask, attn_mask=attn_mask, document_ids=document_ids, position_ids=position_ids
        )

    def with_bias(self, x: Tensor, attn_mask: Tensor | None, bias: Tensor | None, *, earlier: int = 0) -> Tensor | None:
        """The attention mask with the bias of every pair added; arguments as in `forward`, after `earlier` tokens."""
        if bias is None:
            return attn_mask
        check_features(x, self.dim)
        keys = earlier + x.shape[1]
        self.check_attn_mask(attn_mask, x, keys)
        check_pair_bias(bias, x, self.heads, keys)
        return add_bias(attn_mask, bias)
