"""Errors of weights and arguments that do not fit, and conversion of files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import cli
from attention_zoo.interop import PACKAGES, convert, from_upstream, load
from attention_zoo.saving.model_file import write_model
from tests.interop.replay import RUN

RECORDS = Path(__file__).parents[1] / "data" / "upstream"


def record(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = torch.load(RECORDS / f"{name}.pt", weights_only=True)
    return found["meta"], found["state_dict"]


def build(meta: dict[str, Any], weights: dict[str, Tensor], **changes: Any) -> torch.nn.Module:
    return from_upstream(meta["package"], meta["cls"], weights, **{**meta["kwargs"], **changes})


def test_an_unexpected_weight_raises_an_error_with_its_name() -> None:
    meta, weights = record("gateloop_simple")
    with pytest.raises(ValueError, match=r"unexpected keys \['to_surprise.weight'\]"):
        build(meta, {**weights, "to_surprise.weight": torch.ones(3)})


LAYERS = ("cosine_attention", "gateloop_simple", "quartic_attention_mlp")  # whole models are among the slow tests


@pytest.mark.parametrize(
    "name_of_record",
    [
        pytest.param(path.stem, marks=[] if path.stem in LAYERS else [pytest.mark.slow])
        for path in sorted(RECORDS.glob("*.pt"))
    ],
)
def test_each_missing_weight_raises_an_error_with_its_name(name_of_record: str) -> None:
    meta, weights = record(name_of_record)
    unused = ("pos_emb", "transformer.pos_emb")  # recomputed
    ablated = [name for name in weights if "to_a" in name] if "ablate" in name_of_record else []
    for name in weights:
        if name in unused or (meta["package"] == "gateloop-transformer" and name in ablated):
            continue
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        with pytest.raises(ValueError, match=f"{name!r}"):
            build(meta, rest, **(meta["forward_kwargs"] if ablated else {}))


def test_a_weight_of_the_wrong_shape_raises_an_error_with_both_shapes() -> None:
    meta, weights = record("gateloop_simple")
    with pytest.raises(ValueError, match=r"to_qkva.0.weight \(72, 24\) cannot become to_qkva.weight \(36, 12\)"):
        build(meta, {**weights, "norm.gamma": torch.ones(12)}, dim=12)


def test_shared_layers_must_have_equal_weights() -> None:
    meta, weights = record("dalle_transformer_norotary")
    attention = "fn.fn.fn.to_qkv.weight"
    same = {name: weights[name.replace("layers.layers.2.0.fn.fn", "layers.layers.0.0.fn.fn")] for name in weights}
    arguments = {"attn_types": ["full"], "shared_attn_ids": [0, 1, 0, 2]}
    stack = build(meta, same, **arguments)
    assert stack.layers[0].sublayers[0].block is stack.layers[2].sublayers[0].block
    changed = {**same, f"layers.layers.2.0.{attention}": torch.zeros(81, 24)}
    with pytest.raises(ValueError, match=f"layers.layers.2.0.{attention}' and 'layers.layers.0.0.{attention}'"):
        build(meta, changed, **arguments)


def test_weights_of_the_image_autoencoder_are_left_out() -> None:
    meta, weights = record("dalle_model_logits")
    model = build(meta, {**weights, "vae.codebook.weight": torch.ones(3)})
    assert not [name for name, _ in model.named_parameters() if "vae" in name]


def test_older_names_of_the_image_positions_load() -> None:
    meta, weights = record("dalle_model_loss")
    older = {name.replace("image_pos_emb.weights.", "image_pos_emb.weights_"): weights[name] for name in weights}
    torch.testing.assert_close(build(meta, older).state_dict(), build(meta, weights).state_dict(), rtol=0, atol=0)


def test_a_loaded_module_has_the_dtype_of_its_weights_and_is_in_eval_mode() -> None:
    meta, weights = record("cosine_transformer_postnorm")
    model = build(meta, {name: tensor.double() for name, tensor in weights.items()})
    assert not model.training
    assert model(torch.ones(1, 3, dtype=torch.int64)).dtype == torch.float64


def test_a_loaded_module_does_not_share_memory_with_the_given_weights() -> None:
    meta, weights = record("gateloop_simple")
    block = build(meta, weights)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert weights["norm.gamma"].abs().sum() > 0


@pytest.mark.parametrize(
    ("package", "cls", "arguments", "message"),
    [
        ("memfromer", "Memformer", {}, "did you mean 'memformer'"),
        ("memformer", "Memfromer", {}, "did you mean 'Memformer'"),
        ("memformer", "Attention", {"dim": 8, "head": 2}, "did you mean 'heads'"),
        ("memformer", "Attention", {}, r"arguments must hold \['dim'\]"),
        ("memformer", "Memformer", {"dim": 8, "num_memory_slots": 1, "enc_num_tokens": 2, "enc_depth": 1}, "dec_depth"),
        ("gateloop-transformer", "CausalFullAttention", {"dim": 8, "data_dependent_rel_pos": True}, "over pairs"),
        (
            "gateloop-transformer", "Transformer",
            {"dim": 8, "num_tokens": 3, "depth": 1, "use_gate_looped_attn": False, "data_dependent_rel_pos": True},
            "RelativeGateAttention",
        ),
        (
            "DALLE-pytorch", "Transformer",
            {"dim": 8, "depth": 1, "seq_len": 320, "attn_types": ["sparse"], "image_fmap_size": 8}, "not saved",
        ),
        ("DALLE-pytorch", "Transformer", {"dim": 8, "depth": 1, "seq_len": 30}, "image_fmap_size must be given"),
        ("DALLE-pytorch", "Transformer", {"dim": 8, "depth": 1, "seq_len": 30, "attn_types": ["ful"]}, "mean 'full'"),
        ("DALLE-pytorch", "SparseAxialCausalAttention", {"dim": 8, "seq_len": 31, "axis": 2}, "axis must be 0 or 1"),
        ("DALLE-pytorch", "SparseConvCausalAttention", {"dim": 8, "seq_len": 31}, "image_size must leave text"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_loaded_raise_an_error_with_the_reason(
    package: str, cls: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_upstream(package, cls, {}, **arguments)


def test_the_norm_of_non_linear_talking_heads_must_have_equal_entries() -> None:
    meta, weights = record("quartic_attention_mlp")
    scale = torch.linspace(0.5, 1.5, 19)
    with pytest.raises(ValueError, match="equal entries, got 19 different ones: it has one entry per key"):
        build(meta, {**weights, "pre_talking_heads.fn.0.scale": scale})


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("linear", [True, False])
def test_weights_that_mix_two_rows_raise_an_error_for_an_odd_number_of_streams(streams: int, linear: bool) -> None:
    meta, weights = record("quartic_multistream_shared_emb")
    kernel = "weight" if linear else "fn.1.weight"
    weights = {name.replace("talking_heads.weight", f"talking_heads.{kernel}"): weights[name] for name in weights}
    with pytest.raises(
        ValueError, match=f"num_streams must be even .* got {streams}: the package mixes rows two by two"
    ):
        build(meta, weights, num_streams=streams, non_linear_talking_heads=not linear)


def memformer_attention() -> torch.nn.Module:
    meta, weights = record("memformer_attention_masks")
    return build(meta, weights, causal=True)


def test_causal_attention_to_a_longer_context_is_aligned_at_the_last_key() -> None:
    layer = memformer_attention()
    x, context = torch.randn(2, 3, 24), torch.randn(2, 5, 24)
    out = layer(x, context)
    for query in range(3):
        alone = layer(x[:, query : query + 1], context[:, : query + 3])
        torch.testing.assert_close(out[:, query : query + 1], alone)


@pytest.mark.parametrize(("keys", "attend_self"), [(2, False), (0, False), (5, True)])
def test_causal_attention_without_a_defined_alignment_raises_an_error(keys: int, attend_self: bool) -> None:
    with pytest.raises(ValueError, match=f"causal=True, .* got 3 queries and {keys + 3 * attend_self} keys"):
        memformer_attention()(torch.randn(2, 3, 24), torch.randn(2, keys, 24), attend_self=attend_self)


def test_a_memory_that_is_never_written_is_the_same_after_every_segment() -> None:
    meta, weights = record("memformer_encoder_only")
    model = build(meta, weights, num_mem_updates=0)
    segment = torch.randint(0, meta["kwargs"]["enc_num_tokens"], (2, 6))
    output = model(segment)
    assert torch.equal(output.memory, weights["memory_slots"].expand(2, -1, -1))
    assert torch.equal(model(segment, memory=output.memory).encoded, output.encoded)
    assert not [name for name, _ in model.named_parameters() if name.startswith("update")]


def test_a_static_mask_in_the_state_dict_is_applied() -> None:
    meta, weights = record("dalle_attention_causal_mask")
    x, pattern = torch.randn(2, 22, 24), torch.rand(22, 22).fill_diagonal_(0) < 0.5
    want = build(meta, weights, static_mask=pattern)(x)
    torch.testing.assert_close(build(meta, {**weights, "static_mask": pattern})(x), want, rtol=0, atol=0)
    assert not torch.allclose(build(meta, weights)(x), want)
    with pytest.raises(ValueError, match="static_mask must be the one in the state_dict"):
        build(meta, {**weights, "static_mask": pattern}, static_mask=~pattern)


def test_a_state_dict_must_map_names_to_tensors() -> None:
    with pytest.raises(TypeError, match="state_dict must map names to tensors, got 'dim': int"):
        from_upstream("memformer", "Attention", {"dim": 8}, dim=8)  # type: ignore[dict-item]


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.pt")), ids=lambda path: path.stem)
def test_a_converted_folder_loads_with_the_same_weights(path: Path, tmp_path: Path) -> None:
    meta, weights = record(path.stem)
    torch.save(weights, tmp_path / "old.pt")
    account = convert(meta["package"], meta["cls"], tmp_path / "old.pt", tmp_path / "new", arguments=meta["kwargs"])
    assert set(account) == set(weights)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    again, direct = load(tmp_path / "new"), build(meta, weights)
    torch.testing.assert_close(dict(again.state_dict()), dict(direct.state_dict()), rtol=0, atol=0)


def test_shared_embeddings_survive_conversion(tmp_path: Path) -> None:
    meta, weights = record("dalle_model_logits")
    arguments = {**meta["kwargs"], "share_input_output_emb": True}
    shared = {name: tensor for name, tensor in weights.items() if not name.endswith("_emb.weight")}
    for name in ("text_emb", "image_emb"):
        shared |= {f"{name}.linear.{kind}": weights[f"to_logits.1.{kind}"] for kind in ("weight", "bias")}
    torch.save(shared, tmp_path / "old.pt")
    account = convert(meta["package"], meta["cls"], tmp_path / "old.pt", tmp_path / "new", arguments=arguments)
    assert account["text_emb.linear.weight"] == "repeats to_logits.1.weight"
    model = load(tmp_path / "new")
    torch.testing.assert_close(model.state_dict()["to_logits.weight"], weights["to_logits.1.weight"], rtol=0, atol=0)


def test_a_training_checkpoint_supplies_its_arguments(tmp_path: Path) -> None:
    meta, weights = record("dalle_model_logits")
    given = {name: meta["kwargs"][name] for name in ("num_image_tokens", "image_fmap_size")}
    hparams = {name: value for name, value in meta["kwargs"].items() if name not in given}
    file = {"hparams": hparams, "vae_params": None, "epoch": 3, "weights": weights}
    torch.save(file, tmp_path / "dalle.pt")
    convert(meta["package"], meta["cls"], tmp_path / "dalle.pt", tmp_path / "new", arguments=given)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["arguments"] == {**hparams, **given}


class RunsCode:
    """A pickle of this class calls a function when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_raises_an_error_and_is_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"to_q.weight": RunsCode(tmp_path / "ran")}, tmp_path / "evil.pt")
    call = ["convert", "memformer", "Attention", str(tmp_path / "evil.pt"), str(tmp_path / "new")]
    assert cli.main(call) == 2
    assert "as it runs code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()


