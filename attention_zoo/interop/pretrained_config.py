"""The config.json of Llama 2 and 3, Mistral, Qwen2 and Qwen3, as the arguments of `LanguageModel`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_zoo._checks import (
    check_choice,
    check_flag,
    check_fraction,
    check_in,
    check_int,
    check_positive,
    check_positive_number,
)
from attention_zoo.models.stack import DEEPEST
from attention_zoo.saving.model_file import ModelFileNotFoundError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The keys that all families read, and those of each, with their values in `transformers` where config.json has none.
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128, "attention_bias": False},
}
LAYER_TYPES = ("full_attention", "sliding_attention")
# The keys of each type of scaling. `Rotary` has the same options, but for ORIGINAL.
ORIGINAL = "original_max_position_embeddings"
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", ORIGINAL),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}.union(*SCALINGS.values())

# The name of a parameter, and the shapes of the tensors of `transformers` whose rows it has, in order.
Parameter = tuple[str, dict[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder of one of the families.

    Attributes:
        num_tokens, dim, depth, heads, kv_heads, dim_head, max_seq_len, attn_dropout: see `LanguageModel`.
        dim_inner: hidden features of the SwiGLU feedforwards.
        eps: of all norms.
        qkv_bias, out_bias, ff_bias: whether projections and feedforwards have a bias.
        qk_norm: whether queries and keys are normalised per head.
        tied: whether the logits use the weights of the token embedding.
        windows: the window of each layer in tokens, the query's own included; None for full attention.
        rotary: options of `Rotary`.
    """

    num_tokens: int
    dim: int
    depth: int
    heads: int
    kv_heads: int
    dim_head: int
    dim_inner: int
    max_seq_len: int
    eps: float
    qkv_bias: bool
    out_bias: bool
    ff_bias: bool
    qk_norm: bool
    tied: bool
    attn_dropout: float
    windows: list[int | None]
    rotary: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `LanguageModel`."""
        options: dict[str, Any] = {"kv_heads": self.kv_heads, "qkv_bias": self.qkv_bias, "out_bias": self.out_bias}
        if self.qk_norm:
            options |= {"qk_norm": "rms", "qk_norm_eps": self.eps}
        layers = [("full", options) if w is None else ("window", {"window": w, **options}) for w in self.windows]
        return {
            "num_tokens": self.num_tokens,
            "dim": self.dim,
            "depth": self.depth,
            "attention": layers[0] if all(layer == layers[0] for layer in layers) else layers,
            "heads": self.heads,
            "dim_head": self.dim_head,
            "max_seq_len": self.max_seq_len,
            "positions": ("rotary", self.rotary),
            "feedforward": ("swiglu", {"dim_inner": self.dim_inner, "bias": self.ff_bias}),
            "norm": ("rms", {"eps": self.eps}),
            "attn_dropout": self.attn_dropout,
            "tie_embeddings": self.tied,
        }

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter of the model."""
        d, inner, kv_inner, hidden = self.dim, self.heads * self.dim_head, self.kv_heads * self.dim_head, self.dim_inner

        def linear(to: str, biased: bool, sources: Mapping[str, tuple[int, int]]) -> Iterator[Parameter]:
            yield f"{to}.weight", {f"{name}.weight": shape for name, shape in sources.items()}
            if biased:
                yield f"{to}.bias", {f"{name}.bias": shape[:1] for name, shape in sources.items()}

        yield "token_embedding.weight", {"model.embed_tokens.weight": (self.num_tokens, d)}
        for layer in range(self.depth):
            attention, feedforward = (f"stack.layers.{layer}.sublayers.{place}" for place in (0, 1))
            source = f"model.layers.{layer}"
            at, ff = f"{source}.self_attn", f"{source}.mlp"
            qkv = {f"{at}.q_proj": (inner, d), f"{at}.k_proj": (kv_inner, d), f"{at}.v_proj": (kv_inner, d)}
            yield from linear(f"{attention}.block.to_qkv", self.qkv_bias, qkv)
            yield from linear(f"{attention}.block.to_out", self.out_bias, {f"{at}.o_proj": (d, inner)})
            for norm in ("q_norm", "k_norm") if self.qk_norm else ():
                yield f"{attention}.block.{norm}.weight", {f"{at}.{norm}.weight": (self.dim_head,)}
            yield from linear(f"{feedforward}.block.to_gate", self.ff_bias, {f"{ff}.gate_proj": (hidden, d)})
            yield from linear(f"{feedforward}.block.to_hidden", self.ff_bias, {f"{ff}.up_proj": (hidden, d)})
            yield from linear(f"{feedforward}.block.to_out", self.ff_bias, {f"{ff}.down_proj": (d, hidden)})
            yield f"{attention}.residual.norm.weight", {f"{source}.input_layernorm.weight": (d,)}
            yield f"{feedforward}.residual.norm.weight", {f"{source}.post_attention_layernorm.weight": (d,)}
        yield "stack.norm.weight", {"model.norm.weight": (d,)}
        if not self.tied:
            yield "to_logits.weight", {"lm_head.weight": (self.num_tokens, d)}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: the file is missing (also a ValueError).
        ValueError: it holds no JSON object.
    """
    if not path.is_file():
        raise ModelFileNotFoundError(f"{path} does not exist")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_config(path: Path) -> Decoder:
    """The model that a config.json describes.

    Raises:
        FileNotFoundError: the file is missing (also a ValueError).
        ValueError: see `from_pretrained_folder`.
    """
    given = read_json(path)
    try:
        return _decoder(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def _decoder(given: Mapping[str, Any]) -> Decoder:
    for key in ("auto_map", "trust_remote_code"):
        if given.get(key):
            raise ValueError(f"{key} must not be given, code of the model's own is not run, got {given[key]!r}")
    if given.get("quantization_config") is not None:
        raise ValueError(f"quantization_config must not be given, got {given['quantization_config']!r}")
    family: Any = given.get("model_type")
    check_choice("model_type", family, FAMILIES)
    architectures = given.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"architectures must be a list, got {architectures!r}")
    for name in architectures:
        if not str(name).endswith("ForCausalLM"):
            raise ValueError(f"architectures must be a language model, ...ForCausalLM, got {name!r}")
    known = COMMON | FAMILIES[family]
    config: dict[str, Any] = {**known, **given}
    for key in SIZES:
        if key not in given:
            raise ValueError(f"{key} must be given")
    sizes = {key: config[key] for key in (*SIZES, "max_position_embeddings")}
    check_int(1, **sizes)
    if sizes["num_hidden_layers"] > DEEPEST:
        raise ValueError(f"num_hidden_layers must be at most {DEEPEST}, got {sizes['num_hidden_layers']}")
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    kv_heads = heads if config["num_key_value_heads"] is None else config["num_key_value_heads"]
    check_positive(num_key_value_heads=kv_heads, head_dim=config["head_dim"])
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads={heads}, got {kv_heads}")
    if config["head_dim"] is None and dim % heads:
        raise ValueError(f"num_attention_heads must divide hidden_size={dim} without head_dim, got {heads}")
    dim_head = dim // heads if config["head_dim"] is None else config["head_dim"]
    if dim_head % 2:
        raise ValueError(f"head_dim must be even, features are rotated in pairs, got {dim_head}")
    if config["hidden_act"] not in ("silu", "swish"):  # two names of one function
        raise ValueError(f"hidden_act must be 'silu', got {config['hidden_act']!r}")
    check_in("(0, inf)", rms_norm_eps=config["rms_norm_eps"])
    check_fraction(attention_dropout=config["attention_dropout"])
    flags = {key: config[key] for key in ("tie_word_embeddings", "attention_bias", "mlp_bias") if key in known}
    check_flag(**flags)
    biased = flags.get("attention_bias", False)
    rotary, stretched = _rotary(config)
    return Decoder(
        num_tokens=config["vocab_size"],
        dim=dim,
        depth=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        dim_head=dim_head,
        dim_inner=config["intermediate_size"],
        max_seq_len=max(config["max_position_embeddings"], stretched),
        eps=config["rms_norm_eps"],
        qkv_bias=biased or family == "qwen2",
        out_bias=biased,
        ff_bias=flags.get("mlp_bias", False),
        qk_norm=family == "qwen3",
        tied=config["tie_word_embeddings"],
        attn_dropout=config["attention_dropout"],
        windows=_windows(family, config),
        rotary=rotary,
    )


def _windows(family: str, config: Mapping[str, Any]) -> list[int | None]:
    """The window of each layer."""
    known, depth, window = FAMILIES[family], config["num_hidden_layers"], config.get("sliding_window")
    if "use_sliding_window" in known:
        check_flag(use_sliding_window=config["use_sliding_window"])
        window = window if config["use_sliding_window"] else None
    elif family == "llama" and window is not None:
        raise ValueError(f"sliding_window must be null with model_type='llama', got {window!r}")
    first = config["max_window_layers"] if "max_window_layers" in known else 0
    check_int(0, max_window_layers=first)
    check_positive(sliding_window=window)
    windows = [window if layer >= first else None for layer in range(depth)]
    types = config.get("layer_types")
    if types is None:
        return windows
    if not isinstance(types, list) or len(types) != depth:
        raise ValueError(f"layer_types must be a list of num_hidden_layers={depth} types, got {types!r}")
    for kind in types:
        check_choice("layer_types", kind, LAYER_TYPES)
    if "sliding_attention" in types and window is None:
        raise ValueError("layer_types must be 'full_attention' without a sliding_window in use, got sliding_attention")
    typed = [window if kind == "sliding_attention" else None for kind in types]
    if "layer_types" not in known and typed != windows:  # they have no effect in `transformers`
        raise ValueError(f"layer_types must agree with {window=} in all layers with model_type={family!r}, got {types}")
    return typed


def _rotary(config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The options of `Rotary`, and the number of tokens to which the scaling stretches the positions, or 0."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise ValueError(f"rope_scaling and rope_parameters must not both be given, got {old!r} and {new!r}")
    name, given = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(given, dict):
        raise ValueError(f"{name} must be an object, got {given!r}")
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{name} must be the same for all layers, got {given!r}")
    kind: Any = given.get("rope_type", given.get("type", "default"))
    if kind in ("dynamic", "longrope", "su"):
        raise ValueError(f"rope_type of {name} must not depend on the length of the sequence, got {kind!r}")
    check_choice(f"rope_type of {name}", kind, SCALINGS)
    for key in given:
        check_choice(f"key of {name}", key, sorted(ROPE_KEYS))
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor must be 1, got {partial!r}")
    thetas = (given.get("rope_theta"), config.get("rope_theta"), 10000.0)
    rotary = {"theta": next(theta for theta in thetas if theta is not None), "pairing": "half"}
    if kind == "default":
        return rotary, 0
    longest = config["max_position_embeddings"]
    original = config.get(ORIGINAL, given.get(ORIGINAL, longest))  # in this order, as `transformers`
    check_int(1, **{ORIGINAL: original})
    scaling = {key: given[key] for key in SCALINGS[kind] if given.get(key) is not None and key != ORIGINAL}
    if kind == "yarn":
        scaling.setdefault("factor", longest / original)
        if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):  # `transformers` reads both or none
            scaling = {key: value for key, value in scaling.items() if not key.startswith("mscale")}
    for key in ("factor",) if kind != "llama3" else SCALINGS[kind][:-1]:
        if key not in scaling:
            raise ValueError(f"{key} must be given in {name} with rope_type {kind!r}")
    check_positive_number(factor=scaling["factor"])
    stretched = 0 if kind == "llama3" else int(original * scaling["factor"])
    if kind != "linear":
        scaling["original_max_seq_len"] = original
    return rotary | {"scaling": {"type": kind, **scaling}}, stretched
