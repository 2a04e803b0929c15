"""Composition: any block in any model, the users' own modules, replaced blocks, and refusals at construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

import attention_zoo
from attention_zoo import (
    BLOCKS,
    Encoder,
    FullAttention,
    LanguageModel,
    Memformer,
    MemoryLanguageModel,
    MultiStreamTransformer,
    SimpleGateLoop,
    Stack,
    TalkingHeadsAttention,
    TextImageLayout,
    TextToImageTransformer,
    capabilities,
    register_block,
    replace_block,
)

DIM = 24
SMALL: dict[str, Any] = {"dim": DIM, "depth": 2}
LAYOUT = TextImageLayout(text_len=4, height=2, width=4)
IMAGE = ("conv", "axial_row", "axial_col", "block_sparse")
ALWAYS_CAUSAL = ("gate_loop", "relative_gate", "simple_gate_loop")
SELF_ATTENTION = [name for name in BLOCKS if name != "cross"]


class Mean(nn.Module):
    """A user's causal block: the mean of all tokens so far, times a number and a matrix."""

    def __init__(self, dim: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None]
        return self.alpha * self.linear(x.cumsum(1) / count)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_block("mean", Mean)
    yield
    del BLOCKS["mean"]


def heads(name: str) -> dict[str, int]:
    return {} if name in ("gate_loop", "relative_gate", "simple_gate_loop") else {"heads": 2, "dim_head": 12}


def with_layout(name: str) -> Any:
    return (name, {"layout": LAYOUT}) if name in IMAGE else (name, {"window": 8}) if name == "window" else name


