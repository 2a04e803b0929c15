"""Models on the Hugging Face hub, through huggingface_hub's mixin: the files of `save`, and a model card.

Needs: pip install attention-zoo[hub]
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch

from attention_zoo._files import write_aside
from attention_zoo.saving.model_card import write_card

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
        _import_hub()
        model: Any = self
        model.save(directory)
        card = Path(directory, CARD)
        if not card.exists():
            text = write_card(model, data=data, score=score, command=command)
            write_aside(card, lambda path: Path(path).write_text(text, encoding="utf-8"))
        if not push_to_hub:
            return None
        return _push(model, card.read_text(encoding="utf-8"), repo_id or card.parent.name, options)

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
        model_class: Any = cls
        if os.path.isdir(source):
            return model_class.load(source, device=device)
        if os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
            raise FileNotFoundError(f"{source} does not exist, and a repository is called 'owner/name'")
        folder = _import_hub().snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=["config.json", "model.safetensors"],
        )
        return model_class.load(folder, device=device)

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
        return _push(self, write_card(self, data=data, score=score, command=command), repo_id, options)


def _import_hub() -> ModuleType:
    """The module huggingface_hub.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise ImportError("the hub needs huggingface_hub: pip install attention-zoo[hub]")
    import huggingface_hub

    return huggingface_hub


def _push(model: Any, card: str, repo_id: str, options: dict[str, Any]) -> str:
    """Upload the files of `model.save` and a card with huggingface_hub's mixin. Returns the address on the hub."""
    hub = _import_hub()

    class OnHub(hub.ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            model.save(save_directory)

        def generate_model_card(self, **_: Any) -> Any:
            return hub.ModelCard(card)

    return str(OnHub().push_to_hub(repo_id, **options))
