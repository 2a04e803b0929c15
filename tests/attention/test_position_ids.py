"""Explicit positions of tokens in layers, stacks and language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import (
    AxialAttention,
    CosineSimAttention,
    CrossAttention,
    FullAttention,
    GateLoopAttention,
    LanguageModel,
    RelativeBias,
    RelativeGateAttention,
    Rotary,
    SimpleGateLoop,
    Stack,
    TalkingHeadsAttention,
    TextImageLayout,
    WindowAttention,
)
from tests.formulas import relative_error

DIM = 16
SMALL: dict[str, Any] = {"heads": 2, "dim_head": 8}
YARN = {"type": "yarn", "factor": 4, "original_max_seq_len": 64}
LAYERS: dict[str, Callable[[], Any]] = {
    "full": lambda: FullAttention(DIM, rotary=Rotary(), **SMALL),
    "full, half-split yarn": lambda: FullAttention(DIM, rotary=Rotary(6, scaling=YARN, pairing="half"), **SMALL),
    "full, bidirectional": lambda: FullAttention(DIM, rotary=Rotary(), causal=False, **SMALL),
    "full, query-key norm": lambda: FullAttention(DIM, rotary=Rotary(), qk_norm="rms", **SMALL),
    "window": lambda: WindowAttention(DIM, window=30, sinks=2, rotary=Rotary(), **SMALL),
    "cosine_sim": lambda: CosineSimAttention(DIM, kv_heads=1, rotary=Rotary(), **SMALL),
    "talking_heads": lambda: TalkingHeadsAttention(DIM, rotary=Rotary(), **SMALL),
    "relative_gate": lambda: RelativeGateAttention(DIM, rotary=Rotary(), **SMALL),
}
IDS = torch.tensor([[0, 1, 4, 5, 9, 12, 13], [3, 4, 5, 6, 7, 8, 20]])


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]().eval()


def with_gaps(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens at the indices `ids` of rows, and the mask that hides the others."""
    rows = torch.randn(x.shape[0], int(ids.max()) + 1, x.shape[-1])
    mask = torch.zeros(rows.shape[:2], dtype=torch.bool).scatter(1, ids, True)
    return rows.scatter(1, ids[..., None].expand_as(x), x), mask


def picked(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.gather(1, ids[..., None].expand(*ids.shape, rows.shape[-1]))


def test_tokens_with_position_ids_attend_as_tokens_at_these_indices(layer: Any) -> None:
    x = torch.randn(2, 7, DIM)
    rows, mask = with_gaps(x, IDS)
    want = picked(layer(rows, mask=mask), IDS)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        torch.testing.assert_close(layer(x, position_ids=IDS.to(dtype)), want, atol=1e-5, rtol=1e-5)
    assert relative_error(layer(x), want) > 1e-3


def test_position_ids_of_indices_change_nothing_and_a_common_offset_little(layer: Any) -> None:
    x = torch.randn(2, 7, DIM)
    index = torch.arange(7).expand(2, 7)
    torch.testing.assert_close(layer(x, position_ids=index), layer(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(x, position_ids=index + 500), layer(x), atol=1e-3, rtol=1e-3)
    assert layer(x, position_ids=index + 10**6).isfinite().all()
    assert all(table[0].shape[0] < 1000 for table in layer.rotary._tables.values())


@pytest.mark.parametrize("splits", [(1,) * 7, (3, 1, 3), (7,)], ids=str)
def test_steps_with_position_ids_equal_the_full_pass(layer: Any, splits: tuple[int, ...]) -> None:
    x, mask = torch.randn(2, 7, DIM), torch.rand(2, 7) < 0.7
    if not layer.causal:
        with pytest.raises(ValueError, match="step needs causal=True"):
            layer.step(x, position_ids=IDS)
        return
    want, outs, state = layer(x, mask=mask, position_ids=IDS), [], None
    for part, ids, valid in zip(x.split(splits, 1), IDS.split(splits, 1), mask.split(splits, 1), strict=True):
        out, state = layer.step(part, state, mask=valid, position_ids=ids)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1)[mask], want[mask], atol=1e-5, rtol=1e-5)


def test_attention_map_with_position_ids_gives_the_output(layer: Any) -> None:
    x = torch.randn(2, 7, DIM)
    values, output = layer.values_and_output(x, position_ids=IDS)
    torch.testing.assert_close(layer.attention_map(x, position_ids=IDS) @ values, output, atol=1e-5, rtol=1e-5)
    assert relative_error(layer.values_and_output(x).output, output) > 1e-3


def test_position_ids_take_the_place_of_the_positions_in_documents(layer: Any) -> None:
    x, documents = torch.randn(2, 7, DIM), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, 7)
    want = torch.cat((layer(x[:, :3], position_ids=IDS[:, :3]), layer(x[:, 3:], position_ids=IDS[:, 3:])), dim=1)
    torch.testing.assert_close(layer(x, document_ids=documents, position_ids=IDS), want, atol=1e-5, rtol=1e-5)


