"""Small models, their losses, and what a file gives back."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model import LanguageModel, build_model

NAMES = ("bdh", "gpt", "llama")


def build(name: str, **options: Any) -> LanguageModel:
    """A model of two layers of 64, the same each time."""
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "dropout": 0.0, "vocab_size": 256}
    if name == "bdh":
        shape["mlp_internal_dim_multiplier"] = 16
    torch.manual_seed(0)
    sections = {"model": {"name": name, **shape, **options}, "training": {"block_size": 64}}
    return build_model(Config.from_dict(sections))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def saved_and_loaded(state: Any) -> Any:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
