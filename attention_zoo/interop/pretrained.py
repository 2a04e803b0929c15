"""Weights of Llama 2 and 3, Mistral, Qwen2 and Qwen3 in folders of `transformers`, as `LanguageModel`.

A folder is config.json and safetensors: JSON and tensors are read, nothing is executed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from attention_zoo._checks import check_choice, check_instance
from attention_zoo.interop.pretrained_config import Decoder, read_config, read_json
from attention_zoo.models import LanguageModel
from attention_zoo.saving.model_file import CONFIG, WEIGHTS, ModelFileNotFoundError

INDEX = f"{WEIGHTS}.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
RECOMPUTED = ".rotary_emb.inv_freq"  # a buffer in files of old versions of `transformers`


def from_pretrained_folder(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> LanguageModel:
    """Build the language model in a folder of `transformers`: Llama 2 and 3, Mistral, Qwen2 or Qwen3.

    The folder has a config.json, with `rope_theta` and `rope_scaling` or with `rope_parameters`, and the weights in
    model.safetensors or in the files that model.safetensors.index.json names. Everything is checked before the first
    weight is read: all tensors of the model are there with the shapes of the configuration, and no others.

    Layers with a sliding window are `window` blocks, the others `full`. Rotary features are paired as in the weights
    (`pairing="half"`). `max_seq_len` is max_position_embeddings, or the length to which linear or YaRN scaling
    stretches the positions where that is longer.

    Args:
        path: the folder.
        dtype: dtype of the parameters. None: that of each tensor in the file.
        device: device of the model.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: the folder, config.json or a file of weights is missing (also a ValueError).
        ValueError: the model is of another family or quantized, or asks for code of its own; a value in config.json is
            unknown or out of range; the weights are pickled; a file is damaged or outside the folder; or a tensor is
            missing, unexpected, of another shape or no floating point tensor. The message names it.
        TypeError: `dtype` is not a torch.dtype.

    Example:
        >>> model = from_pretrained_folder("Llama-3.2-1B", dtype=torch.bfloat16)
        >>> model.generate(prompt, 20)
    """
    check_instance(torch.dtype, type(None), dtype=dtype)
    if dtype is not None:
        check_choice("dtype", str(dtype), map(str, FLOATS.values()))
    check_instance(str, os.PathLike, path=path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch has no common error for them
        raise ValueError(f"device must be one of this machine, got {device!r}: {error}") from error
    folder = Path(path)
    if not folder.is_dir():
        raise ModelFileNotFoundError(f"{folder} must be a folder with {CONFIG} and {WEIGHTS}, as downloaded")
    decoder = read_config(folder / CONFIG)
    with ExitStack() as files:
        tensors = _open_tensors(folder, files)
        parameters = _check_tensors(folder, decoder, tensors)
        with torch.device("meta"):  # without memory for weights that are replaced
            model = _build(folder, decoder)
        state = {
            # cat copies: a tensor of a file would change with the file
            name: torch.cat([tensors[source].get_tensor(source) for source in sources]).to(device, dtype)
            for name, sources in parameters.items()
        }
    model.load_state_dict(state, assign=True)
    return model.eval()


def _build(folder: Path, decoder: Decoder) -> LanguageModel:
    try:
        return LanguageModel(**decoder.arguments())
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def _open_tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The open file of every tensor, by the tensor's name. The files are closed with `files`.

    Raises:
        FileNotFoundError, ValueError: see `from_pretrained_folder`.
    """
    if (folder / WEIGHTS).is_file():
        file = _open(folder / WEIGHTS, files)
        return dict.fromkeys(file.keys(), file)
    if not (folder / INDEX).is_file():
        pickled = sorted(found.name for pattern in PICKLES for found in folder.glob(pattern))
        if pickled:
            raise ValueError(
                f"{folder} must have its weights in {WEIGHTS}; pickled files, which can run code, are not read, got "
                f"{', '.join(pickled)}: convert them with save_pretrained of transformers"
            )
        raise ModelFileNotFoundError(f"{folder} must have {WEIGHTS} or {INDEX}")
    tensors: dict[str, Any] = {}
    for shard, names in _read_index(folder / INDEX).items():
        file = _open(folder / shard, files)
        if names != set(file.keys()):
            different = _some(names ^ set(file.keys()))
            raise ValueError(f"{folder / shard} must hold the tensors that {INDEX} names for it, not so {different}")
        tensors |= dict.fromkeys(names, file)
    return tensors


def _read_index(path: Path) -> dict[str, set[str]]:
    """The names of the tensors in every file of an index.

    Raises:
        ValueError: the index is damaged, or names a file outside the folder, or one that is no safetensors file.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path} must have a weight_map of tensors to files, got {index!r}")
    shards: dict[str, set[str]] = {}
    for name, shard in index.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise ValueError(f"{path} must name files in its folder, got {shard!r} for {name!r}")
        if not shard.endswith(".safetensors"):
            raise ValueError(f"{path} must name safetensors files, the only ones that are read, got {shard!r}")
        shards.setdefault(shard, set()).add(name)
    return shards


def _open(path: Path, files: ExitStack) -> Any:
    if not path.is_file():
        raise ModelFileNotFoundError(f"{path} does not exist")
    try:
        return files.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file, got {error}") from error


def _check_tensors(folder: Path, decoder: Decoder, tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tensors whose rows make up each parameter of the model, after a check of their names, shapes and dtypes.

    Raises:
        ValueError: see `from_pretrained_folder`.
    """
    found = {name for name in tensors if not name.endswith(RECOMPUTED)}
    parameters = dict(decoder.parameters())
    shapes = {name: shape for sources in parameters.values() for name, shape in sources.items()}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    copied = decoder.tied and head in found  # written by some, though it is the embedding again
    found -= {head} if copied else set()
    for names, what in ((shapes.keys() - found, "missing"), (found - shapes.keys(), "unexpected")):
        if names:
            raise ValueError(f"{folder} must have the tensors of its {CONFIG}: {what} {_some(names)}")
    for name, shape in shapes.items():
        header = tensors[name].get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise ValueError(f"{folder}: tensor {name!r} must have shape {shape}, got {tuple(header.get_shape())}")
        if header.get_dtype() not in FLOATS:
            raise ValueError(
                f"{folder}: tensor {name!r} must have a dtype of {', '.join(FLOATS)}, got {header.get_dtype()}; "
                "quantized weights are not read"
            )
    if copied and not torch.equal(tensors[head].get_tensor(head), tensors[embedding].get_tensor(embedding)):
        raise ValueError(f"{folder}: {head} must equal {embedding} with tie_word_embeddings=true")
    return {name: list(sources) for name, sources in parameters.items()}


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first of the names, and the number of the others."""
    first, *others = sorted(names)
    shown, rest = [first, *others[: most - 1]], len(others) - most + 1
    return ", ".join(map(repr, shown)) + (f" and {rest} more" if rest > 0 else "")
