"""`Stack`: the blocks of its layers, their arguments and inputs, and decoding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import (
    GEGLU,
    CosineSimAttention,
    CrossAttention,
    FeedForward,
    FullAttention,
    LanguageModel,
    LayerNorm,
    RelativeBias,
    RMSNorm,
    Rotary,
    Stack,
    SwiGLU,
)
from attention_zoo.layers import PreNorm, SandwichNorm
from attention_zoo.models.stack import BlockInputs
from tests.formulas import relative_error

DIM = 12
SMALL = {"heads": 2, "dim_head": 6}


class Mean(nn.Module):
    """A user-defined block: the mean of all tokens so far."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        weight = torch.ones(x.shape[:2]) if mask is None else mask.float()
        total = (x * weight[..., None]).cumsum(1)
        return self.to_out(total / weight.cumsum(1).clamp(min=1)[..., None])


def make_full(dim: int, rotary: Rotary | None = None) -> FullAttention:
    return FullAttention(dim, rotary=rotary, **SMALL)


def kinds(stack: Stack) -> list[list[str]]:
    """The classes of the blocks of every layer, without feedforwards."""
    return [
        [type(sub.block).__name__ for sub in layer.sublayers if not isinstance(sub.block, FeedForward)]
        for layer in stack.layers
    ]


def blocks(stack: Stack) -> list[nn.Module]:
    return [sub.block for layer in stack.layers for sub in layer.sublayers]


FULL, COSINE, CROSS, MEAN = ["FullAttention"], ["CosineSimAttention"], ["CrossAttention"], ["Mean"]
FORMS = {
    "a name": ("cosine_sim", [COSINE] * 3),
    "a name and options": (("full", {"kv_heads": 1}), [FULL] * 3),
    "a name and options read from JSON": (["full", {"kv_heads": 1}], [FULL] * 3),
    "a class": (CosineSimAttention, [COSINE] * 3),
    "a user-defined class": (Mean, [MEAN] * 3),
    "a function": (make_full, [FULL] * 3),
    "a partial": (partial(FullAttention, kv_heads=1), [FULL] * 3),
    "a cycled list": (["full", "cosine_sim"], [FULL, COSINE, FULL]),
    "a list longer than the stack": (["full", "full", "cosine_sim", "cross"], [FULL, FULL, COSINE]),
    "a tuple of names": (("full", "cosine_sim"), [FULL, COSINE, FULL]),
    "a mixed list": (["full", ("cosine_sim", {"groups": 2}), Mean], [FULL, COSINE, MEAN]),
    "a layer of several": ([["full", "cross"]], [FULL + CROSS] * 3),
    "layers of different depths": (["full", ["cosine_sim", ("cross", {}), Mean]], [FULL, COSINE + CROSS + MEAN, FULL]),
}


@pytest.mark.parametrize("form", FORMS)
def test_stack_accepts_every_form_of_attention_spec(form: str) -> None:
    attention, want = FORMS[form]
    assert kinds(Stack(DIM, 3, attention=attention)) == want


def test_options_apply_to_their_block_only() -> None:
    stack = Stack(DIM, 2, attention=[("cosine_sim", {"groups": 3, "scale": 1.5}), "cosine_sim"], **SMALL)
    first, _, second, _ = blocks(stack)
    assert (first.groups, first.scale) == (3, 1.5)
    assert (second.groups, second.scale) == (1, 8.0)


def test_options_of_a_block_take_precedence_over_shared_arguments() -> None:
    stack = Stack(DIM, 2, attention=["full", ("full", {"heads": 3, "dropout": 0.5})], attn_dropout=0.1, **SMALL)
    first, _, second, _ = blocks(stack)
    assert (first.heads, first.dropout) == (2, 0.1)
    assert (second.heads, second.dropout, second.dim_head) == (3, 0.5, 6)


def test_arguments_set_by_a_partial_take_precedence() -> None:
    attention = [partial(FullAttention, heads=3), "full"]
    first, _, second, _ = blocks(Stack(DIM, 2, attention=attention, **SMALL))
    assert (first.heads, second.heads) == (3, 2)


