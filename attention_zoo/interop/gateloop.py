"""Weights of gateloop-transformer.

Upstream, norms divide by max(||x||, 1e-12). Data-dependent relative positions multiply gates over pairs of features
instead of the sequence: such weights hold no positions, and load only with ablate_state_transition=True, which leaves
the gates out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from attention_zoo.attention import FullAttention, GateLoopAttention, SimpleGateLoop
from attention_zoo.interop.loader import Loader
from attention_zoo.interop.weights import Transfer, Weights
from attention_zoo.layers.norms import RMSNorm
from attention_zoo.layers.positions import Rotary
from attention_zoo.models import LanguageModel
from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast

EPS = 1e-12  # of RMSNorm
ABLATED = "the ablation has no gates"


class RawScoreAttention(FullAttention):
    """Causal attention with the scaled scores as weights, without softmax. Args: see `FullAttention`."""

    no_attn_mask = "which has no softmax"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with no_autocast(q):
            return (self.weights(q, k, mask) @ at_least_float32(v)).to(v.dtype)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        with no_autocast(q):
            scores = self.dim_head**-0.5 * at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)
            allowed = visible(*scores.shape[-2:], mask=mask, causal=True, device=q.device)
            return scores if allowed is None else scores.masked_fill(~allowed, 0.0)


class GateLoopTransformer(LanguageModel):
    """`LanguageModel` with EPS in every RMSNorm. Args: see `LanguageModel`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _set_eps(self)


@dataclass(frozen=True, kw_only=True)
class GateLoopLoader(Loader):
    """`GateLoopedAttention`; the ablations are arguments of its forward upstream."""

    dim: int
    heads: int | None = None
    dim_inner: int | None = None
    checkpoint_gate_looped_attn: bool = True  # does not change the result
    add_swish_gating: bool = True
    sub_ln: bool = False
    frac_gradient_state_transition: float = 0.9
    ablate_complex: bool = False
    ablate_state_transition: bool = False

    def spec(self) -> tuple[str, dict[str, Any]]:
        """The name and the options of the attention layer."""
        return "gate_loop", {
            **self.same("heads", "dim_inner"),
            "gate": None if self.ablate_state_transition else "real" if self.ablate_complex else "complex",
            "output_gate": "silu" if self.add_swish_gating else None,
            "sub_norm": self.sub_ln,
            "gradient_fraction": self.frac_gradient_state_transition,
        }

    def build(self, weights: Weights) -> GateLoopAttention:
        _, options = self.spec()
        return GateLoopAttention(self.dim, **options)

    def transfer(self, move: Transfer) -> None:
        move.qkv("to_qkv")
        if self.ablate_state_transition:
            move.weights.leave(f"{move.source}to_a.0.", ABLATED)
        move.fill({"to_a": "to_a.0", "norm": "maybe_sub_ln", "to_gate": "to_gates.0", "to_out": "to_out"})


@dataclass(frozen=True, kw_only=True)
class FullAttentionLoader(Loader):
    """`CausalFullAttention`; the ablations change the gates of data-dependent relative positions."""

    dim: int
    dim_head: int = 64
    heads: int = 8
    rotary_emb: bool = False
    add_swish_gating: bool = False
    data_dependent_rel_pos: bool = False
    frac_gradient_data_dependent_rel_pos: float = 0.5
    softmax_normalize: bool | None = None
    ablate_complex: bool = False
    ablate_state_transition: bool = False

    def spec(self) -> partial[FullAttention]:
        """The attention layer as a function of `dim`."""
        if self.data_dependent_rel_pos and not self.ablate_state_transition:
            raise ValueError(
                "data_dependent_rel_pos must be False unless ablate_state_transition=True, got True: the package "
                "multiplies the gates over pairs of features, not over the sequence, so that these weights hold no "
                "positions. To train with the relative positions of the paper, use RelativeGateAttention"
            )
        softmax = not self.data_dependent_rel_pos if self.softmax_normalize is None else self.softmax_normalize
        layer = FullAttention if softmax else RawScoreAttention
        output_gate = "silu" if self.add_swish_gating else None
        return partial(layer, out_bias=True, output_gate=output_gate, **self.same("heads", "dim_head"))

    def build(self, weights: Weights) -> FullAttention:
        return self.spec()(self.dim)

    def transfer(self, move: Transfer) -> None:
        if self.rotary_emb:
            freqs = move.weights.take(f"{move.source}rotary_emb.freqs", "frequencies of the rotary positions")
            rotary = Rotary(2 * freqs.numel(), freqs=freqs.double().tolist())
            rotary.prepare(self.dim_head)
            move.target().rotary = rotary
        move.qkv("to_qkv.0")
        if self.data_dependent_rel_pos:
            move.weights.leave(f"{move.source}to_a.0.", ABLATED)
        move.fill({"to_gate": "to_gates.0", "to_out": "to_out.1"})


