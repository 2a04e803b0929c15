"""What each attention layer supports, read from its signature and from a small instance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from attention_zoo.attention.base import AttentionBlock
from attention_zoo.ops.sparse import TextImageLayout

DIM = 16  # features of the small instances
LAYOUT = TextImageLayout(text_len=4, height=3, width=4)


@dataclass(frozen=True)
class Capabilities:
    """What an attention layer supports.

    Attributes:
        causal: "always"; "optional" if causal=False or reverse=True is possible; "" for a class that does not say.
        mask: padding masks.
        step: incremental decoding.
        state: growth of the decoding state with the number n of tokens: "n", "1" (constant), or "" without `step`.
        map: attention maps.
        compile: torch.compile(fullgraph=True), with gradients.
        double_backward: second derivatives of the fast path; inside `reference()` every layer has them.
        context: takes a context, another sequence.
        image: takes a layout of text and image.
        streams: heads can be mixed across streams.
        rotary, bias: rotary position embedding, relative position bias.
        kv_heads: grouped key/value heads.
        qk_norm: norms of queries and keys.
        dropout: dropout of the attention weights.
        attn_mask: boolean or additive masks of pairs of query and key.
        documents: packed documents, `document_ids`.
    """

    causal: str
    mask: bool
    step: bool
    state: str
    map: bool
    compile: bool
    double_backward: bool
    context: bool
    image: bool
    streams: bool
    rotary: bool
    bias: bool
    kv_heads: bool
    qk_norm: bool
    dropout: bool
    attn_mask: bool
    documents: bool


def capabilities(blocks: Mapping[str, type[nn.Module]] | None = None) -> dict[str, Capabilities]:
    """What attention layers support, by name.

    Args:
        blocks: classes by name. Default: BLOCKS.
    """
    from attention_zoo.attention import BLOCKS  # which imports this file

    return {name: capabilities_of(cls) for name, cls in (BLOCKS if blocks is None else blocks).items()}


def capabilities_of(cls: type[nn.Module]) -> Capabilities:
    """What one attention layer supports."""
    takes = inspect.signature(cls).parameters
    reads = inspect.signature(cls.forward).parameters
    block = _tiny(cls)
    step = _has(cls, "step")
    causal = "always" if getattr(block, "causal", None) else ""
    with _ShapesOnly():  # type: ignore[no-untyped-call]
        state = _state_growth(block) if step else ""
        double_backward = _has_second_derivative(block)
    return Capabilities(
        causal="optional" if takes.keys() & {"causal", "reverse"} else causal,
        mask="mask" in reads,
        step=step,
        state=state,
        map=_has(cls, "attention_map"),
        compile=getattr(cls, "compiles", True),
        double_backward=double_backward,
        context="context" in reads,
        image="layout" in takes,
        streams="streams" in takes,
        rotary="rotary" in takes,
        bias="bias" in takes,
        kv_heads="kv_heads" in takes,
        qk_norm="qk_norm" in takes,
        dropout="dropout" in takes,
        attn_mask="attn_mask" in reads and getattr(block, "no_attn_mask", None) is None,
        documents="document_ids" in reads and getattr(block, "no_documents", None) is None,
    )


class _ShapesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the shape function of each operator of this package instead of its kernel, which may take 20 s to compile.

    The results are zeros. Which derivatives exist is decided above the kernels, and stays as it is.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "attention_zoo":
            return func(*args, **(kwargs or {}))
        given = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args)
        return tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), func(*given))


def _has(cls: type[nn.Module], method: str) -> bool:
    """Whether a class has a method of its own, not only that of `AttentionBlock`."""
    return getattr(cls, method, None) not in (None, getattr(AttentionBlock, method))


def _tiny(cls: type[nn.Module]) -> nn.Module:
    takes = inspect.signature(cls).parameters
    sizes: dict[str, Any] = {"heads": 2, "dim_head": 8, "layout": LAYOUT}
    if "dim_head" not in takes:
        del sizes["heads"]  # one head per channel by default
    if (window := takes.get("window")) is not None and window.default is window.empty:
        sizes["window"] = 3
    with torch.random.fork_rng(devices=[]):
        return cls(DIM, **{name: size for name, size in sizes.items() if name in takes}).eval()


def _others(block: nn.Module) -> dict[str, Any]:
    """Arguments of `forward` other than x."""
    return {"context": torch.ones(1, 3, DIM)} if "context" in inspect.signature(block.forward).parameters else {}


def _state_growth(block: Any) -> str:
    with torch.no_grad():
        states = [block.step(torch.zeros(1, n, DIM), **_others(block))[1] for n in (4, 8)]
        sizes = [sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor)) for state in states]
    return "1" if sizes[0] == sizes[1] else "n"


def _has_second_derivative(block: nn.Module) -> bool:
    x = torch.linspace(-1, 1, 8 * DIM).view(1, 8, DIM).requires_grad_()
    (first,) = torch.autograd.grad(block(x, **_others(block)).square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(first.square().sum(), x)
    except RuntimeError:
        return False
    return True
