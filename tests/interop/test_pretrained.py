"""Folders of `transformers`: what is loaded computes what `transformers` computes, and everything else is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_zoo import LanguageModel, replace_block
from attention_zoo.interop import from_pretrained_folder
from tests.interop.tiny_decoders import NEW_TOKENS, OTHERS, RECORDED, RECORDS, YARN, expected, write_decoder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"
TOKENS = torch.arange(14).view(2, 7)


def assert_computes(model: LanguageModel, record: dict[str, Tensor]) -> None:
    """The logits of valid tokens are those of the record to 1e-5, and the greedy continuation is the same."""
    tokens, mask = record["tokens"], record["mask"]
    torch.testing.assert_close(
        model(tokens, mask=mask)[mask], record["logits"][mask], atol=1e-5, rtol=1e-5, check_dtype=True
    )
    assert torch.equal(model.generate(tokens, NEW_TOKENS, temperature=0, mask=mask), record["new"])
    alone = model.generate(tokens[1:, 4:], NEW_TOKENS, temperature=0)  # the padded row without its padding
    assert torch.equal(alone, record["new"][1:])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the record of Llama 2."""
    for name in ("config.json", WEIGHTS):
        shutil.copyfile(RECORDS / "llama2" / name, tmp_path / name)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def split(folder: Path) -> dict[str, str]:
    """Move the weights to two files. Returns the file of each tensor."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    of = {name: shards[index % 2] for index, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensor for name, tensor in tensors.items() if of[name] == shard}, folder / shard)
    write_index(folder, of)
    return of


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_decoder_computes_what_transformers_computed(name: str) -> None:
    model = from_pretrained_folder(RECORDS / name)
    assert not model.training
    assert_computes(model, load_file(RECORDS / name / "expected.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("keep_config", [True, False])
@pytest.mark.parametrize("name", [*RECORDED, *OTHERS])
def test_a_random_decoder_computes_what_transformers_computes(name: str, keep_config: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    size = "3KB" if "qwen" in name else "1GB"
    write_decoder(tmp_path, (RECORDED | OTHERS)[name], keep_config=keep_config, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == ("qwen" in name)
    assert_computes(from_pretrained_folder(str(tmp_path)), expected(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_the_records_are_what_transformers_computes(name: str) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    for key, tensor in expected(RECORDS / name).items():
        torch.testing.assert_close(tensor, load_file(RECORDS / name / "expected.safetensors")[key])


@pytest.mark.parametrize("name", RECORDED)
def test_a_loaded_model_is_saved_and_loaded_in_the_format_of_this_package(name: str, tmp_path: Path) -> None:
    model = from_pretrained_folder(RECORDS / name)
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path).eval()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", RECORDED)
def test_a_block_of_a_loaded_model_can_be_replaced(name: str, tmp_path: Path) -> None:
    model = from_pretrained_folder(RECORDS / name)
    kept = model.stack.layers[1].sublayers[0].attention
    report = replace_block(model, 1, ("cosine_sim", {"kv_heads": kept.kv_heads}), init="copy")
    assert {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"} <= set(report.copied)
    assert torch.equal(model.stack.layers[1].sublayers[0].attention.to_qkv.weight, kept.to_qkv.weight)
    model.loss(TOKENS).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path).eval()(TOKENS), model(TOKENS))


def test_weights_in_several_files_load_as_those_in_one(folder: Path) -> None:
    want = from_pretrained_folder(folder)(TOKENS)
    split(folder)
    assert torch.equal(from_pretrained_folder(folder)(TOKENS), want)


def test_parameters_are_float32_unless_another_dtype_is_given(folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    edit_tensors(folder, **tensors)
    wide, kept, half = (from_pretrained_folder(folder, **options) for options in ({}, {"dtype": None}, HALF))
    for model, dtype in ((wide, torch.float32), (kept, torch.bfloat16), (half, torch.float16)):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(wide.token_embedding.weight, tensors["model.embed_tokens.weight"].float())
    torch.testing.assert_close(kept(TOKENS).float(), wide(TOKENS), atol=0.2, rtol=0.1)
    assert kept.generate(TOKENS, 3).shape == (2, 3)


HALF = {"dtype": torch.float16}


def test_the_model_is_on_the_device_that_is_given(folder: Path) -> None:
    model = from_pretrained_folder(folder, device="meta")
    assert all(parameter.is_meta and parameter.requires_grad for parameter in model.parameters())


def test_loading_takes_no_random_number(folder: Path) -> None:
    before = torch.get_rng_state()
    from_pretrained_folder(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_does_not_change_with_its_file(folder: Path) -> None:
    model = from_pretrained_folder(folder, dtype=None)
    want = model(TOKENS)
    path = folder / WEIGHTS
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model(TOKENS), want)


def test_buffers_of_rotary_frequencies_are_left_out(folder: Path) -> None:
    want = from_pretrained_folder(folder)(TOKENS)
    edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert torch.equal(from_pretrained_folder(folder)(TOKENS), want)


def test_tied_logits_may_be_in_the_file_if_they_equal_the_embedding(folder: Path) -> None:
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight must equal model.embed_tokens.weight with tie_word_embedd"):
        from_pretrained_folder(folder)
    edit_tensors(folder, **{"lm_head.weight": embedding.clone()})
    model = from_pretrained_folder(folder)
    edit_tensors(folder, **{"lm_head.weight": None})
    assert torch.equal(from_pretrained_folder(folder)(TOKENS), model(TOKENS))
    edit_tensors(folder, **{"lm_head.weight": embedding.clone(), "model.embed_tokens.weight": None})
    with pytest.raises(ValueError, match=r"missing 'model.embed_tokens.weight'"):
        from_pretrained_folder(folder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": 3}, TypeError, "path must be of type str or PathLike, got int"),
        ({"device": "nowhere"}, ValueError, "device must be one of this machine, got 'nowhere'"),
    ],
)
def test_arguments_of_another_kind_are_named(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_pretrained_folder(**{"path": folder, **options})


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 64),
        ({"max_position_embeddings": ...}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 128),
        ({"rope_scaling": {"type": "yarn", **YARN}}, 64),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}}, 64),
        ({"rope_scaling": OTHERS["llama 3, old keys"]["rope_scaling"]}, 64),
    ],
)
def test_the_longest_sequence_is_that_of_the_positions(folder: Path, changes: dict[str, Any], length: int) -> None:
    edit_config(folder, **changes)
    assert from_pretrained_folder(folder).max_seq_len == length


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", **YARN, **changes}}


MISTRAL, QWEN2, QWEN3 = ({"model_type": name, "num_key_value_heads": 2} for name in ("mistral", "qwen2", "qwen3"))
# Changes of config.json, ... for a key that is removed, and the error.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another family": ({"model_type": "gpt2"}, r"model_type must be one of \['llama', .*\], got model_type='gpt2'"),
    "a similar family": ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'; did you mean 'qwen3'"),
    "no family": ({"model_type": ...}, "got model_type=None"),
    "a list of families": ({"model_type": ["llama"]}, r"got model_type=\['llama'\]"),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures must be a language model, ...ForCausalLM, got 'LlamaForSequenceClassification'",
    ),
    "code": (
        {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
        "auto_map must not be given, code of the model's own is not run, got {'AutoModelForCausalLM': 'modeling.Own'}",
    ),
    "code by a flag": (
        {"trust_remote_code": True},
        "trust_remote_code must not be given, .* got True",
    ),
    "quantization": ({"quantization_config": {"bits": 4}}, "quantization_config must not be given, got {'bits': 4}"),
    "activation": ({"hidden_act": "relu"}, "hidden_act must be 'silu', got 'relu'"),
    "no size": ({"hidden_size": ...}, "hidden_size must be given"),
    "size of text": ({"hidden_size": "8"}, "hidden_size must be an int, got hidden_size='8'"),
    "size of 0": ({"vocab_size": 0}, "vocab_size must be at least 1, got vocab_size=0"),
    "length of null": ({"max_position_embeddings": None}, "max_position_embeddings must be an int"),
    "too many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 65536, got 1000000000"),
    "groups": ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads=2, got 3"),
    "heads": ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size=8 without head_dim, got 3"),
    "odd heads": ({"head_dim": 5}, "head_dim must be even, features are rotated in pairs, got 5"),
    "huge heads": ({"head_dim": 2**39}, r"q_proj.weight' must have shape \(1099511627776, 8\), got \(8, 8\)"),
    "epsilon": ({"rms_norm_eps": 0}, r"rms_norm_eps must lie in \(0, inf\), got rms_norm_eps=0"),
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps must be a number, got rms_norm_eps=None"),
    "dropout": ({"attention_dropout": 2}, r"attention_dropout must lie in \[0, 1\), got attention_dropout=2"),
    "flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings must be a bool, got tie_word_embeddings=1"),
    "bias": ({"attention_bias": "yes"}, "attention_bias must be a bool, got attention_bias='yes'"),
    "window of llama": ({"sliding_window": 4}, "sliding_window must be null with model_type='llama', got 4"),
    "window of 0": ({**MISTRAL, "sliding_window": 0}, "sliding_window must be at least 1"),
    "layer types of llama": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types must be 'full_attention' without a sliding_window in use",
    ),
    "layer types of mistral": (
        {**MISTRAL, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types must agree with window=4 in all layers with model_type='mistral'",
    ),
    "layer types without a window": (
        {**QWEN2, "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types must be 'full_attention' without a sliding_window in use, got sliding_attention",
    ),
    "unknown layer type": (
        {**QWEN2, "layer_types": ["full_attention", "chunked_attention"]},
        r"layer_types must be one of \['full_attention', 'sliding_attention'\], got layer_types='chunked_attention'",
    ),
    "number of layer types": (
        {**QWEN2, "layer_types": ["full_attention"]},
        r"layer_types must be a list of num_hidden_layers=2 types, got \['full_attention'\]",
    ),
    "window flag": ({**QWEN3, "use_sliding_window": None}, "use_sliding_window must be a bool"),
    "window layers": ({**QWEN2, "max_window_layers": -1}, "max_window_layers must be at least 0, got"),
    "dynamic scaling": (
        rope(rope_type="dynamic"),
        "rope_type of rope_scaling must not depend on the length of the sequence, got 'dynamic'",
    ),
    "long scaling": (
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        "rope_type of rope_parameters must not depend on the length of the sequence, got 'longrope'",
    ),
    "unknown scaling": (
        rope(rope_type="yran"),
        r"rope_type of rope_scaling must be one of \['default', .*got .*'yran'; did you mean 'yarn'",
    ),
    "scaling of text": ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
    "scaling per layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters must be the same for all layers",
    ),
    "two scalings": (rope() | {"rope_parameters": {"rope_type": "default"}}, "must not both be given"),
    "unknown key of scaling": (rope(short_factor=[1.0]), "key of rope_scaling must be one of .*='short_factor'"),
    "scaling without a factor": ({"rope_scaling": {"type": "linear"}}, "factor must be given in rope_scaling with"),
    "llama 3 without factors": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2}},
        "low_freq_factor must be given in rope_scaling with rope_type 'llama3'",
    ),
    "factor of text": (rope(factor="4"), "factor must be a number, got factor='4'"),
    "original length": (rope(original_max_position_embeddings=0), "original_max_position_embeddings must be at least"),
    "huge factor": (rope(factor=1e308), "config.json: "),
    "huge theta": ({"rope_theta": 10**400}, "config.json: "),
    "theta": ({"rope_theta": -1}, "theta must be positive, got theta=-1"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    "one layer less": ({"num_hidden_layers": 1}, "unexpected 'model.layers.1.input_layernorm.weight', .* and 4 more"),
    "one layer more": ({"num_hidden_layers": 3}, "missing 'model.layers.2.input_layernorm.weight', .* and 4 more"),
    "biases": ({"attention_bias": True}, "missing 'model.layers.0.self_attn.k_proj.bias', .* and 3 more"),
    "norms of queries": ({**QWEN3, "head_dim": 4}, "missing 'model.layers.0.self_attn.k_norm.weight'"),
    "tied embeddings": ({"tie_word_embeddings": True}, "lm_head.weight must equal model.embed_tokens.weight"),
    "other sizes": ({"intermediate_size": 13}, r"gate_proj.weight' must have shape \(13, 8\), got \(12, 8\)"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_cannot_be_loaded_is_an_error_that_names_why(folder: Path, name: str) -> None:
    changes, message = CONFIGS[name]
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained_folder(folder)
    assert str(folder) in str(error.value)


def pickled(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def in_shards(edit: Callable[[Path, dict[str, str]], None]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, split(folder))


def outside(folder: Path, of: dict[str, str]) -> None:
    """An index that names an existing file outside the folder."""
    inner = folder / "inner"
    inner.mkdir()
    for path in (folder / "config.json", *folder.glob("model-*")):
        shutil.copyfile(path, inner / path.name)
    write_index(inner, {**of, QUERY: f"../{of[QUERY]}"})
    for path in (folder / "config.json", folder / INDEX):
        path.unlink()
    shutil.copytree(inner, folder, dirs_exist_ok=True)


# What is done to the folder, and the error.
FILES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no configuration": (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json does not exist"),
    "no JSON": (lambda d: (d / "config.json").write_text("{'model"), ValueError, "config.json must be JSON, got"),
    "deep JSON": (lambda d: (d / "config.json").write_text("[" * 10**6), ValueError, "config.json must be JSON, got"),
    "no text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\xfd"),
        ValueError,
        "config.json must be JSON, got",
    ),
    "a list": (lambda d: (d / "config.json").write_text("[]"), ValueError, "must hold a JSON object, got list"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, f"must have {WEIGHTS} or {INDEX}"),
    "pickled weights": (
        pickled,
        ValueError,
        "pickled files, which can run code, are not read, got pytorch_model.bin: convert them with save_pretrained",
    ),
    "a cut file": (lambda d: cut(d / WEIGHTS, 4000), ValueError, "must be a complete safetensors file, got"),
    "an empty file": (lambda d: cut(d / WEIGHTS, 0), ValueError, "must be a complete safetensors file, got"),
    "a missing tensor": (lambda d: edit_tensors(d, **{QUERY: None}), ValueError, f"missing '{QUERY}'$"),
    "an unexpected tensor": (
        lambda d: edit_tensors(d, extra=torch.ones(1)),
        ValueError,
        "must have the tensors of its config.json: unexpected 'extra'$",
    ),
    "a wrong shape": (
        lambda d: edit_tensors(d, **{QUERY: torch.ones(8, 9)}),
        ValueError,
        rf"tensor '{QUERY}' must have shape \(8, 8\), got \(8, 9\)",
    ),
    "integers": (
        lambda d: edit_tensors(d, **{QUERY: torch.ones(8, 8, dtype=torch.int8)}),
        ValueError,
        f"tensor '{QUERY}' must have a dtype of F64, F32, BF16, F16, got I8; quantized weights are not read",
    ),
    "no map in the index": (in_shards(lambda d, of: write_index(d, None)), ValueError, "must have a weight_map"),
    "an empty index": (in_shards(lambda d, of: write_index(d, {})), ValueError, "must have a weight_map"),
    "no JSON in the index": (in_shards(lambda d, of: cut(d / INDEX, 50)), ValueError, f"{INDEX} must be JSON, got"),
    "a file outside": (
        in_shards(outside),
        ValueError,
        "must name files in its folder, got '../model-.*'",
    ),
    "an absolute path": (
        in_shards(lambda d, of: write_index(d, {**of, QUERY: str(d / of[QUERY])})),
        ValueError,
        "must name files in its folder, got '/",
    ),
    "a number as a file": (
        in_shards(lambda d, of: write_index(d, {**of, QUERY: 3})),
        ValueError,
        "must name files in its folder, got 3",
    ),
    "a pickle in the index": (
        in_shards(lambda d, of: write_index(d, {**of, QUERY: "pytorch_model.bin"})),
        ValueError,
        "must name safetensors files, the only ones that are read, got 'pytorch_model.bin'",
    ),
    "a missing file": (
        in_shards(lambda d, of: (d / of[QUERY]).unlink()),
        FileNotFoundError,
        "model-0000[12]-of-00002.safetensors does not exist",
    ),
    "a tensor in another file": (
        in_shards(lambda d, of: write_index(d, {**of, QUERY: next(f for f in of.values() if f != of[QUERY])})),
        ValueError,
        f"must hold the tensors that {INDEX} names for it, not so '{QUERY}'",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_loaded_are_an_error_that_names_them(folder: Path, name: str) -> None:
    edit, kind, message = FILES[name]
    edit(folder)
    with pytest.raises(kind, match=message) as error:
        from_pretrained_folder(folder)
    assert isinstance(error.value, ValueError)
    assert str(folder) in str(error.value)


def test_a_missing_folder_and_an_invalid_dtype_are_errors(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"meta-llama/Llama-2 must be a folder with config.json"):
        from_pretrained_folder("meta-llama/Llama-2")
    with pytest.raises(ValueError, match=r"dtype must be one of \['torch.float64', .*'torch.int8'"):
        from_pretrained_folder(folder, dtype=torch.int8)
    with pytest.raises(TypeError, match="dtype must be of type dtype or None, got str"):
        from_pretrained_folder(folder, dtype="float32")  # type: ignore[arg-type]