def test_blocks_keep_their_default_sizes() -> None:
    block = blocks(Stack(DIM, 1))[0]
    assert (block.heads, block.dim_head, block.dropout) == (8, 64, 0.0)


def test_shared_part_is_given_to_every_block_with_that_argument() -> None:
    rotary = Rotary()
    stack = Stack(DIM, 4, attention=["full", "cross", make_full, Mean], rotary=rotary, heads=2, dim_head=6)
    full, _, cross, _, made, _, mean, _ = blocks(stack)
    assert full.rotary is rotary
    assert made.rotary is rotary
    assert not hasattr(cross, "rotary")
    assert not hasattr(mean, "rotary")


def test_shared_bias_is_one_parameter() -> None:
    stack = Stack(DIM, 3, bias=RelativeBias(2), **SMALL)
    assert sum(p.shape == (32, 2) for p in stack.parameters()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "cross", "rotary": Rotary()}, "rotary must be taken by at least one block, but none of 'cross'"),
        ({"attention": Mean, "heads": 2}, "heads must be taken by at least one block"),
        ({"attention": Mean, "attn_dropout": 0.1}, "attn_dropout must be taken by at least one block"),
        ({"rotry": Rotary()}, "rotry must be taken by at least one block"),
    ],
)
def test_shared_part_that_no_block_takes_raises(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stack(DIM, 1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual", ["pre", "post", "sandwich", "deepnorm"])
@pytest.mark.parametrize("feedforward", ["gelu", None])
def test_stack_equals_its_sublayers_applied_in_order(
    residual: str, feedforward: str | None, dtype: torch.dtype
) -> None:
    stack = Stack(DIM, 2, attention=["full", ["cosine_sim", Mean]], residual=residual, feedforward=feedforward).to(
        dtype
    )
    x, mask = torch.randn(2, 7, DIM, dtype=dtype), torch.rand(2, 7) < 0.7
    want = x
    for layer in stack.layers:
        for sub in layer.sublayers:
            inner = want if residual in ("post", "deepnorm") else sub.residual.norm(want)
            is_feedforward = isinstance(sub.block, FeedForward)
            y = sub.block(inner) if is_feedforward else sub.block(inner, mask=mask)
            if residual == "sandwich":
                y = sub.residual.norm_out(y)
            scale = (2 * 2) ** 0.25 if residual == "deepnorm" else 1
            want = scale * want + y
            if residual in ("post", "deepnorm"):
                want = sub.residual.norm(want)
    if residual in ("pre", "sandwich"):
        want = stack.norm(want)
    assert relative_error(stack(x, mask=mask), want) < (1e-13 if dtype == torch.float64 else 1e-6)


def test_norm_residual_and_feedforward_are_configurable_by_name() -> None:
    stack = Stack(DIM, 1, norm="rms", residual="sandwich", feedforward=("swiglu", {"mult": 2, "bias": True}))
    sub = stack.layers[0].sublayers[1]
    assert isinstance(sub.residual, SandwichNorm)
    assert isinstance(sub.residual.norm, RMSNorm)
    assert isinstance(sub.block, SwiGLU)
    assert sub.block.to_out.in_features == 2 * DIM
    assert sub.block.to_out.bias is not None
    assert isinstance(stack.norm, RMSNorm)


def test_norms_and_feedforwards_may_be_functions() -> None:
    stack = Stack(DIM, 1, norm=lambda dim: LayerNorm(dim, eps=0.5), feedforward=lambda dim: GEGLU(dim, mult=3))
    sub = stack.layers[0].sublayers[1]
    assert isinstance(sub.residual, PreNorm)
    assert sub.residual.norm.eps == stack.norm.eps == 0.5
    assert sub.block.to_out.in_features == 3 * DIM


def test_norms_take_options() -> None:
    stack = Stack(DIM, 1, norm=("rms", {"eps": 1e-3}), residual="sandwich")
    norms = [stack.norm, *(norm for sub in stack.sublayers() for norm in (sub.residual.norm, sub.residual.norm_out))]
    assert [(type(norm), norm.eps) for norm in norms] == [(RMSNorm, 1e-3)] * 5


def test_a_list_of_feedforwards_is_cycled_over_the_depth() -> None:
    stack = Stack(DIM, 5, feedforward=["gelu", ("swiglu", {"dim_inner": 24}), None], ff_mult=2, ff_dropout=0.1)
    found = [[sub.block for sub in layer.sublayers if sub.spec is None] for layer in stack.layers]
    assert [[(type(block), block.to_out.in_features) for block in blocks] for blocks in found] == [
        [(FeedForward, 2 * DIM)],
        [(SwiGLU, 24)],
        [],
        [(FeedForward, 2 * DIM)],
        [(SwiGLU, 24)],
    ]


def test_layers_that_share_feedforwards_must_have_the_same_one() -> None:
    stack = Stack(DIM, 4, feedforward=["gelu", "swiglu"], shared_ff_ids=[0, 1])
    blocks = [layer.sublayers[1].block for layer in stack.layers]
    assert blocks[0] is blocks[2] is not blocks[1]
    with pytest.raises(ValueError, match=r"shared_ff_ids must give the same id only to layers .* .swiglu."):
        Stack(DIM, 4, feedforward=["gelu", "swiglu"], shared_ff_ids=[0, 0, 1, 1])


def test_bidirectional_stack_has_bidirectional_blocks() -> None:
    stack = Stack(DIM, 2, attention=["full", "cosine_sim"], causal=False, **SMALL).eval()
    x = torch.randn(1, 5, DIM)
    changed = x.clone()
    changed[:, -1] += torch.randn(DIM)
    assert not torch.equal(stack(x)[:, 0], stack(changed)[:, 0])
    with pytest.raises(ValueError, match="step needs causal=True, got causal=False"):
        stack.step(x)


def test_always_causal_block_in_a_bidirectional_stack_raises() -> None:
    class Always(Mean):
        causal = True

    with pytest.raises(ValueError, match="causal=False must be possible for every block, but 'Always' is causal"):
        Stack(DIM, 1, attention=Always, causal=False)


@pytest.mark.parametrize("attention", ["cross", [["full", "cross"]], ["full", "cross"]])
def test_context_and_context_mask_are_given_to_cross_attention(attention) -> None:
    stack = Stack(DIM, 2, attention=attention, **SMALL).eval()
    x, context = torch.randn(2, 5, DIM), torch.randn(2, 7, DIM)
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    want = stack(x, context=context, context_mask=mask)
    spoiled = context.masked_fill(~mask[..., None], 1e4)
    assert torch.equal(stack(x, context=spoiled, context_mask=mask), want)
    changed = context.clone()
    changed[:, 0] += 1
    assert not torch.allclose(stack(x, context=changed, context_mask=mask), want)


def test_context_may_have_another_dim() -> None:
    stack = Stack(DIM, 2, attention=[["full", ("cross", {"context_dim": 5})]], **SMALL)
    assert stack(torch.randn(1, 3, DIM), context=torch.randn(1, 4, 5)).shape == (1, 3, DIM)
    assert isinstance(stack.layers[0].sublayers[1].block, CrossAttention)


HYBRIDS = {
    "full": "full",
    "every block": ["full", ("cosine_sim", {"groups": 3, "kv_heads": 1}), ["full", "cross"]],
    "with a pattern": [("full", {"pattern": torch.ones(64, 64).tril().bool()}), "cosine_sim"],
}


@pytest.mark.parametrize("splits", [pytest.param([11], marks=pytest.mark.slow), [1] * 11, [4, 1, 5, 1]])
@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("residual", ["pre", "post", "sandwich", "deepnorm"])
@pytest.mark.parametrize("grad", [False, True])
def test_steps_equal_the_full_pass(hybrid: str, splits: list[int], residual: str, grad: bool) -> None:
    stack = Stack(DIM, 3, attention=HYBRIDS[hybrid], residual=residual, rotary=Rotary(), **SMALL).double().eval()
    x = torch.randn(2, 11, DIM, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :3] = False
    context = {"context": torch.randn(2, 7, DIM, dtype=torch.float64)} if stack.takes_context else {}
    outs, state, start = [], None, 0
    with torch.set_grad_enabled(grad):
        want = stack(x, mask=mask, **context)
        for count in splits:
            part = slice(start, start + count)
            out, state = stack.step(x[:, part], state, mask=mask[:, part], **context)
            outs.append(out)
            start, context = start + count, {}
    assert state.length == 11
    torch.testing.assert_close(torch.cat(outs, 1)[mask], want[mask], atol=1e-12, rtol=0)


@torch.no_grad()
def test_steps_of_reversible_layers_equal_forward() -> None:
    stack = Stack(DIM, 3, attention=["full", ["cosine_sim", "full"]], reversible=True, **SMALL).double().eval()
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    outs, state = [], None
    for part in x.split([3, 1, 1, 2], dim=1):
        out, state = stack.step(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), stack(x), atol=1e-12, rtol=0)


@torch.no_grad()
def test_sublayer_adds_its_output_to_the_given_stream() -> None:
    sublayer = Stack(DIM, 1, **SMALL).sublayers()[0]
    x, stream = torch.randn(2, 2, 5, DIM)
    want = stream + sublayer.delta(x, BlockInputs())
    torch.testing.assert_close(sublayer(x, BlockInputs(), into=stream), want)
    torch.testing.assert_close(sublayer.step(x, None, BlockInputs(), into=stream)[0], want)


@torch.no_grad()
def test_reordered_state_continues_the_selected_rows() -> None:
    stack = Stack(DIM, 2, attention=["full", ["cosine_sim", "cross"]], rotary=Rotary(), **SMALL).eval()
    x, context = torch.randn(3, 7, DIM), torch.randn(3, 4, DIM)
    index = torch.tensor([2, 0, 0])
    _, state = stack.step(x[:, :5], context=context)
    got, _ = stack.step(x[index, 5:], state.reorder(index))
    torch.testing.assert_close(got, stack(x[index], context=context[index])[:, 5:], atol=1e-5, rtol=0)


BAD = {
    "an unknown block": ({"attention": "fulll"}, ValueError, r"attention must be one of \['full'.*did you mean 'full'"),
    "an unknown block in a layer": ({"attention": [["full", "cosine"]]}, ValueError, r"did you mean 'cosine_sim'"),
    "an unknown option": ({"attention": ("full", {"head": 3})}, ValueError, r"option of 'full' must be.*mean 'heads'"),
    "dim as an option": ({"attention": ("full", {"dim": 3})}, ValueError, r"option of 'full' must be one of"),
    "no block": ({"attention": []}, ValueError, r"attention must name at least one block per layer, got \[\]"),
    "a layer without blocks": ({"attention": [[]]}, ValueError, r"attention must name at least one block per layer"),
    "a number": ({"attention": 3}, TypeError, r"attention must be a block or a list, .* got 3"),
    "a number in a list": ({"attention": ["full", 3]}, TypeError, r"attention must be made of .* got 3"),
    "no dim": ({"dim": 0}, ValueError, r"dim must be at least 1, got dim=0"),
    "a negative depth": ({"depth": -2}, ValueError, r"depth must be at least 1, got depth=-2"),
    "a broken dim": ({"dim": 4.5}, TypeError, r"dim must be an int, got dim=4.5"),
    "no heads": ({"heads": 0}, ValueError, r"heads must be at least 1, got heads=0"),
    "no features": ({"dim_head": 0}, ValueError, r"dim_head must be at least 1, got dim_head=0"),
    "kv_heads": (
        {"attention": ("full", {"kv_heads": 3})},
        ValueError,
        r"kv_heads must divide heads, got kv_heads=3.*8",
    ),
    "groups": ({"attention": ("cosine_sim", {"groups": 5})}, ValueError, r"groups must divide dim_head, got groups=5"),
    "half pairs": (
        {"attention": ("cosine_sim", {"groups": 2, "dim_head": 6}), "rotary": Rotary()},
        ValueError,
        "groups must not split rotary pairs, got groups=2, dim_head=6",
    ),
    "scale": ({"attention": ("cosine_sim", {"scale": 0.0})}, ValueError, r"scale must be positive, got scale=0.0"),
    "pattern": ({"attention": ("full", {"pattern": torch.ones(2, 3).bool()})}, ValueError, "allowed must be square"),
    "pattern dtype": ({"attention": ("full", {"pattern": torch.ones(3, 3)})}, TypeError, "allowed must be a boolean"),
    "attn_dropout": ({"attn_dropout": 1.0}, ValueError, r"attn_dropout must lie in \[0, 1\), got attn_dropout=1.0"),
    "ff_dropout": ({"ff_dropout": -0.5}, ValueError, r"ff_dropout must lie in \[0, 1\), got ff_dropout=-0.5"),
    "ff_dropout of nothing": (
        {"feedforward": None, "ff_dropout": 0.1},
        ValueError,
        r"ff_dropout must be 0 with feedforward=None",
    ),
    "ff_dropout of functions": (
        {"feedforward": [None, GEGLU], "ff_dropout": 0.1},
        ValueError,
        r"ff_dropout must be 0 with feedforward=\[None, <class",
    ),
    "ff_mult": ({"ff_mult": 0}, ValueError, r"mult must give at least one hidden feature"),
    "norm": ({"norm": "batch"}, ValueError, r"norm must be one of \['rms', 'layer'\], got norm='batch'"),
    "norm option": ({"norm": ("rms", {"epsilon": 1})}, ValueError, r"option of 'rms' must be one of \['eps'\], got"),
    "norm epsilon": ({"norm": ("rms", {"eps": 0})}, ValueError, r"eps must be positive, got eps=0"),
    "norm options": ({"norm": ("rms", 1e-6)}, TypeError, r"options_of_norm must be of type Mapping, got float"),
    "norm of a number": ({"norm": 3}, TypeError, r"norm must be of type str, got int"),
    "residual": ({"residual": "prenorm"}, ValueError, r"residual must be one of \['pre', .*got residual='prenorm'"),
    "feedforward": ({"feedforward": "swigl"}, ValueError, r"feedforward must be one of .*did you mean 'swiglu'"),
    "feedforward option": (
        {"feedforward": ("gelu", {"mul": 2})},
        ValueError,
        r"option of 'gelu' .*did you mean 'mult'",
    ),
    "no feedforwards": ({"feedforward": []}, ValueError, r"feedforward must name at least one feedforward, got \[\]"),
    "feedforwards of numbers": ({"feedforward": ["gelu", 3]}, TypeError, r"feedforward must be a name, .* got 3"),
    "feedforward size": ({"feedforward": ("gelu", {"dim_inner": 0})}, ValueError, r"dim_inner must be at least 1"),
    "feedforward of a number": ({"feedforward": 3}, TypeError, r"feedforward must be a name, .* got 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_constructor_arguments_raise(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        Stack(**{"dim": DIM, "depth": 2, **changes})


X = torch.zeros(2, 3, DIM)
BAD_INPUTS = {
    "features": (
        {"x": torch.zeros(2, 3, 5)},
        ValueError,
        r"x must be \(b, n, dim\) with dim=12, got shape \(2, 3, 5\)",
    ),
    "axes": ({"x": torch.zeros(3, DIM)}, ValueError, r"x must be \(b, n, dim\)"),
    "integers": ({"x": X.long()}, TypeError, r"x must be a floating point tensor, got dtype torch.int64"),
    "no tokens": ({"x": X[:, :0]}, ValueError, r"x must hold at least one token, got shape \(2, 0, 12\)"),
    "mask shape": (
        {"mask": torch.ones(2, 4).bool()},
        ValueError,
        r"mask must be \(b, n\) = \(2, 3\), got shape \(2, 4\)",
    ),
    "mask dtype": ({"mask": torch.ones(2, 3)}, TypeError, r"mask must be a boolean tensor.*got dtype torch.float32"),
    "a context nobody reads": ({"context": X}, ValueError, r"context must be None for a stack without"),
    "a mask of no context": ({"context_mask": X.bool()[..., 0]}, ValueError, r"context_mask must come with a context"),
}


@pytest.mark.parametrize("how", ["forward", "step"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_invalid_inputs_raise(case: str, how: str) -> None:
    changes, error, message = BAD_INPUTS[case]
    stack = Stack(DIM, 1, **SMALL)
    with pytest.raises(error, match=message):
        getattr(stack, how)(**{"x": X, **changes})


@pytest.mark.parametrize("how", ["forward", "step"])
def test_missing_or_invalid_context_raises(how: str) -> None:
    stack = Stack(DIM, 1, attention="cross", **SMALL)
    run = getattr(stack, how)
    with pytest.raises(ValueError, match="context must be given"):
        run(X)
    with pytest.raises(ValueError, match=r"context must be \(b, n, dim\) with dim=12, got shape \(2, 4, 5\)"):
        run(X, context=torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="context must have the batch size of x, got 3 and 2"):
        run(X, context=torch.zeros(3, 4, DIM))
    with pytest.raises(ValueError, match=r"context_mask must be \(b, n\) = \(2, 4\), got shape \(2, 5\)"):
        run(X, context=torch.zeros(2, 4, DIM), context_mask=torch.ones(2, 5).bool())


def test_invalid_state_raises() -> None:
    stack, other, wide = (Stack(DIM, depth, **SMALL) for depth in (1, 2, 1))
    _, state = stack.step(X)
    with pytest.raises(TypeError, match="state must be a StackState of 2 blocks, got one of 1 blocks"):
        other.step(X, state)
    with pytest.raises(TypeError, match="state must be a StackState of 1 blocks, got str"):
        stack.step(X, "state")
    with pytest.raises(TypeError, match="state must be a KeyValueState of an earlier step, got CrossAttentionState"):
        stack.step(X, Stack(DIM, 1, attention="cross", **SMALL).step(X, context=X)[1])
    with pytest.raises(
        ValueError, match=r"state must come from this layer and batch: .*\(1, 2, 3, 6\), got .*\(2, 2, 3"
    ):
        wide.step(X[:1], state)


def test_decoding_with_a_block_without_step_raises() -> None:
    stack = Stack(DIM, 2, attention=["full", Mean])
    assert stack(X).shape == X.shape
    with pytest.raises(TypeError, match="every block must have step to decode, but Mean has none"):
        stack.step(X)


@pytest.mark.parametrize("attention", ["full", "talking_heads", ["gate_loop", "full"]])
def test_checkpointed_layers_have_the_same_loss_and_gradients_with_dropout(attention: Any) -> None:
    found = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(
            num_tokens=31, dim=16, depth=3, attention=attention, ff_dropout=0.3, checkpoint_layers=saving
        )
        torch.manual_seed(1)
        loss = model.loss(torch.arange(40).view(2, 20) % 31)
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_checkpointed_layers_save_little_more_than_their_inputs() -> None:
    def kept(*, saving: bool) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        stack = Stack(16, 6, checkpoint_layers=saving)
        weights = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
        x = torch.randn(2, 50, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stack(x)
        return sum(size for place, size in sizes.items() if place not in weights)

    x = 2 * 50 * 16 * 4
    assert kept(saving=True) <= 10 * x
    assert kept(saving=False) >= 50 * x


def test_checkpointing_of_reversible_streams_raises() -> None:
    with pytest.raises(ValueError, match="checkpoint_layers must be False with reversible=True"):
        Stack(16, 2, reversible=True, checkpoint_layers=True)


def test_mask_for_a_block_that_does_not_take_it_raises() -> None:
    stack = Stack(16, 1, attention=lambda dim: nn.Linear(dim, dim))
    with pytest.raises(ValueError, match="mask must be None with Linear, whose forward takes no mask"):
        stack(torch.randn(1, 3, 16), mask=torch.ones(1, 3, dtype=torch.bool))
