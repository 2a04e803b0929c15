"""Tiny decoders of `transformers` with random weights, in folders as it writes them, and what it computes with them.

`python -m tests.interop.tiny_decoders` writes the records in tests/data/pretrained. Needs the extra `hf`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RECORDS = Path(__file__).parents[1] / "data" / "pretrained"
NEW_TOKENS = 12

SMALL = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **SMALL, "num_key_value_heads": 1}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SMALL, "num_key_value_heads": 1}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **SMALL, "num_key_value_heads": 1, "head_dim": 6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
# The configurations that have a record, with old keys (rope_theta, rope_scaling, torch_dtype) and with new ones
# (rope_parameters, layer_types, dtype).
RECORDED: dict[str, dict[str, Any]] = {
    "llama2": {**LLAMA, "rms_norm_eps": 1e-5, "rope_scaling": None, "torch_dtype": "float32"},
    "llama3": {
        **LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE},
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
    "mistral": {**MISTRAL, "sliding_window": 4, "rope_theta": 10000.0, "torch_dtype": "float32"},
    "qwen2": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "yarn", **YARN},
        "torch_dtype": "float32",
    },
    "qwen3": {
        **QWEN3,
        "rms_norm_eps": 1e-3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "dtype": "float32",
    },
}
# More of them, which are compared where `transformers` is installed.
OTHERS: dict[str, dict[str, Any]] = {
    "llama with biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama, linear scaling": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5000.0},
    "llama 3, old keys": {**LLAMA, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "llama 3, original length beside": {
        **LLAMA,
        "rope_scaling": {name: value for name, value in LLAMA3_ROPE.items() if "original" not in name},
        "original_max_position_embeddings": 8,
    },
    "llama, yarn": {
        **LLAMA,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, **YARN, "beta_fast": 8, "beta_slow": 0.5},
    },
    "llama, yarn as DeepSeek": {
        **LLAMA,
        "head_dim": 16,
        "rope_scaling": {"type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        "rope_theta": 100.0,
    },
    "llama, yarn with one mscale": {**LLAMA, "rope_scaling": {"type": "yarn", **YARN, "mscale": 0.7}},
    "llama, yarn with its factor": {**LLAMA, "rope_scaling": {"type": "yarn", **YARN, "attention_factor": 1.3}},
    "mistral without a window": {**MISTRAL, "sliding_window": None, "head_dim": 10},
    "mistral, eight key/value heads by default": {
        **{name: value for name, value in MISTRAL.items() if name != "num_key_value_heads"},
        "num_attention_heads": 8,
        "head_dim": 2,
        "sliding_window": 2,
    },
    "qwen2 without a window": {**QWEN2, "sliding_window": 3, "tie_word_embeddings": True},
    "qwen3 with biases": {**QWEN3, "attention_bias": True, "num_hidden_layers": 3},
    "qwen3, 128 features a head by default": {name: value for name, value in QWEN3.items() if name != "head_dim"},
}


def write_decoder(folder: Path, config: dict[str, Any], *, keep_config: bool = True, **options: Any) -> None:
    """A folder with a decoder whose weights are random.

    Args:
        folder: where to write.
        config: the contents of config.json.
        keep_config: whether config.json stays as given, with old keys where it has them; False: as `transformers`
            writes it, with all keys.
        options: of `save_pretrained`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.5)
    model.save_pretrained(folder, **options)
    if keep_config:
        (folder / "config.json").write_text(text)
    (folder / "generation_config.json").unlink(missing_ok=True)


def expected(folder: Path) -> dict[str, Tensor]:
    """What `transformers` computes with the decoder in a folder, in float32.

    Returns:
        tokens, mask: (2, 9), a batch whose second row is padded on the left.
        logits: (2, 9, num_tokens), of the tokens under the mask.
        new: (2, NEW_TOKENS), the greedy continuation of each row.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask.long()).logits
        model.generation_config.eos_token_id = None
        new = model.generate(
            tokens, attention_mask=mask.long(), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    return {"tokens": tokens, "mask": mask, "logits": logits, "new": new[:, tokens.shape[1] :]}


def main() -> None:
    """Write the records."""
    for name, config in RECORDED.items():
        torch.manual_seed(0)
        write_decoder(RECORDS / name, config)
        found = expected(RECORDS / name)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, RECORDS / name / "expected.safetensors")


if __name__ == "__main__":
    main()
