"""Saving and loading models: a folder of safetensors and JSON, and the Hugging Face hub."""

from attention_zoo.saving.saved_model import SavedModel

__all__ = ["SavedModel"]
