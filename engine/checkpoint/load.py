"""Reads checkpoints.

A checkpoint is loaded with `weights_only=True`, always: opening a stranger's file runs none of its
code. Its bytes are compared with the manifest, its content with `contents.Content`, and its weights
with the model that its config describes, before anything of it is used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import CheckpointError, Config
from engine.checkpoint.contents import as_checkpoint_error, check_content
from engine.precision.lora import apply_lora
from engine.precision.tensor_4bit import import_bitsandbytes
from engine.run_directory.manifest import FORMAT, verify
from engine.train_state import check_rng
from model import build_model
from model.torch_file import load_torch_file

MAX_SHARED_LAYERS = 10_000
"""Limit of n_layer for a model whose layers share their weights. Other models have at least one
weight per layer, so the number of weights in the file is their limit."""


def load_checkpoint(
    path: Path, device: str | torch.device = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Returns the content of a checkpoint, checked to be a `contents.Content`.

    mmap: tensors on a CPU are parts of the file, read when they are used. They are for copying from
    at once: a file that is cut short under them kills the process. It may be removed.
    Raises CheckpointError if a byte of the file or an entry of the content is not what it was.
    """
    manifest = verify(path)
    content = check_format(path, load_torch_file(path, device, mmap))
    with as_checkpoint_error(path):  # a ValueError, KeyError, ... within becomes a CheckpointError
        check_content(content)
        described = content["train"] | {"fingerprint": content["data"]["fingerprint"]}
        for name in ("step", "tokens", "fingerprint"):
            value, expected = described[name], getattr(manifest, name)
            if value != expected:
                raise ValueError(f"{name} is {value!a}, and its manifest says {expected}")
        if not content["rng"]:
            raise ValueError("rng is empty")
        for state in content["rng"]:
            check_rng(state)
    return content


def check_format(path: Path, content: object) -> dict[str, Any]:
    """Returns the content if it is a checkpoint of this version; raises CheckpointError."""
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} has no format field: not a checkpoint of this trainer.")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {content['format']}; this version reads {FORMAT}.")
    return content


def checked_config(path: Path, content: dict[str, Any]) -> Config:
    """Returns the config of a checkpoint, checked to describe a model that its weights fit.

    Raises CheckpointError. The model is built on the meta device, so a config that describes a
    huge one allocates nothing.
    """
    weights: dict[str, Tensor] = content["model"]
    with as_checkpoint_error(path):
        config = Config.from_dict(content["config"])
        # Building even a meta model takes time and memory per layer.
        layers = config.model.n_layer
        if layers > (MAX_SHARED_LAYERS if _layers_share_weights(config) else len(weights)):
            raise ValueError(f"config.model.n_layer is {layers}, with {len(weights)} weights")
    # Not within the blocks: a missing library is no damage, and keeps its own message.
    if config.low_precision.lora_rank is not None:
        import_bitsandbytes(f"{path}: its 4-bit weights")
    with as_checkpoint_error(path):
        with torch.device("meta"):
            model = build_model(config)
            apply_lora(model, config.low_precision, init=False)
        for name, meta in model.state_dict().items():
            dtype = weights[name].dtype if name in weights else meta.dtype
            if dtype != meta.dtype and not (dtype.is_floating_point and meta.is_floating_point):
                raise ValueError(f"model.{name} holds {dtype}, expected {meta.dtype}")
        # assign: a meta tensor has no memory to copy into. A plain dict: torch notes `assign` in a
        # state dict's metadata, and the next load from it would replace the parameters that an
        # optimizer holds.
        model.load_state_dict(dict(weights), assign=True)
    return config


def _layers_share_weights(config: Config) -> bool:
    """Asks a model of one layer, since the number of layers is what has to be checked."""
    with torch.device("meta"):
        model = build_model(replace(config, model=replace(config.model, n_layer=1)))
    return model.layers_share_weights
