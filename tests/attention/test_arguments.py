"""Constructors of layers and parts reject flags, numbers and parts of another type, by the name of the argument."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attention_zoo import (
    AxialAttention,
    BlockSparseAttention,
    ConvAttention,
    CosineSimAttention,
    CrossAttention,
    FullAttention,
    GateLoopAttention,
    RelativeBias,
    RelativeGateAttention,
    SimpleGateLoop,
    TalkingHeadsAttention,
    TextImageLayout,
)
from attention_zoo.layers import DeepNorm, FeedForward, LayerNorm, LayerScale, RMSNorm, TokenShift

LAYOUT = TextImageLayout(text_len=4, height=3, width=4)
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "full": lambda **options: FullAttention(16, **options),
    "cosine_sim": lambda **options: CosineSimAttention(16, **options),
    "talking_heads": lambda **options: TalkingHeadsAttention(16, **options),
    "cross": lambda **options: CrossAttention(16, **options),
    "conv": lambda **options: ConvAttention(16, **{"layout": LAYOUT, **options}),
    "axial": lambda **options: AxialAttention(16, **{"layout": LAYOUT, **options}),
    "block_sparse": lambda **options: BlockSparseAttention(16, **{"layout": LAYOUT, **options}),
    "gate_loop": lambda **options: GateLoopAttention(16, **options),
    "relative_gate": lambda **options: RelativeGateAttention(16, **options),
    "simple_gate_loop": lambda **options: SimpleGateLoop(16, **options),
    "bias": lambda **options: RelativeBias(8, **options),
    "feedforward": lambda **options: FeedForward(16, **options),
    "rms": lambda **options: RMSNorm(16, **options),
    "layer": lambda **options: LayerNorm(16, **options),
    "deep": lambda **options: DeepNorm(16, **options),
}
FLAGS = [
    *((name, "causal") for name in ("full", "cosine_sim", "talking_heads", "block_sparse", "bias")),
    *(("full", flag) for flag in ("qkv_bias", "out_bias")),
    *(("cross", flag) for flag in ("qkv_bias", "out_bias")),
    *((name, "out_bias") for name in ("conv", "axial", "block_sparse", "relative_gate")),
    *(("gate_loop", flag) for flag in ("sub_norm", "reverse")),
    ("relative_gate", "softmax"),
    *(("simple_gate_loop", flag) for flag in ("norm", "post_norm", "reverse")),
    ("feedforward", "bias"),
]
NUMBERS = [
    *((name, "scale") for name in ("full", "cosine_sim", "talking_heads")),
    ("feedforward", "mult"),
    ("rms", "eps"),
    ("layer", "eps"),
]
FRACTIONS = [
    *((name, "dropout") for name in ("full", "cosine_sim", "talking_heads", "cross", "conv", "relative_gate")),
    *((name, "gradient_fraction") for name in ("gate_loop", "relative_gate")),
    ("feedforward", "dropout"),
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_must_be_booleans(name: str, flag: str) -> None:
    LAYERS[name](**{flag: True})
    LAYERS[name](**{flag: False})
    for value in (0, 1, None, "", "layer", "False", 1.0, [], torch.tensor(True)):
        with pytest.raises(TypeError, match=f"{flag} must be a bool, got {flag}="):
            LAYERS[name](**{flag: value})


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_numbers_must_be_finite_and_positive(name: str, number: str) -> None:
    LAYERS[name](**{number: 0.5})
    LAYERS[name](**{number: 2})
    for bad in (0, -1.0, math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{number} must (be finite|be positive|give .*), got {number}={bad}"):
            LAYERS[name](**{number: bad})
    for wrong in ("1", True, [1.0], 1j):
        with pytest.raises(TypeError, match=f"{number} must be a number, got {number}="):
            LAYERS[name](**{number: wrong})


@pytest.mark.parametrize(("name", "number"), FRACTIONS)
def test_fractions_must_be_numbers(name: str, number: str) -> None:
    LAYERS[name](**{number: 0.5})
    for bad in (-0.1, 1.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{number} must "):
            LAYERS[name](**{number: bad})
    for wrong in ("0.5", None, True, [0.5]):
        with pytest.raises(TypeError, match=f"{number} must be a number, got {number}="):
            LAYERS[name](**{number: wrong})


@pytest.mark.parametrize("name", ["full", "cosine_sim"])
@pytest.mark.parametrize("bias", [True, 0.5, "t5", nn.Linear(2, 2), torch.zeros(8, 8)], ids=lambda bias: str(bias)[:9])
def test_layers_reject_a_bias_of_another_type(name: str, bias: object) -> None:
    with pytest.raises(TypeError, match="bias must be of type RelativeBias or ALiBi or None, got "):
        LAYERS[name](bias=bias)


@pytest.mark.parametrize("pattern", [True, "axial", [[True]], LAYOUT], ids=str)
def test_full_attention_rejects_a_pattern_of_another_type(pattern: object) -> None:
    with pytest.raises(TypeError, match="pattern must be of type Pattern or Tensor or None, got "):
        FullAttention(16, pattern=pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["conv", "axial", "block_sparse"])
@pytest.mark.parametrize("layout", [None, 3, (4, 3, 4), "image"], ids=str)
def test_image_layers_reject_a_layout_of_another_type(name: str, layout: Any) -> None:
    with pytest.raises(TypeError, match="layout must be of type TextImageLayout, got "):
        LAYERS[name](layout=layout)


def test_parts_of_stacks_reject_numbers_and_layouts_of_another_type() -> None:
    with pytest.raises(TypeError, match="depth must be an int, got depth='2'"):
        LAYERS["deep"](depth="2")
    with pytest.raises(ValueError, match="depth must be at least 1, got depth=-1"):
        LAYERS["deep"](depth=-1)
    with pytest.raises(TypeError, match="start must be a number, got start='1'"):
        LayerScale(16, start="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must be finite, got start=nan"):
        LayerScale(16, start=math.nan)
    with pytest.raises(TypeError, match="layout must be of type TextImageLayout, got int"):
        TokenShift(nn.Identity(), 16, layout=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name not in ("bias", "feedforward", "rms", "layer", "deep")]
)
def test_sizes_and_numbers_may_be_those_of_numpy(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    sizes = {
        "heads": numpy.int64(2),
        "dim_head": numpy.int32(8),
        "dropout": numpy.float32(0.5),
        "scale": numpy.float32(2),
    }
    takes = inspect.signature(type(LAYERS[name]())).parameters
    layer = LAYERS[name](**{key: value for key, value in sizes.items() if key in takes})
    others = {"context": torch.randn(2, 4, 16)} if name == "cross" else {}
    assert layer(torch.randn(2, 5, 16), **others).shape == (2, 5, 16)