@dataclass(frozen=True, kw_only=True)
class SimpleLoader(Loader):
    """`SimpleGateLoopLayer`."""

    dim: int
    prenorm: bool = True
    use_heinsen: bool = False  # changes the result by rounding only
    use_jax_associative_scan: bool = False  # changes the result by rounding only
    post_ln: bool = False
    reverse: bool = False

    def build(self, weights: Weights) -> SimpleGateLoop:
        return SimpleGateLoop(self.dim, norm=self.prenorm, post_norm=self.post_ln, reverse=self.reverse)

    def transfer(self, move: Transfer) -> None:
        move.fill({"norm": "norm"}, weight="gamma")
        move.fill({"to_qkva": "to_qkva.0", "post_norm": "maybe_post_ln"})
        _set_eps(move.module)


@dataclass(frozen=True, kw_only=True)
class TransformerLoader(Loader):
    """`Transformer`; the ablations can be overridden by arguments of its forward upstream."""

    dim: int
    num_tokens: int
    depth: int
    dim_head: int = 64
    heads: int = 8
    ff_mult: float = 4
    checkpoint_gate_looped_attn: bool = True  # does not change the result
    use_gate_looped_attn: bool = True
    gate_loop_heads: int | None = None
    attn_add_swish_gating: bool = True
    dim_gate_looped_attn: int | None = None
    attn_softmax_normalize: bool | None = None
    data_dependent_rel_pos: bool = False
    frac_gradient_state_transition: float = 0.9
    ablate_complex: bool = False
    ablate_state_transition: bool = False
    rotary_emb: bool = False
    post_ln_norm: bool = False
    sub_ln: bool = False

    @property
    def attention(self) -> GateLoopLoader | FullAttentionLoader:
        """The loader of one attention layer."""
        if self.use_gate_looped_attn:
            return GateLoopLoader(
                heads=self.gate_loop_heads,
                dim_inner=self.dim_gate_looped_attn,
                add_swish_gating=self.attn_add_swish_gating,
                **self.same("dim", "sub_ln", "frac_gradient_state_transition"),
                **self.same("ablate_complex", "ablate_state_transition"),
            )
        return FullAttentionLoader(
            add_swish_gating=self.attn_add_swish_gating,
            softmax_normalize=self.attn_softmax_normalize,
            **self.same("dim", "dim_head", "heads", "rotary_emb", "data_dependent_rel_pos"),
            **self.same("ablate_complex", "ablate_state_transition"),
        )

    def build(self, weights: Weights) -> GateLoopTransformer:
        return GateLoopTransformer(
            attention=self.attention.spec(),
            positions=None,
            feedforward=("gelu", {"bias": True}),
            norm="layer" if self.post_ln_norm else "rms",
            residual="post" if self.post_ln_norm else "pre",
            **self.same("num_tokens", "dim", "depth", "ff_mult"),
        )

    def transfer(self, move: Transfer) -> None:
        gamma = {"weight": "gamma"}
        move.fill({"token_embedding": "token_emb"})
        for index in range(self.depth):
            here = move.at(f"stack.layers.{index}.sublayers.", f"layers.{index}.")
            self.attention.transfer(here.at("0.block.", "0.fn."))
            norms = {"0.residual.norm": "0.norm", "1.residual.norm": "1.norm"}
            here.fill(norms, **({} if self.post_ln_norm else gamma))
            here.fill({"1.block.to_hidden": "1.fn.0", "1.block.to_out": "1.fn.2"})
        move.fill({"stack.norm": "to_logits.0"}, **gamma)
        move.fill({"to_logits": "to_logits" if self.post_ln_norm else "to_logits.1"})


def _set_eps(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, RMSNorm):
            part.eps = EPS


CLASSES: dict[str, type[Loader]] = {
    "CausalFullAttention": FullAttentionLoader,
    "GateLoopedAttention": GateLoopLoader,
    "SimpleGateLoopLayer": SimpleLoader,
    "Transformer": TransformerLoader,
}
