"""Language models of two upstream packages, as `LanguageModel` with their options."""

from __future__ import annotations

from torch import nn

from attention_zoo.models.language_model import LanguageModel
from attention_zoo.models.layer_specs import AttentionSpec


def cosine_sim_lm(
    *,
    num_tokens: int,
    dim: int,
    depth: int,
    max_seq_len: int,
    heads: int = 8,
    dim_head: int = 64,
    scale: float = 8.0,
    groups: int = 1,
    pre_norm: bool = False,
    cosine_sim: bool = True,
) -> LanguageModel:
    """The causal transformer of flash-cosine-sim-attention, with DeepNorm or pre-norm residual connections.

    Papers: https://arxiv.org/abs/2010.04245, https://arxiv.org/abs/2203.00555

    Args:
        num_tokens, dim, depth, max_seq_len, heads, dim_head: see `LanguageModel`.
        scale, groups: see `CosineSimAttention`.
        pre_norm: whether LayerNorm precedes every sub-layer and the logits; False: DeepNorm after every sub-layer.
        cosine_sim: whether to use cosine-similarity attention; False: full attention.
    """
    model = LanguageModel(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        max_seq_len=max_seq_len,
        attention=("cosine_sim", {"scale": scale, "groups": groups}) if cosine_sim else "full",
        heads=heads,
        dim_head=dim_head,
        positions="learned",
        norm="layer",
        residual="pre" if pre_norm else "deepnorm",
    )
    if not pre_norm:
        nn.init.normal_(model.token_embedding.weight, std=1e-5)
        if model.positions is not None:
            nn.init.normal_(model.positions.weight, std=1e-5)
        if model.to_logits is not None:
            nn.init.xavier_normal_(model.to_logits.weight)
    return model


def gate_loop_lm(
    *,
    num_tokens: int,
    dim: int,
    depth: int,
    attention: AttentionSpec = "gate_loop",
    heads: int | None = None,
    dim_head: int | None = None,
    ff_mult: float = 4,
    post_norm: bool = False,
) -> LanguageModel:
    """The language model of gateloop-transformer: gate loops instead of attention, and no positions.

    Paper: https://arxiv.org/abs/2311.01927

    Args:
        num_tokens, dim, depth, ff_mult: see `LanguageModel`.
        heads: number of heads of every block that takes it. None: the default of each block, for a gate loop one head
            per channel.
        dim_head: size of the heads of every block that takes it. Gate loops do not; an error with gate loops only.
        attention: "gate_loop", or a list that mixes it with other blocks, such as ["gate_loop", "gate_loop", "full"].
            Blocks with an argument `rotary` get rotary positions.
        post_norm: whether LayerNorm follows every residual sum, with none before the logits; False: RMSNorm before
            every sub-layer and before the logits.
    """
    return LanguageModel(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        attention=attention,
        heads=heads,
        dim_head=dim_head,
        feedforward=("gelu", {"bias": True}),
        ff_mult=ff_mult,
        norm="layer" if post_norm else "rms",
        residual="post" if post_norm else "pre",
    )
