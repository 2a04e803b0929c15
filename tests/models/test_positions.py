"""The argument `positions` of models: names with options, saving, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo import (
    ALiBi,
    Encoder,
    EncoderDecoder,
    FullAttention,
    LanguageModel,
    MemoryLanguageModel,
    RelativeBias,
    Rotary,
    Stack,
    TextImageRotary,
    TextToImageTransformer,
    replace_block,
)

SIZES: dict[str, Any] = {"dim": 16, "heads": 2, "dim_head": 8}
YARN = {"type": "yarn", "factor": 4, "original_max_seq_len": 64}
ROTARY = {"theta": 5e5, "dim": 6, "scaling": YARN, "pairing": "half"}
MODELS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "LanguageModel": (lambda **o: LanguageModel(num_tokens=9, depth=2, **SIZES, **o), ("tokens",)),
    "Encoder": (lambda **o: Encoder(num_tokens=9, depth=2, pooling=None, **SIZES, **o), ("tokens",)),
    "EncoderDecoder": (
        lambda **o: EncoderDecoder(num_tokens=9, enc_depth=1, dec_depth=2, **SIZES, **o),
        ("tokens", "tokens"),
    ),
    "MemoryLanguageModel": (
        lambda **o: MemoryLanguageModel(
            num_tokens=9, depth=2, memory_slots=2, segment_len=20, memory_heads=2, **SIZES, **o
        ),
        ("tokens",),
    ),
}
TOKENS = torch.arange(14).view(2, 7) % 9


def output(model: Any, inputs: tuple[Any, ...]) -> torch.Tensor:
    out = model.eval()(*(TOKENS for _ in inputs))
    return getattr(out, "logits", out)


def parts(model: torch.nn.Module, kind: type) -> list[Any]:
    """The parts of a class, one per layer that has one."""
    return [part for module in model.modules() for part in module.children() if type(part) is kind]


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_options_of_rotary_positions_to_their_blocks(name: str) -> None:
    make, inputs = MODELS[name]
    model, plain = make(positions=("rotary", ROTARY)), make(positions="rotary")
    assert parts(model, Rotary)
    for part in parts(model, Rotary):
        assert part.arguments == {**ROTARY, "freqs": None, "xpos": False, "xpos_scale_base": 512.0}
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(output(plain, inputs), output(model, inputs), atol=1e-4)
    for block in model.modules():
        if isinstance(block, FullAttention):
            block.rotary = Rotary(**ROTARY)
            block.rotary.prepare(8)
    changed = output(model, inputs)
    torch.testing.assert_close(changed, output(make_like(make, model, ("auto", ROTARY)), inputs), atol=1e-6, rtol=0)


def make_like(make: Callable[..., Any], model: Any, positions: Any) -> Any:
    other = make(positions=positions)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "positions",
    [("rotary", ROTARY), ["t5", {"buckets": 8, "max_distance": 9}], ("alibi", {})],
    ids=["rotary", "t5", "alibi"],
)
def test_positions_with_options_survive_saving_and_loading(name: str, positions: Any, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    model = make(positions=positions)
    model.save(tmp_path / "model.safetensors")
    loaded = type(model).load(tmp_path / "model.safetensors")
    assert list(loaded.arguments["positions"]) == list(positions)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    loaded.save(tmp_path / "again.safetensors")
    assert torch.equal(output(type(model).load(tmp_path / "again.safetensors"), inputs), output(model, inputs))


@pytest.mark.parametrize("name", ["LanguageModel", "MemoryLanguageModel"])
def test_models_with_xpos_survive_saving_and_bidirectional_models_refuse_it(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    model = make(positions=("rotary", {"xpos": True, "xpos_scale_base": 5.0}))
    plain = make_like(make, model, "rotary")
    assert not torch.allclose(output(plain, inputs), output(model, inputs), atol=1e-4)
    model.save(tmp_path / "model.safetensors")
    loaded = type(model).load(tmp_path / "model.safetensors")
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    for other in ("Encoder", "EncoderDecoder"):
        with pytest.raises(ValueError, match=r"rotary\.xpos must be False with causal=False"):
            MODELS[other][0](positions=("rotary", {"xpos": True}))


def test_a_stack_with_scaled_rotary_positions_survives_saving_within_a_model(tmp_path: Path) -> None:
    stack = Stack(16, 2, heads=2, dim_head=8, rotary=Rotary(**ROTARY), attention=["full", "gate_loop"])
    model = LanguageModel(num_tokens=9, stack=stack)
    model.save(tmp_path / "model.safetensors")
    loaded = LanguageModel.load(tmp_path / "model.safetensors")
    assert torch.equal(output(loaded, ("tokens",)), output(model, ("tokens",)))


def test_t5_options_reach_the_relative_bias() -> None:
    model = LanguageModel(num_tokens=9, depth=2, positions=("t5", {"buckets": 8, "max_distance": 50}), **SIZES)
    (bias,) = {id(part): part for part in parts(model, RelativeBias)}.values()
    assert bias.arguments == {"heads": 2, "buckets": 8, "max_distance": 50, "causal": True}
    encoder = Encoder(num_tokens=9, depth=1, positions=("t5", {"buckets": 8}), **SIZES)
    assert parts(encoder, RelativeBias)[0].arguments["causal"] is False


def test_alibi_gives_all_blocks_one_bias_with_the_heads_of_the_model() -> None:
    model = LanguageModel(num_tokens=9, depth=2, positions="alibi", attention=["full", "cosine_sim"], **SIZES)
    (bias,) = {id(part): part for part in parts(model, ALiBi)}.values()
    assert bias.heads == 2
    with pytest.raises(ValueError, match="options of positions 'alibi' must be one of"):
        LanguageModel(num_tokens=9, depth=2, positions=("alibi", {"heads": 4}), **SIZES)


def test_text_to_image_models_take_the_base_of_text_positions(tmp_path: Path) -> None:
    sizes = {"num_text_tokens": 5, "text_len": 3, "num_image_tokens": 7, "height": 2, "width": 3, "depth": 2}
    model = TextToImageTransformer(positions=("rotary", {"theta": 77.0}), **sizes, **SIZES)
    assert {part.theta for part in parts(model, TextImageRotary)} == {77.0}
    model.save(tmp_path / "model.safetensors")
    loaded = TextToImageTransformer.load(tmp_path / "model.safetensors")
    assert {part.theta for part in parts(loaded, TextImageRotary)} == {77.0}
    for wrong, message in (
        (None, "positions must be one of"),
        ("t5", "positions must be one of"),
        (("rotary", {"dim": 4}), "options of positions 'rotary' must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            TextToImageTransformer(positions=wrong, **sizes, **SIZES)


def test_a_replaced_block_gets_the_positions_with_options() -> None:
    model = LanguageModel(num_tokens=9, depth=2, attention="gate_loop", positions=("auto", ROTARY), dim=16)
    replace_block(model, 0, ("full", {"heads": 2, "dim_head": 8}))
    (part,) = parts(model, Rotary)
    assert part.scaling["factor"] == 4


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "name": ("rope", ValueError, "positions must be one of .* got positions='rope'"),
    "name with options": (("rope", {}), ValueError, "positions must be one of .* got positions='rope'"),
    "number": (7, TypeError, r"positions must be a name, \(name, options\) or None, got 7"),
    "three parts": (("rotary", {}, {}), TypeError, r"positions must be a name, \(name, options\) or None"),
    "no mapping": (("rotary", 5e5), TypeError, r"positions must be a name, \(name, options\) or None"),
    "option": (
        ("rotary", {"tetha": 5e5}),
        ValueError,
        "options of positions 'rotary' must be one of .* did you mean 'theta'",
    ),
    "option of t5": (("t5", {"heads": 2}), ValueError, r"options of positions 't5' must be one of \['buckets', 'max"),
    "scaling type": (
        ("rotary", {"scaling": {"type": "jarn", "factor": 2}}),
        ValueError,
        r"scaling\['type'\] must be one of .* did you mean 'yarn'",
    ),
    "no factor": (
        ("rotary", {"scaling": {"type": "yarn", "original_max_seq_len": 64}}),
        ValueError,
        "scaling 'yarn' must have factor, got",
    ),
    "dim": (("rotary", {"dim": 10}), ValueError, "rotary must rotate 2 ... dim_head features, got rotary.dim=10"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", MODELS)
def test_models_name_what_is_wrong_in_positions(name: str, case: str) -> None:
    positions, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        MODELS[name][0](positions=positions)


def test_learned_positions_have_no_options_and_a_given_stack_has_its_own_positions() -> None:
    with pytest.raises(ValueError, match="options of positions 'learned' must be one of"):
        LanguageModel(num_tokens=9, depth=1, max_seq_len=9, positions=("learned", {"dim": 3}), **SIZES)
    assert LanguageModel(num_tokens=9, depth=1, max_seq_len=9, positions=("learned", {}), **SIZES).positions is not None
    stack = Stack(16, 1, heads=2, dim_head=8)
    for positions in ("rotary", ("rotary", ROTARY), ("auto", {"theta": 3.0})):
        with pytest.raises(ValueError, match="positions must be given to the stack, not beside it"):
            LanguageModel(num_tokens=9, stack=stack, positions=positions)
