"""Weights of gateloop-transformer.

Its norms divided by max(||x||, 1e-12). Data-dependent relative positions multiplied gates over pairs of features in
place of the sequence: such weights hold no positions, and cannot be loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.attention import GateLoopAttention, SelfAttention, SimpleGateLoop
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.norms import RMSNorm
from attention_zoo.layers.positions import Rotary
from attention_zoo.models import LanguageModel
from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import softmax_attention, softmax_attention_weights

EPS = 1e-12  # of RMSNorm


class SwishAttention(SelfAttention):
    """Causal attention, softmax or raw scores, times SiLU(x W_g) where asked for.

    Args:
        dim, heads, dim_head, rotary: see `SelfAttention`.
        softmax: False for the scores themselves as weights.
        swish_gate: multiply the output by SiLU(x W_g).
    """

    def __init__(
        self, dim: int, *, heads: int, dim_head: int, rotary: Rotary | None, softmax: bool, swish_gate: bool
    ) -> None:
        super().__init__(dim, heads=heads, dim_head=dim_head, rotary=rotary, out_bias=True)
        self.softmax = softmax
        self.to_gate = nn.Linear(dim, heads * dim_head, bias=False) if swish_gate else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.softmax:
            return softmax_attention(q, k, v, mask=mask, causal=True)
        with no_autocast(q):
            return (self.weights(q, k, mask) @ at_least_float32(v)).to(v.dtype)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        if self.softmax:
            return softmax_attention_weights(q, k, mask=mask, causal=True)
        with no_autocast(q):
            scores = self.dim_head**-0.5 * at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)
            key = None if mask is None else mask[:, None, None]
            seen = visible(*scores.shape[-2:], mask=key, causal=True, device=q.device)
            seen_scores: Tensor = scores if seen is None else scores.masked_fill(~seen, 0.0)
            return seen_scores

    def _merge(self, out: Tensor, x: Tensor) -> Tensor:
        merged = out.transpose(1, 2).flatten(2)
        if self.to_gate is not None:
            merged = merged * F.silu(self.to_gate(x))
        projected: Tensor = self.to_out(merged)
        return projected


def load_gate_loop(
    weights: Weights,
    *,
    dim: int,
    heads: int | None = None,
    dim_inner: int | None = None,
    checkpoint_gate_looped_attn: bool = True,
    add_swish_gating: bool = True,
    sub_ln: bool = False,
    frac_gradient_state_transition: float = 0.9,
    ablate_complex: bool = False,
    ablate_state_transition: bool = False,
) -> GateLoopAttention:
    """`GateLoopedAttention`; the ablations, which its forward took, are settled here."""
    options = _mixer_options(
        heads, dim_inner, add_swish_gating, sub_ln, frac_gradient_state_transition, ablate_complex,
        ablate_state_transition,
    )  # fmt: skip
    block = GateLoopAttention(dim, **options)
    _move_gate_loop(Transfer(weights, block), block)
    return block


def load_full_attention(
    weights: Weights,
    *,
    dim: int,
    dim_head: int = 64,
    heads: int = 8,
    rotary_emb: bool = False,
    add_swish_gating: bool = False,
    data_dependent_rel_pos: bool = False,
    frac_gradient_data_dependent_rel_pos: float = 0.5,
    softmax_normalize: bool | None = None,
    ablate_complex: bool = False,
    ablate_state_transition: bool = False,
) -> SwishAttention:
    """`CausalFullAttention`; the ablations are those of gates, of which it has none."""
    _refuse_relative_positions(data_dependent_rel_pos)
    block = SwishAttention(
        dim,
        heads=heads,
        dim_head=dim_head,
        rotary=_rotary(weights, "", rotary_emb),
        softmax=softmax_normalize is not False,
        swish_gate=add_swish_gating,
    )
    _move_full_attention(Transfer(weights, block), block)
    return block


def load_simple(
    weights: Weights,
    *,
    dim: int,
    prenorm: bool = True,
    use_heinsen: bool = False,
    use_jax_associative_scan: bool = False,
    post_ln: bool = False,
    reverse: bool = False,
) -> SimpleGateLoop:
    """`SimpleGateLoopLayer`; how the recurrence was computed changes no number but by rounding."""
    block = SimpleGateLoop(dim, norm=prenorm, post_norm=post_ln, reverse=reverse)
    move = Transfer(weights, block)
    if prenorm:
        move.put("norm.weight", "norm.gamma")
    move.put("to_qkva.weight", "to_qkva.0.weight")
    if post_ln:
        move.affine("post_norm", "maybe_post_ln")
    _set_eps(block)
    return block


def load_transformer(
    weights: Weights,
    *,
    dim: int,
    num_tokens: int,
    depth: int,
    dim_head: int = 64,
    heads: int = 8,
    ff_mult: float = 4,
    checkpoint_gate_looped_attn: bool = True,
    use_gate_looped_attn: bool = True,
    gate_loop_heads: int | None = None,
    attn_add_swish_gating: bool = True,
    dim_gate_looped_attn: int | None = None,
    attn_softmax_normalize: bool | None = None,
    data_dependent_rel_pos: bool = False,
    frac_gradient_state_transition: float = 0.9,
    ablate_complex: bool = False,
    ablate_state_transition: bool = False,
    rotary_emb: bool = False,
    post_ln_norm: bool = False,
    sub_ln: bool = False,
) -> LanguageModel:
    """`Transformer`; the ablations, which its forward could overrule, are settled here."""
    if use_gate_looped_attn:
        options = _mixer_options(
            gate_loop_heads, dim_gate_looped_attn, attn_add_swish_gating, sub_ln, frac_gradient_state_transition,
            ablate_complex, ablate_state_transition,
        )  # fmt: skip
        mixers: list[Any] = [("gate_loop", options)]
    else:
        _refuse_relative_positions(data_dependent_rel_pos)

        def mixer(layer: int) -> Callable[[int], nn.Module]:
            rotary = _rotary(weights, f"layers.{layer}.0.fn.", rotary_emb)  # kept with each layer's weights
            return lambda dim: SwishAttention(
                dim,
                heads=heads,
                dim_head=dim_head,
                rotary=rotary,
                softmax=attn_softmax_normalize is not False,
                swish_gate=attn_add_swish_gating,
            )

        mixers = [mixer(layer) for layer in range(depth)]
    model = LanguageModel(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        attention=mixers,
        positions=None,
        feedforward=("gelu", {"bias": True}),
        ff_mult=ff_mult,
        norm="layer" if post_ln_norm else "rms",
        residual="post" if post_ln_norm else "pre",
    )
    move = Transfer(weights, model)
    move.put("token_embedding.weight", "token_emb.weight")
    for index, layer in enumerate(model.stack.layers):
        here = move.at(f"stack.layers.{index}.sublayers.", f"layers.{index}.")
        block = layer.sublayers[0].block  # type: ignore[union-attr,index]
        (_move_gate_loop if use_gate_looped_attn else _move_full_attention)(here.at("0.block.", "0.fn."), block)
        for place in (0, 1):
            if post_ln_norm:
                here.affine(f"{place}.residual.norm", f"{place}.norm")
            else:
                here.put(f"{place}.residual.norm.weight", f"{place}.norm.gamma")
        here.affine("1.block.to_hidden", "1.fn.0")
        here.affine("1.block.to_out", "1.fn.2")
    if post_ln_norm:
        move.put("to_logits.weight", "to_logits.weight")
    else:
        move.put("stack.norm.weight", "to_logits.0.gamma")
        move.put("to_logits.weight", "to_logits.1.weight")
    _set_eps(model)
    return model


def _mixer_options(
    heads: int | None,
    dim_inner: int | None,
    swish_gate: bool,
    sub_norm: bool,
    gradient_fraction: float,
    ablate_complex: bool,
    ablate_state_transition: bool,
) -> dict[str, Any]:
    return {
        "heads": heads,
        "dim_inner": dim_inner,
        "swish_gate": swish_gate,
        "sub_norm": sub_norm,
        "gradient_fraction": gradient_fraction,
        "real_gate": ablate_complex,
        "transition": not ablate_state_transition,
    }


def _move_gate_loop(move: Transfer, block: Any) -> None:
    move.qkv("to_qkv")
    if block.to_a is None:
        for kind in ("weight", "bias"):
            move.weights.leave(f"{move.source}to_a.0.{kind}", "gates, of which the ablation takes none")
    else:
        move.affine("to_a", "to_a.0")
    if block.norm is not None:
        move.affine("norm", "maybe_sub_ln")
    if block.to_gate is not None:
        move.put("to_gate.weight", "to_gates.0.weight")
    if block.to_out is not None:
        move.put("to_out.weight", "to_out.weight")


def _move_full_attention(move: Transfer, block: Any) -> None:
    move.qkv("to_qkv.0")
    if block.to_gate is not None:
        move.put("to_gate.weight", "to_gates.0.weight")
    move.affine("to_out", "to_out.1")


def _rotary(weights: Weights, source: str, wanted: bool) -> Rotary | None:
    if not wanted:
        return None
    freqs = weights.take(f"{source}rotary_emb.freqs", "frequencies of the rotary positions")
    return Rotary(2 * freqs.numel(), freqs=freqs.double().tolist())


def _refuse_relative_positions(asked: bool) -> None:
    if asked:
        raise ValueError(
            "data_dependent_rel_pos must be False to be loaded, got True: the package multiplied the gates over pairs "
            "of features, not over the sequence, so that these weights hold no positions. RelativeGateAttention "
            "computes what the paper defines, for training anew"
        )


@torch.no_grad()
def _set_eps(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, RMSNorm):
            part.eps = EPS


CLASSES: dict[str, Callable[..., nn.Module]] = {
    "CausalFullAttention": load_full_attention,
    "GateLoopedAttention": load_gate_loop,
    "SimpleGateLoopLayer": load_simple,
    "Transformer": load_transformer,
}
