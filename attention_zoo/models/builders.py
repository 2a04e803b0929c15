"""Models of the papers, as thin choices of the parts that every model has."""

from __future__ import annotations

from torch import nn

from attention_zoo.models.language_model import LanguageModel


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
    """The causal transformer of flash-cosine-sim-attention, with DeepNet's residuals or pre-norm.

    Papers: https://arxiv.org/abs/2010.04245, https://arxiv.org/abs/2203.00555

    Args:
        num_tokens, dim, depth, max_seq_len, heads, dim_head: see `LanguageModel`.
        scale: the largest score.
        groups: slices of a head that are normalised separately.
        pre_norm: LayerNorm before every branch and before the logits, in place of DeepNorm after every branch.
        cosine_sim: False for plain softmax attention in place of cosine-sim.
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
