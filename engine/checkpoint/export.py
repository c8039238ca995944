"""A model as a folder of plain files, for `sample.py` and for other programs.

    model.safetensors   the weights under the model's names, tied ones once; of those in 4 bits NAME
                        holds the codes and NAME.absmax, ... how to read them, as bitsandbytes does
    config.yaml         the run's config, which builds the model
    vocabulary.json     what makes text of tokens

Such a folder is complete or absent. Reading trusts nothing in it: a missing or surplus tensor, one
of another shape or with a broken description is an error that names file and tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import CheckpointError, Config, ConfigError, WriteError
from engine.precision.tensor_4bit import BLOCK, SCALES, Tensor4bit, import_bitsandbytes
from engine.precision.weights_4bit import unique_tensors
from files.atomic import atomic_folder, atomic_write_text
from files.write_errors import check_space
from model.interface import LanguageModel

WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.yaml", "vocabulary.json"
INSTALL = "pip install safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATE = ".quant_state.bitsandbytes__"


def is_export(path: Path) -> bool:
    """Returns whether a path means a folder of weights, or the weights in it."""
    return path.name == WEIGHTS or (path / WEIGHTS).is_file()


def has_config(path: Path) -> bool:
    """Returns whether a config lies beside weights, as in exports of this trainer."""
    return ((path.parent if path.name == WEIGHTS else path) / CONFIG).is_file()


def write_export(out: Path, weights: Mapping[str, Tensor], texts: Mapping[str, str]) -> int:
    """Makes a new folder of weights and further files; returns the bytes of the weights.

    Raises WriteError, also where `out` exists; nothing is left then.
    """
    if os.path.lexists(out):
        raise WriteError(f"{out} exists. Name another folder.")
    try:
        with atomic_folder(out) as folder:
            check_space(folder, sum(value.nbytes for value in weights.values()))
            size = _write_weights(folder / WEIGHTS, weights)
            for name, text in texts.items():
                atomic_write_text(folder / name, text)
    except OSError as error:
        raise WriteError(f"cannot write {out} ({error}). Name another place.") from error
    return size


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> int:
    library, torch_files = _safetensors(path)
    whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    try:
        path.touch()
        mode = path.stat().st_mode  # by the umask; the library makes a new file of mode 0600
        torch_files.save_file(whole, path, metadata={"format": "pt"})
        path.chmod(mode)
    except library.SafetensorError as error:
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _safetensors(path: Path) -> tuple[Any, Any]:
    try:
        import safetensors
        import safetensors.torch as torch_files
    except ImportError:
        raise ConfigError(f"{path}: needs safetensors. Install it: {INSTALL}") from None
    return safetensors, torch_files


def description(config: Config, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of the files beside the weights."""
    return {CONFIG: config.to_yaml(), VOCABULARY: json.dumps(tokenizer)}


