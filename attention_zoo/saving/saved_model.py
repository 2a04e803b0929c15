"""Save and load: one file with weights and configuration, from which the same function is built, or an error."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from attention_zoo._arguments import RecordsArguments, takes_any_keyword
from attention_zoo._files import write_aside
from attention_zoo.saving.compare import first_difference, is_foreign
from attention_zoo.saving.encoding import decode, encode
from attention_zoo.saving.hub import import_hub, push
from attention_zoo.saving.model_card import write_card
from attention_zoo.saving.model_file import CONFIG, WEIGHTS, ModelFile, package_version, read_model, write_model

CARD = "README.md"
Model = TypeVar("Model", bound=nn.Module)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Arguments of which each unit takes at least a byte of the file, so that a small file cannot ask for a large model.
HEADS = {"heads", "kv_heads", "qk_heads", "v_heads"}
SIZES = {"dim", "dim_head", "dim_inner", "streams", "memory_slots", "num_tokens", *HEADS}


class SavedModel(RecordsArguments, nn.Module):
    """A model that `save` writes to a folder and `load` rebuilds; the `_pretrained` methods use the hub as well.

    A subclass needs no code for it: the arguments of its constructor are recorded.
    """

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `model.safetensors`: the weights, the configuration, and a CRC32 of both, in one atomic replacement.

        The configuration is the arguments of the constructor. The model is compared with the one that these arguments
        build, so that an edited model is never loaded as another function. `config.json` is a copy of the
        configuration for readers; `load` does not read it.

        Raises:
            TypeError: an argument cannot be written as JSON, such as a block of a class that is not registered, or
                the parameters are sharded over processes. Nothing is written.
            ValueError: the model differs from its configuration; the message names the first difference. Nothing is
                written.
            OSError: a file could not be written. An existing model is unchanged.
        """
        if any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):  # DTensor is slow to import
            raise TypeError(
                "the model's parameters must not be sharded over processes to be saved: load the result of "
                "training.gather_weights(model) into a model with the same arguments, and save that model"
            )
        arguments = encode(self.saved_arguments())
        # the outputs of modules of other packages are compared as well, which needs memory for their weights
        twin = None if any(map(is_foreign, self.modules())) else _build_on_meta(type(self), arguments)
        difference = first_difference(self, _build(type(self), arguments) if twin is None else twin)
        if difference is not None:
            raise ValueError(
                f"the model must equal its configuration to be saved, but {difference}; "
                "see replace_block, or save its state_dict()"
            )
        config = {"class": type(self).__name__, "version": package_version(), "arguments": arguments}
        write_model(Path(directory), unique_tensors(self), config)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """Build the model written by `save`. No code from the file is executed; blocks of other packages are
        found by the name under which `register_block` registered them.

        Args:
            directory: the folder.
            device: device of the model.

        Raises:
            ValueError: the file is missing (also a FileNotFoundError), damaged, of another class, or does not fit; the
                message names the field.
        """
        file = read_model(Path(directory))
        arguments = _check_config(file, cls)
        try:
            shell = _build_on_meta(cls, arguments)
            if shell is not None:
                _check_tensors(shell, file)
            model = _build(cls, arguments)
        except (TypeError, LookupError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{file.path}: the configuration must build a {cls.__name__}, got {error}") from error
        _check_tensors(model, file)
        with torch.no_grad():
            for name, tensor in unique_tensors(model).items():
                tensor.data = file.tensors[name]  # in the dtype of the file, such as bfloat16
        return model.to(device)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        data: str | None = None,
        score: str | None = None,
        command: str | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> str | None:
        """Write the files of `save` and a model card, README.md.

        Files are replaced only by complete new ones. A README.md that exists is kept. Needs the extra `hub`.

        Args:
            directory: the folder to write to, which `load` and `from_pretrained` read.
            data, score, command: sentences for the card: the training data, the model's score, the command that
                trained it.
            push_to_hub: whether to upload the files to the hub.
            repo_id: the repository, "owner/name". None: the folder's name.
            options: passed to huggingface_hub's `push_to_hub`; only with push_to_hub=True.

        Returns:
            The address on the hub, or None without push_to_hub.

        Raises:
            ImportError: huggingface_hub is not installed.
            TypeError: see `save`; or options without push_to_hub=True.
        """
        if options and not push_to_hub:
            raise TypeError(f"options must come with push_to_hub=True, got {', '.join(sorted(options))}")
        import_hub()
        self.save(directory)
        card = Path(directory, CARD)
        if not card.exists():
            text = write_card(self, data=data, score=score, command=command)
            write_aside(card, lambda path: Path(path).write_text(text, encoding="utf-8"))
        if not push_to_hub:
            return None
        return push(self, card.read_text(encoding="utf-8"), repo_id or card.parent.name, options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Build a model from a folder written by `save_pretrained` or `save`, or from the hub with the extra `hub`.

        Args:
            name: a folder, or a repository "owner/name".
            device: device of the model.
            revision, token, cache_dir, force_download, local_files_only: of a repository; see huggingface_hub.

        Raises:
            ImportError: `name` is not a folder and huggingface_hub is not installed.
            FileNotFoundError, ValueError: see `load`.
        """
        source = str(name)
        if os.path.isdir(source):
            return cls.load(source, device=device)
        if os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
            raise FileNotFoundError(f"{source} does not exist, and a repository is called 'owner/name'")
        folder = import_hub().snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS],
        )
        return cls.load(folder, device=device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        data: str | None = None,
        score: str | None = None,
        command: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the files of `save_pretrained` to the hub. Needs the extra `hub`.

        Args:
            repo_id: "owner/name".
            data, score, command: see `save_pretrained`.
            options: private, branch, token, commit_message, ...: see huggingface_hub.

        Returns:
            The address on the hub.
        """
        return push(self, write_card(self, data=data, score=score, command=command), repo_id, options)


def _build(cls: type[Model], arguments: Mapping[str, Any]) -> Model:
    """A model from encoded arguments. The random state does not change."""
    with torch.random.fork_rng(devices=[]):
        return cls(**decode(arguments))


def _build_on_meta(cls: type[Model], arguments: Mapping[str, Any]) -> Model | None:
    """The model without memory for its weights; None if a constructor needs the values of its weights."""
    try:
        with torch.device("meta"):
            return _build(cls, arguments)
    except Exception:  # whatever a constructor raises here, it raises again with memory unless meta tensors caused it
        return None


def _check_config(file: ModelFile, cls: type[SavedModel]) -> dict[str, Any]:
    """The encoded arguments in the configuration of a file.

    Raises:
        ValueError: the configuration has other fields, is of another class, or has an argument that `cls` does not have
            or that is too large for the file.
    """
    fields = ("class", "version", "arguments")
    if not isinstance(file.config, dict) or sorted(file.config) != sorted(fields):
        raise ValueError(f"{file.path}: the configuration must have the fields {', '.join(fields)}, got {file.config}")
    if file.config["class"] != cls.__name__:
        raise ValueError(f"{file.path}: field 'class' must be {cls.__name__!r}, got {file.config['class']!r}")
    arguments = file.config["arguments"]
    if not isinstance(arguments, dict):
        raise ValueError(f"{file.path}: field 'arguments' must be an object, got {arguments!r}")
    known = inspect.signature(cls).parameters
    if not takes_any_keyword(known):
        for name in arguments:
            if name not in known:
                raise ValueError(f"{file.path}: unknown argument {name!r} of {cls.__name__}")
    for name, number in _numbers("", arguments):
        limit = len(file.tensors) if name.endswith("depth") else file.size
        if number > limit and (name.endswith(("depth", "num_tokens")) or name in SIZES):
            raise ValueError(f"{file.path}: {name} must fit the file, which allows {limit}, got {number}")
    return arguments


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """All integers in a configuration with the name of the argument that they are in."""
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else ((name, item) for item in value):
            yield from _numbers(key, item)


def _check_tensors(model: nn.Module, file: ModelFile) -> None:
    """Check that the tensors of a file are those of a model.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or kind of dtype.
    """
    wanted = unique_tensors(model)
    for name in sorted(wanted.keys() | file.tensors.keys()):
        if name not in file.tensors:
            raise ValueError(f"{file.path}: missing tensor {name!r}")
        if name not in wanted:
            raise ValueError(f"{file.path}: unexpected tensor {name!r}")
        want, got = wanted[name], file.tensors[name]
        if want.shape != got.shape:
            raise ValueError(
                f"{file.path}: tensor {name!r} must have shape {tuple(want.shape)}, got {tuple(got.shape)}"
            )
        if want.dtype != got.dtype and not (want.dtype in FLOATS and got.dtype in FLOATS):
            raise ValueError(f"{file.path}: tensor {name!r} must have dtype {want.dtype}, got {got.dtype}")


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with tied tensors once, under the first of their names."""
    tensors = model.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first_names[id(tensor)] == name}