def language_model(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = LanguageModel(num_tokens=11, attention=with_layout(name), **heads(name), **SMALL)
    return model, (tokens(2, 9),)


def memory_model(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    sizes = {"num_tokens": 11, "memory_slots": 3, "segment_len": 9, "memory_heads": 2}
    return MemoryLanguageModel(attention=with_layout(name), **sizes, **heads(name), **SMALL), (tokens(2, 9),)


def multi_stream(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = MultiStreamTransformer(num_tokens=11, attention=[with_layout(name)], **heads(name), **SMALL)
    return model, (tokens(2, 9),)


def memformer(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    sizes = {"enc_num_tokens": 11, "enc_depth": 1, "dec_num_tokens": 11, "dec_depth": 1, "enc_heads": 2, "dec_heads": 2}
    model = Memformer(dim=DIM, memory_slots=3, memory_heads=2, attention=with_layout(name), **sizes)
    return model, (tokens(2, 9), tokens(2, 5))


def text_to_image(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = TextToImageTransformer(
        num_text_tokens=11,
        text_len=3,
        num_image_tokens=11,
        height=2,
        width=4,
        attention=name if name in IMAGE else with_layout(name),  # the model gives the layout
        **heads(name),
        **SMALL,
    )
    return model, (tokens(2, 3), tokens(2, 8))


MODELS: dict[str, Callable[[str], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "LanguageModel": language_model,
    "MemoryLanguageModel": memory_model,
    "MultiStreamTransformer": multi_stream,
    "Memformer": memformer,
    "TextToImageTransformer": text_to_image,
}


def tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def refusal(model: str, block: str) -> str:
    """The message with which a model refuses a block; "" if it takes it."""
    if model == "Memformer" and block in ALWAYS_CAUSAL:
        return "causal=False must be possible for every block"
    return ""


@pytest.mark.parametrize("block", SELF_ATTENTION)
@pytest.mark.parametrize(
    "name",
    ["LanguageModel", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "LanguageModel")],
)
def test_every_block_trains_decodes_and_is_saved_in_every_model_or_is_refused(
    name: str, block: str, tmp_path: Path
) -> None:
    if message := refusal(name, block):
        with pytest.raises(ValueError, match=message):
            MODELS[name](block)
        return
    torch.manual_seed(0)
    model, inputs = MODELS[name](block)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.loss(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    want = logits_of(model, inputs)
    assert torch.allclose(decoded(model, inputs), want, atol=1e-4)
    model.save(tmp_path)
    assert torch.equal(logits_of(type(model).load(tmp_path).eval(), inputs), want)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    out = model(*inputs)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def decoded(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Logits by steps of one token."""
    sequence, state, out = inputs[-1], None, []
    step = model.step
    if isinstance(model, TextToImageTransformer):
        sequence = model.tokens(*inputs)[:, :-1]
    elif isinstance(model, Memformer):
        step = model.read(inputs[0]).step
    for index in range(sequence.shape[1]):
        logits, state = step(sequence[:, index : index + 1], state)
        out.append(logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("block", SELF_ATTENTION)
def test_a_bidirectional_stack_takes_a_block_or_refuses_it(block: str) -> None:
    build = partial(Stack, DIM, 1, attention=with_layout(block), causal=False, **heads(block))
    if block in ALWAYS_CAUSAL:
        with pytest.raises(ValueError, match=f"causal=False must be possible for every block, but '{block}' is causal"):
            build()
        return
    stack = build().eval()
    x = torch.randn(1, 6, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x)[:, 0].square()[..., 0].sum(), x)
    assert gradient[:, -1].abs().max() > 0


# One meaning of every spec.
SPECS: dict[str, Any] = {
    "a name": "full",
    "a name with options": ("full", {"kv_heads": 1}),
    "a class": FullAttention,
    "a class with options": (FullAttention, {"kv_heads": 1}),
    "a partial": partial(FullAttention, kv_heads=1),
    "a function": lambda dim: FullAttention(dim, heads=2),
    "modules": [FullAttention(DIM, heads=2), Mean(DIM)],
    "a user's name": ("mean", {"alpha": 0.1}),
    "a user's class with options": (Mean, {"alpha": 0.1}),
    "all of them": ["full", (Mean, {"alpha": 0.1}), lambda dim: SimpleGateLoop(dim)],
    "two blocks a layer": [["full", Mean], "gate_loop"],
}
COMPOSED: dict[str, Callable[..., nn.Module]] = {
    "LanguageModel": partial(LanguageModel, num_tokens=11, **SMALL),
    "MemoryLanguageModel": partial(MemoryLanguageModel, num_tokens=11, memory_slots=3, segment_len=9, **SMALL),
    "MultiStreamTransformer": partial(MultiStreamTransformer, num_tokens=11, **SMALL),
    "TextToImageTransformer": partial(
        TextToImageTransformer, num_text_tokens=11, text_len=3, num_image_tokens=11, height=2, width=4, **SMALL
    ),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", COMPOSED)
def test_a_spec_means_the_same_in_every_model_and_survives_saving(name: str, spec: str, tmp_path: Path) -> None:
    attention = SPECS[spec]
    model = COMPOSED[name](attention=attention).eval()
    blocks = [sub.attention for sub in model.stack.sublayers() if sub.attention is not None]
    plain = Stack(DIM, 2, attention=attention if spec != "modules" else [FullAttention, Mean])
    want = [type(sub.attention) for sub in plain.sublayers() if sub.attention is not None]
    assert [type(block) for block in blocks if type(block).__name__ != "CrossAttention"] == want
    inputs = (tokens(2, 3), tokens(2, 8)) if name == "TextToImageTransformer" else (tokens(2, 8),)
    model.save(tmp_path)
    assert torch.equal(logits_of(type(model).load(tmp_path).eval(), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("attention", ["talking_heads", ["talking_heads"], TalkingHeadsAttention, [["talking_heads"]]])
def test_talking_heads_mix_all_streams_however_they_are_named(attention: Any) -> None:
    model = MultiStreamTransformer(num_tokens=11, streams=2, attention=attention, pre_softmax="mlp", **SMALL)
    blocks = [sub.attention for sub in model.stack.sublayers() if sub.attention is not None]
    assert [(block.streams, block.pre_softmax.kind) for block in blocks] == [(2, "mlp")] * 2


class Wide(nn.Linear):
    """A block with an output of another shape."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim)


class Pair(Mean):
    """A block that returns a pair."""

    def forward(self, x: Tensor) -> Any:
        return x, None


class NoModule:
    """A class that is no module."""

    def __init__(self, dim: int) -> None: ...


ONE = FullAttention(DIM)
LEAK = "must be causal in a causal model"
BAD_SPECS: dict[str, tuple[Any, type[Exception], str]] = {
    "a module twice": ([ONE, ONE], ValueError, "must hold a module once, got the same FullAttention twice"),
    "too few modules": ([ONE], ValueError, "one layer per layer of the stack if it holds modules.* got 1 for depth=2"),
    "one module": (ONE, ValueError, "one layer per layer of the stack"),
    "a module of another dim": ([FullAttention(8), Mean(DIM)], ValueError, "the dim of the stack, 24, got dim=8"),
    "a module with options": ((ONE, {"heads": 2}), TypeError, "options for a class or a name only"),
    "a module without forward": (nn.ModuleList([ONE]), TypeError, r"modules with forward\(x\), got ModuleList"),
    "a class that is no module": (NoModule, TypeError, "subclasses of nn.Module, got the class NoModule"),
    "an output of another shape": (Wide, ValueError, r"keep the shape of its input, .* got \(1, 2, 48\)"),
    "an output that is no tensor": (Pair, TypeError, "must return a tensor, got tuple"),
    "a function that returns None": (lambda dim: None, TypeError, "must return an nn.Module, got NoneType"),
    "an unknown name": ("fool", ValueError, "attention must be one of"),
    "an unknown option": (("full", {"head": 2}), ValueError, "option of 'full' must be one of .* did you mean 'heads'"),
    "an unknown option of a class": ((Mean, {"alfa": 1.0}), ValueError, "did you mean 'alpha'"),
    "a missing layout": ("conv", ValueError, r"'conv' must be given layout, such as \('conv', \{'layout'"),
    "a context": ([["full", "cross"]], ValueError, "attention must not read a context"),
    "an empty list": ([], ValueError, "at least one block per layer"),
    "a number": (3, TypeError, "attention must be a block or a list"),
    "several streams": (("talking_heads", {"streams": 2}), ValueError, "the streams of the model, 1, got streams=2"),
    "a bidirectional name": (("full", {"causal": False}), ValueError, LEAK),
    "a reversed gate loop": (("simple_gate_loop", {"reverse": True}), ValueError, LEAK),
    "a bidirectional function": (lambda dim: FullAttention(dim, causal=False), ValueError, LEAK),
    "a bidirectional partial": (partial(FullAttention, causal=False), ValueError, LEAK),
    "a bidirectional module": ([FullAttention(DIM, causal=False), ONE], ValueError, LEAK),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_specs_raise_at_construction(case: str) -> None:
    attention, error, message = BAD_SPECS[case]
    with pytest.raises(error, match=message):
        LanguageModel(num_tokens=11, attention=attention, **SMALL)


@pytest.mark.parametrize("causal", [False, None, 0, ""])
def test_a_users_block_that_says_it_is_not_causal_is_refused(causal: Any) -> None:
    block = Mean(DIM)
    block.causal = causal
    with pytest.raises(ValueError, match=LEAK):
        LanguageModel(num_tokens=11, attention=[block, "full"], **SMALL)
    with pytest.raises(ValueError, match=LEAK):
        MultiStreamTransformer(num_tokens=11, attention=[block, "full"], **SMALL)


def test_a_users_block_that_does_not_say_is_taken() -> None:
    LanguageModel(num_tokens=11, attention=[Mean(DIM), "full"], **SMALL)


@pytest.mark.parametrize(
    "options", [{"pre_softmax": "nonsense"}, {"post_softmax": None}, {"scale": 1.0}, {"cross_stream": False}]
)
def test_arguments_that_no_block_uses_raise(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be taken by"):
        MultiStreamTransformer(num_tokens=11, attention="full", **options, **SMALL)


def test_capabilities_tell_that_a_reversed_gate_loop_is_possible() -> None:
    assert capabilities()["simple_gate_loop"].causal == "optional"
    assert capabilities()["gate_loop"].causal == "optional"
    assert capabilities()["relative_gate"].causal == "always"


def test_capabilities_include_registered_blocks() -> None:
    assert not capabilities()["mean"].step


# A stack of the user's own.
def test_a_language_model_takes_a_stack(tmp_path: Path) -> None:
    stack = Stack(DIM, 2, attention=["full", Mean], layer_scale=True, reversible=True)
    model = LanguageModel(num_tokens=11, stack=stack).eval()
    assert model.stack is stack
    model.save(tmp_path)
    loaded = LanguageModel.load(tmp_path).eval()
    assert torch.equal(loaded(tokens(2, 9)), model(tokens(2, 9)))
    replace_block(loaded, 1, "gate_loop")
    loaded.save(tmp_path)
    again = LanguageModel.load(tmp_path).eval()
    assert type(again.stack.layers[1].sublayers[0].block).__name__ == "GateLoopAttention"
    assert torch.equal(loaded(tokens(2, 9)), again(tokens(2, 9)))


BAD_STACKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dim": ({"dim": 24}, ValueError, "dim must be given to the stack, not beside it, got dim=24"),
    "attention": ({"attention": "conv"}, ValueError, "attention must be given to the stack"),
    "positions": ({"positions": "t5"}, ValueError, "positions must be given to the stack"),
    "a bidirectional stack": ({"stack": Stack(DIM, 1, causal=False)}, ValueError, "stack must be causal"),
    "no stack": ({"stack": FullAttention(DIM)}, TypeError, "stack must be a Stack, got FullAttention"),
    "a context": ({"stack": Stack(DIM, 1, attention="cross")}, ValueError, "must not read a context"),
    "neither": ({"stack": None}, ValueError, "dim and depth must be given without a stack"),
}


@pytest.mark.parametrize("case", BAD_STACKS)
def test_arguments_beside_a_stack_raise(case: str) -> None:
    options, error, message = BAD_STACKS[case]
    with pytest.raises(error, match=message):
        LanguageModel(**{"num_tokens": 11, "stack": Stack(DIM, 1), **options})


# Registration.
BAD_REGISTRATIONS: list[tuple[Any, Any, type[Exception]]] = [
    ("full", Mean, ValueError),
    ("", Mean, TypeError),
    (3, Mean, TypeError),
    ("new", NoModule, TypeError),
    ("new", lambda dim: Mean(dim), TypeError),
]


@pytest.mark.parametrize(("name", "cls", "error"), BAD_REGISTRATIONS)
def test_bad_registrations_raise(name: Any, cls: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"name must|cls must"):
        register_block(name, cls)
    assert set(BLOCKS) == {*SELF_ATTENTION, "cross", "mean"}


def test_a_class_can_be_registered_again_under_its_name() -> None:
    register_block("mean", Mean)


def test_a_module_whose_arguments_are_not_attributes_names_the_argument(tmp_path: Path) -> None:
    class Closed(Mean):
        def __init__(self, dim: int, beta: float) -> None:
            super().__init__(dim, alpha=beta)

    register_block("closed", Closed)
    model = LanguageModel(num_tokens=11, attention=[Closed(DIM, 0.5), "full"], **SMALL)
    with pytest.raises(TypeError, match="Closed must keep its argument beta as an attribute to be saved"):
        model.save(tmp_path)
    LanguageModel(num_tokens=11, attention=("closed", {"beta": 0.5}), **SMALL).save(tmp_path)
    LanguageModel.load(tmp_path)
    del BLOCKS["closed"]


# Replaced blocks.
@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("spec", [("gate_loop", {"heads": 4}), (Mean, {"alpha": 0.2}), FullAttention(DIM, heads=3)])
def test_a_replaced_block_is_in_the_configuration_and_the_next_save(name: str, spec: Any, tmp_path: Path) -> None:
    model = COMPOSED[name](attention="full").double().eval()
    inputs = (tokens(2, 3), tokens(2, 8)) if name == "TextToImageTransformer" else (tokens(2, 8),)
    spec = FullAttention(DIM, heads=3) if isinstance(spec, nn.Module) else spec
    replace_block(model, layer=1, spec=spec)
    first, second = model.arguments["attention"]
    assert (first, second) == ("full", spec)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    model.save(tmp_path)
    assert torch.equal(logits_of(type(model).load(tmp_path).eval(), inputs), logits_of(model, inputs))
    if not isinstance(spec, nn.Module):
        again = type(model)(**model.arguments)
        assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]


QKV_AND_OUT = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"}


def test_a_replaced_block_gets_the_positions_of_the_model() -> None:
    model = LanguageModel(num_tokens=11, attention="gate_loop", **SMALL)
    replace_block(model, 0, "full")
    assert model.stack.layers[0].sublayers[0].block.rotary is not None


@pytest.mark.parametrize(
    ("old", "new", "copied"),
    [
        ("full", "cosine_sim", QKV_AND_OUT),
        ("full", ("full", {"kv_heads": 1}), {"to_q.weight", "to_out.weight"}),
        (
            ("full", {"heads": 2, "dim_head": 12}),
            "gate_loop",
            {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"},
        ),
        ("full", ("gate_loop", {"heads": 8, "dim_inner": 512, "sub_norm": True}), QKV_AND_OUT),
        ("full", ("window", {"window": 3, "sinks": 1}), QKV_AND_OUT),
        ("full", "simple_gate_loop", set()),
    ],
)
def test_init_copies_the_projections_that_fit(old: Any, new: Any, copied: set[str]) -> None:
    model = LanguageModel(num_tokens=11, attention=old, **SMALL)
    before = model.stack.layers[1].sublayers[0].block
    result = replace_block(model, 1, new, init="copy")
    assert set(result.copied) == copied
    after = model.stack.layers[1].sublayers[0].block
    assert not set(result.copied) & set(result.new)
    if "to_q.weight" in copied:
        queries = [getattr(b, "to_q", None) for b in (before, after)]
        weights = [b.to_qkv.part("q") if q is None else q.weight for q, b in zip(queries, (before, after), strict=True)]
        assert torch.equal(*weights)
    assert replace_block(model, 1, new).copied == []


def test_init_copies_no_norm_of_another_kind() -> None:
    options = {"num_tokens": 11, "dim": 16, "depth": 1, "heads": 8, "dim_head": 8}
    model = LanguageModel(**options, attention=("full", {"qk_norm": "rms"}))
    result = replace_block(model, 0, ("full", {"qk_norm": "l2"}), init="copy")
    assert "q_norm.weight" in result.new
    assert torch.allclose(model.stack.layers[0].sublayers[0].block.q_norm.weight, torch.tensor(8**0.5))


def test_a_window_over_all_tokens_with_copied_projections_keeps_the_outputs() -> None:
    model = LanguageModel(num_tokens=11, attention="full", **SMALL).eval()
    before = model(tokens(2, 9))
    for layer in range(2):
        assert replace_block(model, layer, ("window", {"window": 9}), init="copy").new == []
    torch.testing.assert_close(model(tokens(2, 9)), before)


def test_the_stacks_of_a_memformer_are_edited_one_by_one(tmp_path: Path) -> None:
    model = Memformer(dim=DIM, memory_slots=3, enc_num_tokens=11, enc_depth=2, dec_num_tokens=11, dec_depth=2)
    replace_block(model.decoder, 1, "gate_loop")
    assert model.arguments["attention"] == "full"
    assert model.arguments["dec_attention"] == ["full", "gate_loop"]
    model.eval().save(tmp_path)
    inputs = tokens(2, 9), tokens(2, 5)
    assert torch.equal(logits_of(Memformer.load(tmp_path).eval(), inputs), logits_of(model, inputs))
    with pytest.raises(TypeError, match=r"pass model\.encoder or model\.decoder"):
        replace_block(model, 1, "gate_loop")
    with pytest.raises(ValueError, match="sublayer must be below 1, got sublayer=1"):
        replace_block(model.decoder, 1, "cross", sublayer=1)


BAD_REPLACEMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a layer out of range": ({"layer": 2}, ValueError, "layer must be below 2, got layer=2"),
    "a negative layer": ({"layer": -1}, ValueError, "layer must be at least 0"),
    "a layer that is no int": ({"layer": 1.0}, TypeError, "layer must be an int"),
    "a sublayer out of range": ({"sublayer": 1}, ValueError, "sublayer must be below 1"),
    "another init": ({"init": "clone"}, ValueError, "init must be one of"),
    "a module with init": ({"spec": FullAttention(DIM), "init": "copy"}, ValueError, "init must be None for a module"),
    "a bidirectional block": ({"spec": ("full", {"causal": False})}, ValueError, LEAK),
    "a context": ({"spec": "cross"}, ValueError, "spec must read a context exactly if the old block does"),
    "no stack": ({"model": nn.Linear(2, 2)}, TypeError, "model must be a Stack or have one"),
}


@pytest.mark.parametrize("case", BAD_REPLACEMENTS)
def test_bad_replacements_raise_and_change_nothing(case: str) -> None:
    options, error, message = BAD_REPLACEMENTS[case]
    model = LanguageModel(num_tokens=11, **SMALL)
    before = list(model.modules())
    with pytest.raises(error, match=message):
        replace_block(**{"model": model, "layer": 1, "spec": "gate_loop", **options})
    assert list(map(id, model.modules())) == list(map(id, before))
    assert model.arguments["attention"] == "full"


def test_a_block_of_the_model_is_not_used_twice() -> None:
    model = LanguageModel(num_tokens=11, **SMALL)
    with pytest.raises(ValueError, match="must not be a block of the model already"):
        replace_block(model, 1, model.stack.layers[0].sublayers[0].block)


def test_a_block_with_shared_weights_is_not_replaced() -> None:
    stack = Stack(DIM, 2, shared_attn_ids=[0, 0])
    with pytest.raises(ValueError, match="must not share its block with another layer"):
        replace_block(stack, 1, "gate_loop")


# Methods of models.
def test_a_model_generates_as_the_function_does() -> None:
    model = LanguageModel(num_tokens=11, **SMALL)
    prompt = tokens(2, 3)
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    want = attention_zoo.generate(model, prompt, 6, temperature=0.8, generator=one)
    assert torch.equal(model.generate(prompt, 6, temperature=0.8, generator=other), want)


def test_attention_maps_have_one_map_per_layer_of_any_mixture() -> None:
    model = LanguageModel(num_tokens=11, attention=["gate_loop", "full", ["talking_heads", "full"]], dim=DIM, depth=3)
    maps = model.eval().attention_maps(tokens(2, 7))
    assert [tuple(one.shape) for one in maps] == [(2, DIM, 7, 7), (2, 8, 7, 7), (2, 8, 7, 7)]
    x = model.token_embedding(tokens(2, 7))
    first = model.stack.layers[0].sublayers[0]
    assert torch.equal(maps[0], first.block.attention_map(first.residual.branch(x)))


def test_attention_maps_name_a_block_that_has_none() -> None:
    model = LanguageModel(num_tokens=11, attention=["full", Mean], **SMALL)
    with pytest.raises(TypeError, match="every block must have attention_map, but Mean has none"):
        model.attention_maps(tokens(2, 7))


@pytest.mark.parametrize("name", ["MultiStreamTransformer", "TextToImageTransformer"])
def test_attention_maps_of_wrapped_blocks(name: str) -> None:
    model = COMPOSED[name](attention=["talking_heads", "full"]).eval()
    inputs = (tokens(2, 3), tokens(2, 7)) if name == "TextToImageTransformer" else (tokens(2, 7),)
    n = 11 if name == "TextToImageTransformer" else 7
    maps = model.attention_maps(*inputs)
    assert [one[..., -1, :].sum(-1).isfinite().all().item() for one in maps] == [True, True]
    assert [one.shape[-1] for one in maps] == [n, n]


def test_embeddings_take_the_place_of_tokens() -> None:
    model = LanguageModel(num_tokens=11, positions="learned", max_seq_len=20, **SMALL).eval()
    embeddings = model.token_embedding(tokens(2, 7))
    assert torch.equal(model(inputs_embeds=embeddings), model(tokens(2, 7)))
    first, state = model.step(inputs_embeds=embeddings[:, :4])
    second, _ = model.step(tokens(2, 7)[:, 4:], state)
    assert torch.allclose(torch.cat((first, second), dim=1), model(tokens(2, 7)), atol=1e-5)
    for given in ({}, {"tokens": tokens(2, 7), "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="tokens must be given if and only if inputs_embeds is not"):
            model(**given)
    with pytest.raises(ValueError, match=r"inputs_embeds must be \(b, n, dim\) with dim=24"):
        model(inputs_embeds=torch.zeros(2, 7, 5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32])
@pytest.mark.parametrize("name", [*COMPOSED, "Memformer"])
def test_token_ids_may_have_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    model, inputs = memformer("full") if name == "Memformer" else (COMPOSED[name](), (tokens(2, 8),))
    if name == "TextToImageTransformer":
        inputs = (tokens(2, 3), tokens(2, 8))
    model.eval()
    small = tuple(part.to(dtype) for part in inputs)
    assert torch.equal(logits_of(model, small), logits_of(model, inputs))
    assert torch.equal(decoded(model, small), decoded(model, inputs))
    assert torch.equal(model.loss(*small), model.loss(*inputs))


def test_a_state_of_another_batch_size_is_refused_by_a_multi_stream_model() -> None:
    model = COMPOSED["MultiStreamTransformer"]().eval()
    _, state = model.step(tokens(2, 3))
    with pytest.raises(ValueError, match="state must have the batch size of tokens, 1, got 2"):
        model.step(tokens(1, 1), state)


class Hidden(Mean):
    """A block that keeps no argument under its name, and takes more than it names."""

    def __init__(self, dim: int, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(dim, 1.0)
        self.f = lambda x: x * alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.f(super().forward(x))


class Scaled(FullAttention):
    def __init__(self, *args: Any, factor: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.factor = factor

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        return self.factor * super().forward(x, **inputs)


@pytest.mark.parametrize(
    ("cls", "spec"),
    [
        (Hidden, Hidden),
        (Hidden, (Hidden, {"alpha": 3.0})),
        (Hidden, lambda dim: Hidden(dim)),
        (Scaled, Scaled),
        (Scaled, (Scaled, {"factor": 3.0, "heads": 2})),
        (Scaled, lambda dim: Scaled(dim, factor=3.0, heads=2)),
    ],
)
def test_a_block_with_keyword_arguments_is_saved_with_its_options(
    cls: type[nn.Module], spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "own", cls)
    model = LanguageModel(num_tokens=11, attention=spec, **SMALL).eval()
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path).eval()(tokens(2, 9)), model(tokens(2, 9)))


def test_a_module_with_hidden_arguments_is_not_saved_as_another_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "hidden", Hidden)
    model = LanguageModel(num_tokens=11, attention=[Hidden(DIM), Hidden(DIM, 3.0)], **SMALL)
    with pytest.raises(ValueError, match=r"layers\.1\.sublayers\.0\.block, a Hidden, has another output"):
        model.save(tmp_path)


class Private(Mean):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._window = 2


def test_a_changed_private_number_of_a_users_block_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "private", Private)
    model = LanguageModel(num_tokens=11, attention="private", **SMALL)
    model.stack.sublayers()[0].block._window = 4
    with pytest.raises(ValueError, match="_window is 4, configured is 2"):
        model.save(tmp_path)


@pytest.mark.parametrize("block", [nn.MultiheadAttention(DIM, 2), nn.Linear(5, DIM)])
def test_a_module_that_does_not_take_the_features_alone_is_refused(block: nn.Module) -> None:
    with pytest.raises((TypeError, ValueError), match=r"must need no input besides|must accept features"):
        LanguageModel(num_tokens=11, attention=[block, "full"], **SMALL)


@pytest.mark.parametrize(
    "attention", ["full", [TalkingHeadsAttention(DIM, streams=2), TalkingHeadsAttention(DIM, streams=2)]]
)
def test_talking_heads_mix_all_streams_as_modules_and_replacements(attention: Any, tmp_path: Path) -> None:
    model = MultiStreamTransformer(num_tokens=11, attention=attention, **SMALL).eval()
    replace_block(model, 0, "talking_heads")
    assert model.stack.sublayers()[0].attention.streams == 2
    model.save(tmp_path)
    assert torch.equal(MultiStreamTransformer.load(tmp_path).eval()(tokens(2, 9)), model(tokens(2, 9)))


def test_a_multi_stream_model_gives_cosine_sim_its_own_scale() -> None:
    model = MultiStreamTransformer(num_tokens=11, attention=["cosine_sim", "talking_heads"], **SMALL)
    assert model(tokens(2, 9)).shape == (2, 9, 11)


@pytest.mark.parametrize("shared", [{"heads": 2}, {"positions": "t5"}, {"positions": "rotary"}, {"attn_dropout": 0.1}])
def test_a_shared_argument_that_no_block_takes_after_a_replacement_is_not_saved(shared: Any, tmp_path: Path) -> None:
    model = LanguageModel(num_tokens=11, attention="full", **shared, **SMALL).eval()
    for layer in range(2):
        replace_block(model, layer, "mean")
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path).eval()(tokens(2, 9)), model(tokens(2, 9)))


def test_a_subclass_may_pass_on_all_arguments(tmp_path: Path) -> None:
    class Own(LanguageModel):
        def __init__(self, *args: Any, extra: int = 3, **options: Any) -> None:
            super().__init__(*args, **options)
            self.head = nn.Linear(extra, extra)

    model = deepcopy(Own(num_tokens=11, extra=5, **SMALL)).eval()
    replace_block(model, 0, "mean")
    model.save(tmp_path)
    assert torch.equal(Own.load(tmp_path).eval()(tokens(2, 9)), model(tokens(2, 9)))


def test_a_stack_shares_another_packages_rotary_embedding_and_saves_it(tmp_path: Path) -> None:
    stack = Stack(DIM, 2, rotary=RotaryEmbedding(8, theta=99.0), heads=2, dim_head=12)
    blocks = [sub.attention for sub in stack.sublayers() if sub.attention is not None]
    assert blocks[0].rotary is blocks[1].rotary
    model = LanguageModel(num_tokens=11, stack=stack).eval()
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path).eval()(tokens(2, 8)), model(tokens(2, 8)))


def test_a_prefix_is_bidirectional_with_an_attention_mask() -> None:
    stack = Stack(DIM, 2, causal=False, heads=2, dim_head=12).eval()
    x = torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(0))
    prefix = torch.ones(7, 7, dtype=torch.bool).tril()
    prefix[:, :3] = True
    changed = x.clone()
    changed[:, 5:] += 1
    out, other = stack(x, attn_mask=prefix), stack(changed, attn_mask=prefix)
    assert torch.equal(out[:, :5], other[:, :5])
    changed = x.clone()
    changed[:, 2] *= -1
    assert not torch.allclose(out[:, 0], stack(changed, attn_mask=prefix)[:, 0])
    with pytest.raises(ValueError, match="attn_mask must be None"):
        Stack(DIM, 2, attention=["full", "gate_loop"])(x, attn_mask=prefix)
    with pytest.raises(ValueError, match="attn_mask must be None with Mean, whose forward takes no attn_mask"):
        Stack(DIM, 2, attention=["full", Mean])(x, attn_mask=prefix)


def test_a_tree_of_drafts_is_decoded_in_one_step() -> None:
    model = LanguageModel(num_tokens=11, positions=None, **SMALL).eval()
    prompt, drafts = tokens(1, 4), tokens(1, 2, seed=6)
    _, state = model.step(prompt)
    rows = torch.ones(2, 6, dtype=torch.bool)
    rows[1, 4] = False  # the second draft does not see the first
    both, _ = model.step(drafts, state, attn_mask=rows)
    for index in range(2):
        alone, _ = model.step(drafts[:, index : index + 1], state)
        torch.testing.assert_close(both[:, index], alone[:, 0], atol=1e-5, rtol=1e-5)


def test_a_model_with_logits_on_the_meta_device_raises() -> None:
    model = LanguageModel(num_tokens=11, **SMALL)
    model.to_logits.to("meta")
    with pytest.raises(RuntimeError, match="Linear must have its parameters loaded, got some on the meta device"):
        model(tokens(1, 4))


@pytest.mark.parametrize("name", ["gate_loop", "simple_gate_loop"])
def test_recurrences_in_both_directions_make_a_bidirectional_encoder(name: str, tmp_path: Path) -> None:
    both = [name, (name, {"reverse": True})]
    for attention in (both, [both]):
        torch.manual_seed(0)
        model = Encoder(num_tokens=11, dim=DIM, depth=2, attention=attention, positions=None, pooling=None).eval()
        ids = torch.arange(1, 10)[None]
        with torch.no_grad():
            out = model(ids)
            for changed in (0, 8):
                other = ids.clone()
                other[0, changed] = 0
                moved = (model(other) - out).abs().amax(-1)[0]
                assert bool((moved > 1e-6).all()), f"token {changed} reaches every output"
            model.save(tmp_path / "model")
            assert torch.equal(Encoder.load(tmp_path / "model").eval()(ids), out)
    message = f"causal=False must be possible for every block, but '{name}' is causal"
    with pytest.raises(ValueError, match=message):
        Encoder(num_tokens=11, dim=DIM, depth=2, attention=name, positions=None)
    model = Encoder(num_tokens=11, dim=DIM, depth=1, attention=[both], positions=None, pooling=None).eval()
    with torch.no_grad():
        out = model(ids)
    with pytest.raises(ValueError, match=message):
        replace_block(model, layer=0, spec="full", sublayer=1)
    with torch.no_grad():
        assert torch.equal(model(ids), out)
    with pytest.raises(ValueError, match="must be causal in a causal model"):
        Stack(DIM, 2, attention=both)
