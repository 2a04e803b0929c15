"""Models on the Hugging Face hub, through huggingface_hub's mixin: the files of `save`, and a model card.

Needs: pip install attention-zoo[hub]
"""

from __future__ import annotations

import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile, rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from attention_zoo._files import write_all_aside
from attention_zoo.saving.model_card import write_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelHubMixin

CARD = "README.md"


class HubMethods:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a model that has `save` and `load`."""

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
        folder = Path(directory)
        hub: Any = _hub_class()(self)
        facts = {"data": data, "score": score, "command": command}
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".saving.*"):  # of a save that was killed
            rmtree(leftover, ignore_errors=True)
        # The mixin deletes an existing configuration before it writes, so it writes to a temporary folder.
        with TemporaryDirectory(dir=folder, prefix=".saving.") as aside:
            hub.save_pretrained(aside, model_card_kwargs=facts)
            new = [file for file in Path(aside).iterdir() if file.name != CARD or not (folder / CARD).exists()]
            write_all_aside({folder / file.name: partial(copyfile, file) for file in new})
        if not push_to_hub:
            return None
        hub.card = (folder / CARD).read_text(encoding="utf-8")  # may be the user's own card
        return str(hub.push_to_hub(repo_id or folder.name, **options))

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
        source, loadable = str(name), cast(Any, cls)
        if os.path.isdir(source):
            return cast(Self, loadable.load(source, device=device))
        if os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
            raise FileNotFoundError(f"{source} does not exist, and a repository is called 'owner/name'")
        download = {"revision": revision, "token": token, "cache_dir": cache_dir, "force_download": force_download}
        hub: Any = _hub_class()
        try:
            found = hub.from_pretrained(source, kind=cls, device=device, local_files_only=local_files_only, **download)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:  # the mixin reads the file too
            raise ValueError(f"config.json of {source} must be a JSON object, got {error}") from error
        return cast(Self, found.model)

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
        hub: Any = _hub_class()(self)
        facts = {"data": data, "score": score, "command": command}
        return str(hub.push_to_hub(repo_id, model_card_kwargs=facts, **options))


def _hub_class() -> type[ModelHubMixin]:
    """A class whose instances wrap a model for huggingface_hub's mixin.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise ImportError("the hub needs huggingface_hub: pip install attention-zoo[hub]")
    from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

    class OnHub(ModelHubMixin):
        def __init__(self, model: Any) -> None:
            self.model = model
            self.card: str | None = None  # replaces the generated card

        def _save_pretrained(self, save_directory: Path) -> None:
            self.model.save(save_directory)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> OnHub:
            kind, device = options.pop("kind"), options.pop("device")
            folder = snapshot_download(model_id, allow_patterns=["config.json", "model.safetensors"], **options)
            return cls(kind.load(folder, device=device))

        def generate_model_card(self, **facts: str | None) -> ModelCard:
            return ModelCard(self.card or write_card(self.model, **facts))

    return OnHub
