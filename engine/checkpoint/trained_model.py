"""A trained model from any source: checkpoint, run, export, or weights of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from config import (
    GPT2_NAMES,
    CheckpointError,
    Config,
    ConfigError,
    LowPrecisionConfig,
    ModelConfig,
    TokenizerConfig,
    TrainingConfig,
)
from engine.checkpoint.export import has_config, is_export, open_export
from engine.checkpoint.find import find_model
from engine.checkpoint.load import checked_config, load_checkpoint
from engine.monitor import console
from engine.precision.lora import apply_lora, merge_lora
from engine.run_directory.find_checkpoint import newest_run, resolve_foreign_name
from engine.run_directory.find_runs import find_by_name
from engine.run_directory.manifest import manifest_path, steps_in
from model import LanguageModel, build_model, pretrained


def load_model(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[LanguageModel, Config]:
    """Returns a trained model in eval mode, and its config; raises CheckpointError.

    Args:
        path: a checkpoint, a run directory (see `find.find_model`), a folder of runs (its newest
            run), an export (engine/checkpoint/export.py), whose 4-bit weights are those that its
            run evaluated, or weights of another program (model/pretrained.py).
    """
    return open_model(path, device)[:2]


def open_model(
    path: str | Path, device: str | torch.device
) -> tuple[LanguageModel, Config, dict[str, Any]]:
    """Returns what `load_model` does, and the description of the model's tokenizer as
    `tokenizer_from_dict` takes it. Raises CheckpointError."""
    if is_pretrained(Path(path)):
        return _open_pretrained(Path(path), device)
    path = find_by_name(path)
    if is_export(path):
        return open_export(path, lambda config: build_model(config).to(device))
    chosen, lines = find_model(path)
    for line in lines:
        console.warning(line)
    content = load_checkpoint(chosen, device, mmap=True)
    config, weights = checked_config(chosen, content), content["model"]
    model = build_model(config)
    if apply_lora(model, config.low_precision, init=False):
        model.load_state_dict(weights)
        weights, model = merge_lora(model), build_model(config)
    model.load_state_dict(weights)
    return model.to(device).eval(), config, content["tokenizer"]


def is_pretrained(path: Path) -> bool:
    """Returns whether a path or name means weights that another program wrote."""
    if not path.exists():
        return str(path) in GPT2_NAMES
    if is_export(path):
        own = has_config(path)
    elif path.is_dir():
        own = bool(steps_in(newest_run(path)))
    else:
        own = manifest_path(resolve_foreign_name(path)).exists()
    return not own and pretrained.is_foreign(path)


def _open_pretrained(
    path: Path, device: str | torch.device
) -> tuple[LanguageModel, Config, dict[str, Any]]:
    found = pretrained.read(str(path))
    console.warning(found.source)
    if found.tokenizer is None:
        console.warning(f"{path}: names no tokenizer; its tokens are written as numbers")
    tokenizer = found.tokenizer or {"kind": "ids", "vocab_size": found.options["vocab_size"]}
    name = tokenizer["name"] if tokenizer["kind"] == "name" else "ids"
    try:
        config = Config(
            model=ModelConfig(**found.options),
            training=TrainingConfig(block_size=found.block_size or TrainingConfig().block_size),
            tokenizer=TokenizerConfig(name=name),
            low_precision=LowPrecisionConfig(use_4bit=False),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be built here: {error}") from error
    model = build_model(config)
    pretrained.load_into(model, found, config.training.block_size)
    return model.to(device).eval(), config, tokenizer