def test_the_convert_command_prints_the_new_name_of_each_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, weights = record("gateloop_transformer")
    torch.save(weights, tmp_path / "old.pt")
    (tmp_path / "arguments.json").write_text(json.dumps(meta["kwargs"]))
    call = ["convert", meta["package"], meta["cls"], str(tmp_path / "old.pt"), str(tmp_path / "new")]
    assert cli.main([*call, "--arguments", str(tmp_path / "arguments.json")]) == 0
    printed = capsys.readouterr().out
    assert "layers.1.0.norm.gamma" in printed
    assert "stack.layers.1.sublayers.0.residual.norm.weight" in printed
    assert load(tmp_path / "new").num_tokens == 41


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no weights", "must be a file of torch.save|runs code"), (b"", "must be a file of torch.save")],
)
def test_a_damaged_file_raises_a_value_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert("memformer", "Attention", tmp_path / "old.pt", tmp_path / "new", arguments={"dim": 8})


def test_a_damaged_converted_folder_raises_a_value_error(tmp_path: Path) -> None:
    meta, weights = record("gateloop_simple")
    torch.save(weights, tmp_path / "old.pt")
    convert(meta["package"], meta["cls"], tmp_path / "old.pt", tmp_path, arguments=meta["kwargs"])
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a complete safetensors file"):
        load(tmp_path)
    write_model(tmp_path, weights, {"package": "memformer"})
    with pytest.raises(ValueError, match="configuration with 'class'"):
        load(tmp_path)


