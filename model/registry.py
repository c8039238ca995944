"""The models by their name in `model.name`."""

from __future__ import annotations

from collections.abc import Callable

from config import Config
from model.bdh import BDH
from model.gpt import GPT
from model.interface import LanguageModel
from model.llama import Llama

MODELS: dict[str, Callable[[Config], LanguageModel]] = {
    "bdh": lambda config: BDH(config.to_bdh_config()),
    "gpt": lambda config: GPT(config.model, config.training.block_size),
    "llama": lambda config: Llama(config.model),
}


def build_model(config: Config) -> LanguageModel:
    """Builds the model that `config.model` describes, on the CPU, with freshly drawn weights."""
    model = MODELS[config.model.name](config)
    model.recompute = config.training.recompute == "layer"
    return model