def test_gradients_with_position_ids_equal_those_of_rows_with_gaps(layer: Any) -> None:
    x = torch.randn(2, 7, DIM, requires_grad=True)
    cotangent = torch.randn(2, 7, DIM)
    (got,) = torch.autograd.grad(layer(x, position_ids=IDS), x, cotangent)
    rows, mask = with_gaps(x, IDS)
    (want,) = torch.autograd.grad(picked(layer(rows, mask=mask), IDS), x, cotangent)
    assert relative_error(got, want) < 1e-5


@pytest.mark.slow
def test_layers_with_position_ids_compile_as_one_graph() -> None:
    layer, x = LAYERS["full, half-split yarn"]().eval(), torch.randn(2, 7, DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, position_ids=IDS), layer(x, position_ids=IDS), atol=1e-5, rtol=1e-5)


REFUSING: dict[str, tuple[Callable[[], Any], str]] = {
    "no rotary": (lambda: FullAttention(DIM, **SMALL), "FullAttention, which has no rotary position embedding"),
    "bias": (
        lambda: FullAttention(DIM, rotary=Rotary(), bias=RelativeBias(2), **SMALL),
        "FullAttention, whose bias goes by the distances in the row",
    ),
    "pattern": (
        lambda: FullAttention(DIM, rotary=Rotary(), pattern=torch.ones(9, 9, dtype=torch.bool), **SMALL),
        "FullAttention, whose pattern is tied to the positions in the row",
    ),
    "axial": (
        lambda: AxialAttention(DIM, layout=TextImageLayout(2, 3, 4), rotary=Rotary(), **SMALL),
        "AxialAttention, whose pattern",
    ),
    "talking_heads": (lambda: TalkingHeadsAttention(DIM, **SMALL), "TalkingHeadsAttention, which has no rotary"),
    "relative_gate": (lambda: RelativeGateAttention(DIM, **SMALL), "RelativeGateAttention, which has no rotary"),
    "gate_loop": (lambda: GateLoopAttention(DIM), "GateLoopAttention, which has no rotary"),
    "simple_gate_loop": (lambda: SimpleGateLoop(DIM), "SimpleGateLoop, which has no rotary"),
    "cross": (lambda: CrossAttention(DIM, **SMALL), "CrossAttention, which has no rotary"),
}


@pytest.mark.parametrize("name", REFUSING)
def test_layers_without_rotary_positions_refuse_position_ids(name: str) -> None:
    make, message = REFUSING[name]
    layer, x = make(), torch.randn(2, 7, DIM)
    context = {"context": x} if name == "cross" else {}
    for method in ("forward", "step", "attention_map", "values_and_output"):
        with pytest.raises(ValueError, match=f"position_ids must be None for {message}"):
            getattr(layer, method)(x, position_ids=IDS, **context)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (IDS.float(), TypeError, "position_ids must be an integer tensor, got dtype torch.float32"),
        ([0, 1], TypeError, "position_ids must be an integer tensor, got list"),
        (IDS[:1], ValueError, r"position_ids must be \(b, n\) = \(2, 7\), got shape \(1, 7\)"),
        (torch.arange(7), ValueError, r"position_ids must be \(b, n\) = \(2, 7\), got shape \(7,\)"),
        (IDS.to("meta"), ValueError, "position_ids must be on the device of x, cpu, got meta"),
    ],
)
def test_wrong_position_ids_are_named(ids: Any, error: type[Exception], message: str) -> None:
    layer, x = LAYERS["full"](), torch.randn(2, 7, DIM)
    stack = Stack(DIM, 1, rotary=Rotary(), **SMALL)
    model = LanguageModel(num_tokens=5, dim=DIM, depth=1, **SMALL)
    tokens = torch.randint(0, 5, (2, 7))
    for call in (layer, layer.step, stack, stack.step):
        with pytest.raises(error, match=message):
            call(x, position_ids=ids)
    for call in (model, model.step, model.loss, model.attention_maps):
        with pytest.raises(error, match=message):
            call(tokens, position_ids=ids)


