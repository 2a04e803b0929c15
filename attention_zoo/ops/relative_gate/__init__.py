"""Attention with data-dependent relative positions: each pair of features is gated between key and query.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attention_zoo._checks import check_flag
from attention_zoo.ops.documents import Documents, documents_of
from attention_zoo.ops.gate_loop import complex_of
from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.relative_gate.batched import batched_relative_gate_attention, batched_relative_gate_weights
from attention_zoo.ops.relative_gate.cached import CHUNK, DecayedKeys, cached_relative_gate_attention, extend, no_keys
from attention_zoo.ops.relative_gate.tiled import tiled_relative_gate_attention, tiled_relative_gate_weights
from attention_zoo.ops.softmax import check_options, check_qkv

__all__ = [
    "CHUNK",
    "DecayedKeys",
    "cached_relative_gate_attention",
    "extend",
    "no_keys",
    "relative_gate_attention",
    "relative_gate_weights",
]


def relative_gate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    mask: Tensor | None = None,
    softmax: bool = True,
    dropout: float = 0.0,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_i = sum_j w_ij v_j over j <= i, w = softmax(sim) or sim itself.

    sim_ij = e^-0.5 sum_p (q_{i,2p} k_{j,2p} + q_{i,2p+1} k_{j,2p+1}) Re(a_{j+1,p} ... a_{i,p})

    Time O(n^2 e). Memory O(n e) in query tiles, whose scores are recomputed in backward; "batched" holds all scores,
    O(n^2 + n e log n), and recomputes them in backward; the reference takes O(n^2 e).

    Args:
        q: queries (b, h, i, e), aligned with the last keys; e is even.
        k, v: keys (b, h, j, e) and values (b, h, j, e_v).
        gate: gates a, (b, h, j, e / 2) complex with 0 <= |a| <= 1, one per key and pair of features. A gate of exactly
            0 removes its pair from the scores of all earlier keys; "tiled" gives it no gradient, and the rounding error
            of its gradient of a gate grows with 1 / |a|. The other implementations have the exact gradient.
        mask: (b, j) bool, True = a valid token. The gates of masked tokens are taken as 1.
        softmax: whether the weights are the softmax of the scores, or the scores.
        dropout: probability of dropping a weight.
        document_ids: (b, n) int, for packed rows of n = i = j tokens; see `Documents`.
        impl: "reference" (all scores at once, twice differentiable), "tiled" (query tiles; a second derivative raises
            RuntimeError), "batched" (matrix products of all tokens, whose number grows with the logarithm of the
            length) or "auto": tiled on the CPU, otherwise batched.

    Returns:
        (b, h, i, e_v) in the dtype of v.

    Raises:
        TypeError: `gate` is not complex, `softmax` not a bool, or `dropout` not a number.
        ValueError: shapes do not match, e is odd, or `dropout` is outside [0, 1].
    """
    if document_ids is not None:
        gate = _check_gate(q, k, gate, mask)
        rows = partial(relative_gate_attention, softmax=softmax, dropout=dropout, impl=impl)
        return documents_of(document_ids, q, k).apply(rows, q, k, v, gate, mask=mask, causal=True)
    impl = choose(impl, ("tiled", "batched"))
    check_qkv(q, k, v)
    check_options(True, 1.0, dropout)
    check_flag(softmax=softmax)
    gate = _check_gate(q, k, gate, mask)
    with no_autocast(q):
        args = at_least_float32(q), at_least_float32(k), at_least_float32(v), gate, mask, softmax, dropout
        if impl != "reference":
            attend = (
                tiled_relative_gate_attention if _fast_impl(impl, q) == "tiled" else batched_relative_gate_attention
            )
            return attend(*args).to(v.dtype)
        from attention_zoo.ops.relative_gate.reference import relative_gate_reference

        return relative_gate_reference(*args).to(v.dtype)


def relative_gate_weights(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    *,
    mask: Tensor | None = None,
    softmax: bool = True,
    document_ids: Tensor | Documents | None = None,
) -> Tensor:
    """Weights (b, h, i, j) of `relative_gate_attention` on the values; the arguments have the same meaning."""
    gate = _check_gate(q, k, gate, mask)
    if document_ids is not None:
        mask = documents_of(document_ids, q, k).mask_pairs(mask)
    with no_autocast(q):
        weights_of = tiled_relative_gate_weights if _fast_impl("auto", q) == "tiled" else batched_relative_gate_weights
        return weights_of(at_least_float32(q), at_least_float32(k), gate, mask, softmax).to(q.dtype)


def _fast_impl(impl: str, q: Tensor) -> str:
    """Resolve "auto": on a GPU, a loop over tiles takes longer to launch than to run."""
    return impl if impl != "auto" else "tiled" if q.device.type == "cpu" else "batched"


def _check_gate(q: Tensor, k: Tensor, gate: Tensor, mask: Tensor | None) -> Tensor:
    """The gates in the complex dtype of q, 1 at masked tokens."""
    if not gate.is_complex():
        raise TypeError(f"gate must be complex, got dtype {gate.dtype}")
    want = (*k.shape[:3], k.shape[3] // 2)
    if gate.shape != want or q.shape[3] % 2 or q.shape[1] != k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"gate must be (b, h, j, e / 2) = {want} for an even e, as many heads of q as of k and i <= j, got shapes "
            f"{tuple(gate.shape)}, {tuple(q.shape)} and {tuple(k.shape)}"
        )
    gate = gate.to(complex_of(q.dtype))
    if mask is None or mask.ndim == 4:  # of documents, whose gates at masked tokens are 1 already
        return gate
    return torch.where(mask[:, None, :, None], gate, torch.ones_like(gate))
