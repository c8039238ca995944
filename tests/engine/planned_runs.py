"""Configs of small runs, and the estimator of their memory."""

from __future__ import annotations

from typing import Any

import torch

from config import Config
from engine.hardware.distributed import World
from engine.planning.memory import MemoryEstimator
from engine.precision.precision import Precision
from model import build_model

CPU = World(0, 1, torch.device("cpu"))
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"n_layer": 2, "n_embd": 64, "mlp_internal_dim_multiplier": 16, "dropout": 0.0},
    "training": {"block_size": 128, "batch_size": 4},
    "low_precision": {"use_4bit": False},
    "system": {"device": "cpu"},
}


def configured(**sections: dict[str, Any]) -> Config:
    """Returns the config of a small run on a CPU, without 4-bit weights unless told."""
    found = {
        name: DEFAULTS.get(name, {}) | sections.get(name, {}) for name in {**DEFAULTS, **sections}
    }
    if found["model"].get("name", "bdh") != "bdh":
        found["model"].pop("mlp_internal_dim_multiplier", None)
    return Config.from_dict(found)


def estimator_of(config: Config, device: str = "meta", base: int | None = None) -> MemoryEstimator:
    """Returns the estimator of a run whose model is on a device."""
    with torch.device(device):
        model = build_model(config)
    precision = Precision(config.low_precision, CPU.device, config.fp8)
    precision.prepare(model, 10, init=device != "meta")
    return MemoryEstimator(config, model, precision, CPU, base=base)