class Foreign(nn.Module):
    """A block of another package with positions of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        self.seen = position_ids
        return self.linear(x)


def test_a_stack_gives_position_ids_to_the_blocks_that_take_them() -> None:
    blocks = ["gate_loop", "full", ("full", {"rotary": None}), Foreign]
    stack = Stack(DIM, 4, attention=blocks, rotary=Rotary(), **SMALL)
    x = torch.randn(2, 7, DIM)
    out = stack(x, position_ids=IDS)
    assert relative_error(stack(x), out) > 1e-3
    foreign = [module for module in stack.modules() if isinstance(module, Foreign)]
    assert foreign[0].seen is None  # the last call had none
    stack(x, position_ids=IDS)
    assert foreign[0].seen is IDS


@pytest.mark.parametrize("blocks", ["gate_loop", "full", ["simple_gate_loop", "full"]], ids=str)
def test_a_stack_without_rotary_positions_refuses_position_ids(blocks: Any) -> None:
    x = torch.randn(2, 7, DIM)
    stack = Stack(DIM, 2, attention=blocks)
    for call in (stack, stack.step, stack.attention_maps):
        with pytest.raises(ValueError, match="position_ids must be None for a stack without blocks that take them"):
            call(x, position_ids=IDS)
    model = LanguageModel(num_tokens=5, dim=DIM, depth=2, attention="full", positions="t5", **SMALL)
    with pytest.raises(ValueError, match="position_ids must be None for a stack"):
        model(torch.randint(0, 5, (2, 7)), position_ids=IDS)


@pytest.mark.parametrize("options", [{"residual": "pre"}, {"reversible": True}, {"checkpoint_layers": True}], ids=str)
def test_stacks_with_position_ids_equal_stacks_over_rows_with_gaps(options: dict[str, Any]) -> None:
    stack = Stack(DIM, 2, rotary=Rotary(), **options, **SMALL)
    x = torch.randn(2, 7, DIM, requires_grad=True)
    rows, mask = with_gaps(x, IDS)
    want = picked(stack(rows, mask=mask), IDS)
    torch.testing.assert_close(stack(x, position_ids=IDS), want, atol=1e-5, rtol=1e-5)
    stack.eval()
    first, state = stack.step(x[:, :4], position_ids=IDS[:, :4])
    second, _ = stack.step(x[:, 4:], state, position_ids=IDS[:, 4:])
    torch.testing.assert_close(torch.cat((first, second), 1), want, atol=1e-5, rtol=1e-5)


POSITIONS: dict[str, dict[str, Any]] = {
    "yarn": {"positions": ("rotary", {"theta": 500.0, "dim": 6, "scaling": YARN})},
    "auto": {"attention": ["full", "cosine_sim"]},
    "learned": {"positions": "learned", "max_seq_len": 30},
    "learned, two blocks": {"positions": "learned", "max_seq_len": 30, "attention": ["full", "talking_heads"]},
}


@pytest.mark.parametrize("name", POSITIONS)
def test_language_models_use_position_ids_in_every_method(name: str) -> None:
    model = LanguageModel(num_tokens=11, dim=DIM, depth=2, **SMALL, **POSITIONS[name]).eval()
    tokens = torch.randint(0, 11, (2, 7))
    ids = IDS - IDS[:, :1]  # learned positions count valid tokens only, and from 0
    rows = torch.zeros(2, int(ids.max()) + 1, dtype=torch.int64).scatter(1, ids, tokens)
    mask = torch.zeros(rows.shape, dtype=torch.bool).scatter(1, ids, True)
    if "learned" in name:  # every position holds a token, but only some are read
        seen = mask[:, None, :] & torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril()
        want = picked(model(rows, attn_mask=seen), ids)
    else:
        want = picked(model(rows, mask=mask), ids)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(model(tokens, position_ids=ids), want, **close)
    assert relative_error(model(tokens), want) > 1e-4
    first, state = model.step(tokens[:, :3], position_ids=ids[:, :3])
    second, _ = model.step(tokens[:, 3:], state, position_ids=ids[:, 3:])
    torch.testing.assert_close(torch.cat((first, second), 1), want, **close)
    loss = nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens, position_ids=ids), loss, **close)
    if "learned" not in name:
        assert relative_error(model.attention_maps(tokens)[0], model.attention_maps(tokens, position_ids=ids)[0]) > 1e-4


def test_position_ids_outside_the_table_of_learned_positions_are_named() -> None:
    model = LanguageModel(num_tokens=11, dim=DIM, depth=1, positions="learned", max_seq_len=9, **SMALL)
    tokens = torch.randint(0, 11, (2, 7))
    for ids in (IDS, IDS[:, :1] - 4 + torch.arange(7)):
        with pytest.raises(ValueError, match=r"position_ids must lie in 0 \.\.\. max_seq_len - 1 = 8, got"):
            model(tokens, position_ids=ids)


def test_left_padded_prompts_generate_as_unpadded_ones_with_scaled_positions() -> None:
    positions = ("rotary", {"scaling": {**YARN, "original_max_seq_len": 20}, "pairing": "half"})
    model = LanguageModel(num_tokens=50, dim=DIM, depth=2, positions=positions, **SMALL).double().eval()
    prompt = torch.randint(0, 50, (1, 9))
    want = model.generate(prompt, 30, temperature=0.0)  # past original_max_seq_len
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), prompt), dim=1)
    mask = torch.arange(14)[None] >= 5
    assert torch.equal(model.generate(padded, 30, temperature=0.0, mask=mask), want)
