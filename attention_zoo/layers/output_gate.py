"""Output gate: the output of an attention operation is multiplied by gates that are computed from the layer's input.

Papers: GateLoop, https://arxiv.org/abs/2311.01927 (SiLU per feature); Multi-Stream Transformers,
    https://arxiv.org/abs/2107.10342 (sigmoid per head)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import check_choice

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": Tensor.sigmoid, "silu": F.silu}
GATES_PER = ("head", "feature")


class OutputGate(nn.Linear):
    """out * activation(W x + b), with one gate per head, or one per feature and then no b.

    Calling the module returns W x + b; `multiply` applies the gates, so that a layer can recompute them in backward.

    Args:
        dim: features d of the input of the layer.
        heads, dim_head: heads h and their features e.
        activation: "sigmoid" or "silu".
        per: "head" or "feature".

    Raises:
        ValueError: `activation` or `per` is unknown; the message names the argument of a layer.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, activation: str, per: str) -> None:
        check_choice("output_gate", activation, ACTIVATIONS)
        super().__init__(dim, heads if per == "head" else heads * dim_head, bias=per == "head")
        self.activation = activation
        self.per = per

    def multiply(self, out: Tensor, gate: Tensor) -> Tensor:
        """Apply the gates.

        Args:
            out: (..., n, h e), the output of the operation with its heads merged.
            gate: (..., n, h) or (..., n, h e), what the module returned for x.

        Returns:
            (..., n, h e).
        """
        gate = ACTIVATIONS[self.activation](gate)
        if self.per == "feature":
            return out * gate
        return (out.view(*gate.shape, out.shape[-1] // gate.shape[-1]) * gate[..., None]).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, per={self.per!r}"


def make_output_gate(dim: int, *, heads: int, dim_head: int, activation: str | None, per: str) -> OutputGate | None:
    """The output gate of a layer, or None without `activation`.

    Args and Raises: see `OutputGate`.
    """
    check_choice("output_gate_per", per, GATES_PER)
    if activation is None:
        return None
    return OutputGate(dim, heads=heads, dim_head=dim_head, activation=activation, per=per)
