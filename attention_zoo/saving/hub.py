"""Uploads to the Hugging Face hub with huggingface_hub's mixin.

Needs: pip install attention-zoo[hub]
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def import_hub() -> Any:
    """The module huggingface_hub.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise ImportError("the hub needs huggingface_hub: pip install attention-zoo[hub]")
    import huggingface_hub

    return huggingface_hub


def push(model: Any, card: str, repo_id: str, options: dict[str, Any]) -> str:
    """Upload the files of `model.save` and a card with huggingface_hub's mixin. Returns the address on the hub."""
    import_hub()
    from huggingface_hub import ModelCard, ModelHubMixin

    class OnHub(ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            model.save(save_directory)

        def generate_model_card(self, **_: Any) -> Any:
            return ModelCard(card)

    return str(OnHub().push_to_hub(repo_id, **options))
