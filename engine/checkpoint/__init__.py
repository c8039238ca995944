"""Saving and loading the state of a run; `load_model` for anybody who wants the trained model."""

from engine.checkpoint.trained_model import load_model

__all__ = ["load_model"]
