"""Constructors given values of a wrong kind raise TypeError or ValueError, and nothing else."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from attention_zoo import (
    Encoder,
    EncoderDecoder,
    FeedForward,
    GreyTokenizer,
    LanguageModel,
    LayerNorm,
    LearnedPositions,
    Memformer,
    MemoryLanguageModel,
    MemoryUpdate,
    MultiStreamTransformer,
    RelativeBias,
    RMSNorm,
    Rotary,
    Stack,
    TextImageLayout,
    TextImageRotary,
    TextToImageTransformer,
)
from attention_zoo.attention import BLOCKS

LAYOUT = TextImageLayout(text_len=4, height=3, width=4)
WRONG: list[Any] = ["1", None, math.inf, math.nan, -1, 1.5, True, object(), [], {}, 10**30]
WRONG += [torch.zeros(2), nn.Linear(2, 2)]
LANGUAGE: dict[str, Any] = {"num_tokens": 11, "dim": 16, "depth": 1}
SIZES: dict[type, dict[str, Any]] = {
    LanguageModel: LANGUAGE,
    MultiStreamTransformer: LANGUAGE,
    Encoder: LANGUAGE,
    EncoderDecoder: {"num_tokens": 11, "dim": 16, "enc_depth": 1, "dec_depth": 1},
    MemoryLanguageModel: {**LANGUAGE, "memory_slots": 2, "segment_len": 4, "memory_heads": 2},
    Memformer: {"dim": 16, "memory_slots": 2, "enc_num_tokens": 11, "enc_depth": 1, "enc_heads": 2, "memory_heads": 2},
    TextToImageTransformer: {
        "num_text_tokens": 11,
        "text_len": 3,
        "num_image_tokens": 11,
        "height": 2,
        "width": 2,
        "dim": 16,
        "depth": 1,
    },
    Stack: {"dim": 16, "depth": 1},
    Rotary: {},
    RelativeBias: {"heads": 2},
    FeedForward: {"dim": 16},
    LayerNorm: {"dim": 4},
    RMSNorm: {"dim": 4},
    LearnedPositions: {"max_seq_len": 4, "dim": 4},
    MemoryUpdate: {"dim": 16, "heads": 2},
    TextImageRotary: {"layout": LAYOUT},
    TextImageLayout: {"text_len": 4, "height": 2, "width": 2},
    GreyTokenizer: {"height": 2, "width": 2},
}
for block in BLOCKS.values():
    takes = inspect.signature(block).parameters
    SIZES[block] = {
        "dim": 16,
        **({"layout": LAYOUT} if "layout" in takes else {}),
        **({"window": 3} if block is BLOCKS["window"] else {}),
        **({"heads": 2, "dim_head": 8} if "dim_head" in takes else {}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("cls", SIZES, ids=lambda cls: cls.__name__)
def test_values_of_a_wrong_kind_are_accepted_or_raise_type_and_value_errors(cls: type) -> None:
    for name, parameter in inspect.signature(cls).parameters.items():
        for value in WRONG if parameter.kind is not parameter.VAR_KEYWORD else ():
            try:
                with torch.device("meta"):  # no memory for sizes that are large and right
                    cls(**{**SIZES[cls], name: value})
            except (TypeError, ValueError):
                continue
            except Exception as error:
                pytest.fail(f"{name}={value!r} raises {type(error).__name__}: {error}")
