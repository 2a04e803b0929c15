"""Which self-attention blocks the models of this package take, found by building small models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from attention_zoo.attention import BLOCKS
from attention_zoo.models import (
    Encoder,
    EncoderDecoder,
    LanguageModel,
    Memformer,
    MemoryLanguageModel,
    MultiStreamTransformer,
    Stack,
    TextToImageTransformer,
)
from attention_zoo.models.layer_specs import resolve_block, takes
from attention_zoo.ops import TextImageLayout

LAYOUT = TextImageLayout(text_len=4, height=2, width=4)

# Small models by name; each takes `attention`.
SMALL_MODELS: dict[str, Callable[..., nn.Module]] = {
    "LanguageModel": partial(LanguageModel, num_tokens=11, dim=24, depth=2),
    "MemoryLanguageModel": partial(
        MemoryLanguageModel, num_tokens=11, dim=24, depth=2, memory_slots=3, segment_len=9, memory_heads=2
    ),
    "MultiStreamTransformer": partial(MultiStreamTransformer, num_tokens=11, dim=24, depth=2),
    "TextToImageTransformer": partial(
        TextToImageTransformer, num_text_tokens=11, text_len=3, num_image_tokens=11, height=2, width=4, dim=24, depth=2
    ),
    "Encoder": partial(Encoder, num_tokens=11, num_classes=3, dim=24, depth=2),
    "EncoderDecoder, decoder": lambda attention: EncoderDecoder(
        num_tokens=11, dim=24, enc_depth=1, dec_depth=1, dec_attention=attention
    ),
    "Memformer, encoder": lambda attention: Memformer(
        dim=24, memory_slots=3, memory_heads=2, enc_num_tokens=11, enc_depth=1, enc_heads=2, attention=attention
    ),
    "Memformer, decoder": lambda attention: Memformer(
        dim=24,
        memory_slots=3,
        memory_heads=2,
        enc_num_tokens=11,
        enc_depth=1,
        enc_heads=2,
        dec_num_tokens=11,
        dec_depth=1,
        dec_heads=2,
        dec_attention=attention,
    ),
    "Stack, causal=False": partial(Stack, 24, 1, causal=False),
}


def small_spec(block: str, model: str) -> Any:
    """The spec of a block with the small layout or window that it needs and the model does not give."""
    required = resolve_block(block).required
    options: dict[str, Any] = {"window": 3} if "window" in required else {}
    if "layout" in required and model != "TextToImageTransformer":
        options["layout"] = LAYOUT
    return (block, options) if options else block


def compatibility() -> dict[str, dict[str, str]]:
    """For each self-attention block and each model "" if the model takes the block, or the reason why it does not."""
    table: dict[str, dict[str, str]] = {}
    with torch.random.fork_rng(devices=[]):
        for block, cls in BLOCKS.items():
            if not takes(cls, "context"):
                table[block] = {name: _refusal(make, small_spec(block, name)) for name, make in SMALL_MODELS.items()}
    return table


def _refusal(make: Callable[..., nn.Module], attention: Any) -> str:
    try:
        make(attention=attention)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def compatibility_table() -> str:
    """`compatibility` in Markdown, with the reasons below the table."""
    table = compatibility()
    reasons: list[str] = []
    lines = [f"| block | {' | '.join(SMALL_MODELS)} |", "|---" * (len(SMALL_MODELS) + 1) + "|"]
    for block, found in table.items():
        cells = []
        for reason in found.values():
            reason = reason.replace(f"'{block}'", "it")
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(f"no ({reasons.index(reason) + 1})" if reason else "yes")
        lines.append(f"| `{block}` | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"
