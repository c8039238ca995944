"""Models that other programs wrote, as this trainer's: with a config and a tokenizer.

What is in a file decides which they are (model/pretrained.py).
"""

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
from engine.checkpoint.export import has_config, is_export
from engine.monitor import console
from engine.run_directory.manifest import in_runs, manifest_path, newest_run, steps_in
from model.interface import LanguageModel


def is_foreign(path: Path) -> bool:
    """Whether a path means weights that another program wrote."""
    from model import pretrained

    if not path.exists():
        return str(path) in GPT2_NAMES
    if is_export(path):
        own = has_config(path)
    elif path.is_dir():
        own = bool(steps_in(newest_run(path)))
    else:
        own = manifest_path(in_runs(path)).exists()
    return not own and pretrained.is_foreign(path)


def open_foreign(
    path: Path, device: str | torch.device
) -> tuple[LanguageModel, Config, dict[str, Any]]:
    """The model, in eval mode, of a file or folder that another program wrote; a config that
    builds it; and what makes text of its tokens (`data.meta.open_tokenizer`).

    Raises CheckpointError.
    """
    from model import build_model, pretrained

    found = pretrained.read(str(path))
    console.warning(found.source)
    if found.tokenizer is None:
        console.warning(f"{path}: does not tell its tokenizer; its tokens are written as numbers")
    told = found.tokenizer or {"kind": "ids", "vocab_size": found.options["vocab_size"]}
    try:
        config = Config(
            model=ModelConfig(**found.options),
            training=TrainingConfig(block_size=found.block_size or TrainingConfig().block_size),
            tokenizer=TokenizerConfig(name=told["name"] if told["kind"] == "name" else "ids"),
            low_precision=LowPrecisionConfig(use_4bit=False),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be built here: {error}") from error
    model = build_model(config)
    pretrained.load_into(model, found, config.training.block_size)
    return model.to(device).eval(), config, told