def test_every_upstream_class_has_a_loader() -> None:
    assert {package: sorted(classes) for package, classes in PACKAGES.items()} == {
        "quartic-transformer": ["Attention", "MultiStreamTransformer"],
        "flash-cosine-sim-attention": ["Attention", "CosineSimCausalTransformer"],
        "gateloop-transformer": ["CausalFullAttention", "GateLoopedAttention", "SimpleGateLoopLayer", "Transformer"],
        "memformer": ["Attention", "Memformer"],
        "DALLE-pytorch": [
            "Attention", "DALLE", "SparseAxialCausalAttention", "SparseConvCausalAttention", "Transformer",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("stable", [False, True])
def test_a_loaded_text_to_image_model_decodes_in_steps(stable: bool) -> None:
    meta, weights = record("dalle_model_logits")
    model = build(meta, weights, stable=stable)
    inputs = torch.load(RECORDS / "dalle_model_logits.pt", weights_only=True)["inputs"]
    tokens = model.tokens(inputs["text"], inputs["image"])
    with torch.no_grad():
        out, state = model.step(tokens[:, :8])
        parts = [out]
        for index in range(8, tokens.shape[1]):
            out, state = model.step(tokens[:, index : index + 1], state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), model(inputs["text"], inputs["image"]))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cosine_transformer_postnorm", {}),
        ("dalle_model_logits", {"stable": True}),
        ("gateloop_transformer", {}),
        ("memformer_seq2seq_mems_mask", {}),
        ("memformer_encoder_only", {"num_mem_updates": 0}),
        ("quartic_multistream_shared_emb", {}),
    ],
)
def test_a_loaded_model_computes_the_same_after_saving(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    meta, weights = record(name)
    inputs = torch.load(RECORDS / f"{name}.pt", weights_only=True)["inputs"]
    model = build(meta, weights, **changes)
    model.save(tmp_path)
    run = RUN[meta["package"], meta["cls"]]
    want, got = (run(each, dict(inputs), meta["forward_kwargs"]) for each in (model, type(model).load(tmp_path).eval()))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
