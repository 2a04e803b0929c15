"""Saving and loading of models: a folder with safetensors and JSON, the Hugging Face hub, and model cards."""

from attention_zoo.saving.saved_model import SavedModel

__all__ = ["SavedModel"]