def open_export(
    path: Path, build: Callable[[Config], LanguageModel]
) -> tuple[LanguageModel, Config, dict[str, Any]]:
    """Returns the model in eval mode, its config, and the description of its tokenizer.

    build: returns a model for a config. Raises CheckpointError.
    """
    folder = path.parent if path.name == WEIGHTS else path
    for name in (CONFIG, VOCABULARY):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: no {name} beside {WEIGHTS}: not an export of this trainer, or one for "
                "another program (--format upstream). Make one: python export.py CHECKPOINT OUT"
            )
    try:
        config = Config.from_yaml(folder / CONFIG)
        model = build(config)
    except (ConfigError, AssertionError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: does not fit this version: {error}") from error
    read_weights(folder / WEIGHTS, model)
    return model.eval(), config, _read_tokenizer(folder / VOCABULARY)


def _read_tokenizer(path: Path) -> dict[str, Any]:
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(tokenizer, dict):
        raise CheckpointError(f"{path}: holds no JSON object.")
    return tokenizer


@torch.no_grad()
def read_weights(path: Path, model: nn.Module) -> None:
    """Fills a model with the weights of a file, those in 4 bits unpacked into the model's dtype.

    Raises CheckpointError.
    """
    own = unique_tensors(model)
    device = next(iter(own.values())).device
    found = _load(path, device)
    computed = dict(model.named_buffers())  # exports of earlier versions lack them
    for name, value in own.items():
        if name not in found and name in computed:
            continue
        if name not in found:
            raise CheckpointError(f"{path}: {name} is missing.")
        packed = any(other.startswith(name + STATE) for other in found)
        stored = _unpacked(path, name, value, found) if packed else found.pop(name)
        if stored.shape != value.shape:
            shapes = f"{tuple(stored.shape)}, the model's is {tuple(value.shape)}"
            raise CheckpointError(f"{path}: {name} is {shapes}.")
        if stored.dtype not in FLOATS and stored.dtype != value.dtype:
            raise CheckpointError(f"{path}: {name} holds {stored.dtype}, no weights.")
        value.copy_(stored)
    if found:
        raise CheckpointError(f"{path}: {min(found)} is not of this model.")


def _load(path: Path, device: torch.device) -> dict[str, Tensor]:
    library, torch_files = _safetensors(path)
    try:
        loaded: dict[str, Tensor] = torch_files.load_file(path, device=str(device))
    except (OSError, library.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}). Export or copy it again."
        ) from error
    return loaded


def _unpacked(path: Path, name: str, weight: Tensor, found: dict[str, Tensor]) -> Tensor:
    """Takes a 4-bit weight's parts out of `found` and returns the weight."""
    # The parts are checked first: bitsandbytes reads as far as the description says, also past the
    # end of a tensor.
    import_bitsandbytes(f"{path}: its 4-bit weights")
    names = [other for other in found if other == name or other.startswith(f"{name}.")]
    parts = {"weight" + other.removeprefix(name): found.pop(other) for other in names}
    try:
        _check_parts(parts, tuple(weight.shape))
        return Tensor4bit.from_tensors(parts).dequantize(weight.dtype)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name}: broken 4-bit weight: {error}.") from error


def _check_parts(parts: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the parts are those of a weight of this shape."""
    states = [part for part in parts if part.startswith("weight" + STATE)]
    state = json.loads(parts[states[0]].cpu().numpy().tobytes())
    if not isinstance(state, dict):
        raise ValueError("its description is no JSON object")
    nested = "nested_offset" in state
    kind, dtype, offset = (state.get(key) for key in ("quant_type", "dtype", "nested_offset"))
    described: dict[str, Any] = {"blocksize": BLOCK, "shape": list(shape)}
    described |= {"quant_type": kind, "dtype": dtype}
    if nested:
        described |= {"nested_blocksize": SCALES, "nested_dtype": "float32"}
        described |= {"nested_offset": offset}
    known = dtype in [str(each).removeprefix("torch.") for each in FLOATS]
    if state != described or not known or states != [f"weight{STATE}{kind}"]:
        raise ValueError(f"described as {str(state)[:300]}")
    if nested and not (isinstance(offset, float) and math.isfinite(offset)):
        raise ValueError(f"nested_offset {offset}")
    layout = {name: (tuple(t.shape), t.dtype) for name, t in parts.items() if name != states[0]}
    expected = _layout(math.prod(shape), nested)
    for part in sorted({*layout, *expected}):
        if layout.get(part) != expected.get(part):
            raise ValueError(f"{part} is {layout.get(part)}, expected {expected.get(part)}")


def _layout(count: int, nested: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns shape and dtype of the parts that bitsandbytes makes of `count` numbers."""
    blocks = -(-count // BLOCK)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((-(-count // 2), 1), torch.uint8),
        "weight.absmax": ((blocks,), torch.uint8 if nested else torch.float32),
        "weight.quant_map": ((16,), torch.float32),
    }
    if nested:
        layout["weight.nested_absmax"] = ((-(-blocks // SCALES),), torch.float32)
        layout["weight.nested_quant_map"] = ((256,), torch.float32)
    return layout
