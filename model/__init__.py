"""Models: tensors in, tensors out. They know nothing of data, devices, ranks or number formats."""

from model.interface import HiddenWeight, LanguageModel
from model.registry import MODELS, build_model

__all__ = ["MODELS", "HiddenWeight", "LanguageModel", "build_model"]
