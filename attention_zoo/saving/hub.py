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

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelHubMixin

CARD = "README.md"
FACTS = ("data", "score", "command")  # what a card tells beside the configuration


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
        """Write what `save` writes and a model card, README.md, as huggingface_hub's mixin does; needs the extra `hub`.

        Files are replaced only by whole new ones; a README.md that is there already is kept.

        Args:
            directory: where to write; `load` and `from_pretrained` read it.
            data, score, command: sentences for the card: what the model was trained on, how well it does, what made it.
            push_to_hub: send it to the hub too, as `repo_id`, by default the folder's name.
            options: those of `push_to_hub`, with which alone they make sense.

        Returns:
            Where it is on the hub, if it was sent there.

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
        with TemporaryDirectory(dir=folder, prefix=".saving.") as aside:  # the mixin removes the old config at once
            hub.save_pretrained(aside, model_card_kwargs=facts)
            new = [file for file in Path(aside).iterdir() if file.name != CARD or not (folder / CARD).exists()]
            write_all_aside({folder / file.name: partial(copyfile, file) for file in new})
        if not push_to_hub:
            return None
        hub.card = (folder / CARD).read_text(encoding="utf-8")  # which may be one of the user's own
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
        """Build a model from a folder that `save_pretrained` or `save` wrote, or from the hub, with the extra `hub`.

        Args:
            name: a folder, or a repository, "who/what".
            device: where the weights go.
            revision, token, cache_dir, force_download, local_files_only: of a repository; see huggingface_hub.

        Raises:
            ImportError: it is no folder, and huggingface_hub is not installed.
            FileNotFoundError, ValueError: see `load`.
        """
        place, self_made = str(name), cast(Any, cls)
        if os.path.isdir(place):
            return cast(Self, self_made.load(place, device=device))
        if os.path.isabs(place) or place.startswith(".") or place.count("/") > 1:
            raise FileNotFoundError(f"{place} does not exist, and a repository is called 'who/what'")
        download = {"revision": revision, "token": token, "cache_dir": cache_dir, "force_download": force_download}
        hub: Any = _hub_class()
        try:
            found = hub.from_pretrained(place, kind=cls, device=device, local_files_only=local_files_only, **download)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:  # of the mixin's own look at it
            raise ValueError(f"config.json of {place} must be a JSON object, got {error}") from error
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
        """Send what `save_pretrained` writes to the hub; needs the extra `hub`.

        Args:
            repo_id: "who/what".
            data, score, command: see `save_pretrained`.
            options: private, branch, token, commit_message, ...: see huggingface_hub.

        Returns:
            Where it is.
        """
        hub: Any = _hub_class()(self)
        facts = {"data": data, "score": score, "command": command}
        return str(hub.push_to_hub(repo_id, model_card_kwargs=facts, **options))


def _hub_class() -> type[ModelHubMixin]:
    """The class whose instances hold a model and do what the mixin does with it.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise ImportError("the hub needs huggingface_hub: pip install attention-zoo[hub]")
    from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

    class OnHub(ModelHubMixin):
        def __init__(self, model: Any) -> None:
            self.model = model
            self.card: str | None = None  # in place of the one that would be written

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


def write_card(model: Any, **facts: str | None) -> str:
    """A model card in Markdown: what the model is, how to load it, its configuration, and the facts that are known.

    Args:
        model: any model of the zoo.
        facts: a sentence each: `data` it was trained on, its `score`, the `command` that made it.
    """
    name, package = type(model).__name__, type(model).__module__
    if package.startswith("attention_zoo."):
        package = "attention_zoo"
    size = sum(parameter.numel() for parameter in model.parameters())
    known = "".join(f"\n## {fact.capitalize()}\n\n{facts.get(fact) or 'Not stated.'}\n" for fact in FACTS)
    return f"""---
library_name: attention-zoo
tags:
- attention-zoo
---

# {name}

A `{name}` of attention_zoo, {size:,} parameters. `pip install attention-zoo`, then:

```python
from {package} import {name}

model = {name}.from_pretrained("...")  # this repository, or a folder with its files
```
{known}
## Configuration

```json
{json.dumps(model.arguments, indent=2)}
```
"""
