"""Weights that others trained: OpenAI's GPT-2 as published, and nanoGPT's checkpoints.

Both hold the same model. The published files keep four weights of each layer transposed, and leave
out the head, which is the embedding; nanoGPT's names are those of model/gpt.py. Nothing in a file
is executed, and a tensor too many, too few or of another shape is an error.

    pretrained = read("gpt2-medium")       # or a folder, or ckpt.pt
    load_into(model, pretrained, block_size=512)
"""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import GPT2_NAMES, CheckpointError

OWNER = "openai-community"  # of the published files, which have no version but the newest
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NANOGPT = "ckpt.pt"
CONNECT_S = 10
# What config.json must not say otherwise: model/gpt.py computes nothing else.
FIXED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, no weights
EMBEDDING, POSITIONS = "transformer.wte.weight", "transformer.wpe.weight"
HEAD = "lm_head.weight"
OURS = "It is of this trainer: training.resume_from_checkpoint continues its runs."


@dataclass(frozen=True)
class Pretrained:
    """A model's shape and weights; the weights are read from the disk as they are used."""

    options: dict[str, Any]
    """The options of `config.ModelConfig` that the weights fix."""
    block_size: int
    """Learned positions: the longest context."""
    weights: dict[str, Tensor]
    """By the names of model/gpt.py; without the head where that is the embedding."""
    path: Path
    source: str
    """One line for the start of a run: what `init_from` named, its shape."""


def find(init_from: str) -> Path:
    """The file or folder that `training.init_from` means; the published files are downloaded.

    Raises CheckpointError.
    """
    if init_from in GPT2_NAMES:
        return _published(init_from)
    path = Path(init_from).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"training.init_from: {init_from}: no such file or folder. It takes scratch, resume, "
            f"{', '.join(GPT2_NAMES)}, a folder with {CONFIG} and {WEIGHTS}, or a {NANOGPT} of "
            "nanoGPT."
        )
    return path


def read(init_from: str) -> Pretrained:
    """The shape and the weights of `training.init_from`; raises CheckpointError."""
    path = find(init_from)
    if path.is_dir() and (path / CONFIG).exists():
        return _read_published(path, init_from)
    if path.is_dir() and (path / NANOGPT).exists():
        return _read_nanogpt(path / NANOGPT, init_from)
    if path.is_dir() or path.suffix in (".json", ".safetensors"):
        ours = any(path.glob("checkpoint_*.json")) or any(path.glob("run_*"))
        raise CheckpointError(
            f"training.init_from: {path} must be a folder with {CONFIG} and {WEIGHTS}, or with "
            f"nanoGPT's {NANOGPT}. {OURS if ours else 'Give that folder.'}"
        )
    return _read_nanogpt(path, init_from)


def load_into(model: nn.Module, pretrained: Pretrained, block_size: int) -> None:
    """Copies the weights into a GPT built with `pretrained.options` and `block_size` positions.

    Raises CheckpointError where they do not fit; the model is then as it was.
    """
    path = pretrained.path
    if block_size > pretrained.block_size:
        raise CheckpointError(
            f"{path}: has learned {pretrained.block_size} positions, and training.block_size is "
            f"{block_size}. Set it to {pretrained.block_size} or less."
        )
    own = model.state_dict()
    weights = dict(pretrained.weights)
    if HEAD in own and EMBEDDING in weights:
        weights.setdefault(HEAD, weights[EMBEDDING])
    if POSITIONS in weights:
        weights[POSITIONS] = weights[POSITIONS][:block_size]
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not of this model" for name in weights if name not in own]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(faults[:3])}{more}.")
    model.load_state_dict(weights)


def _published(name: str) -> Path:
    """The folder of the published files, from the Hub's cache on this machine or from the Hub."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise CheckpointError(_not_installed(name, "huggingface_hub")) from None
    repo = f"{OWNER}/{name}"
    cached = [hub.try_to_load_from_cache(repo, file) for file in (CONFIG, WEIGHTS)]
    if all(isinstance(path, str) for path in cached):
        return Path(cached[0]).parent
    hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    try:
        # Without network this fails at once; the download would try for half a minute.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, CONFIG), timeout=CONNECT_S)
        paths = [hub.hf_hub_download(repo, file) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # of the network, the Hub, the disk: many kinds, one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"training.init_from: {name} is not on this machine and could not be downloaded "
            f"({reason}). With network, run: hf download {repo} {CONFIG} {WEIGHTS}\n"
            f"Or give a folder: training.init_from=path/to/folder with {CONFIG} and {WEIGHTS}."
        ) from error
    return Path(paths[0]).parent


def _not_installed(subject: object, package: str) -> str:
    return f"{subject}: reading it needs {package}. Install it: pip install {package}"


def _read_published(folder: Path, given: str) -> Pretrained:
    options, positions = _published_options(folder / CONFIG)
    weights = {}
    for file in _weight_files(folder):
        for name, value in _safetensors(file).items():
            if not name.endswith(BUFFERS):
                own = (
                    name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
                )
                turned = name.endswith(TRANSPOSED) and value.dim() == 2
                weights[own] = value.mT if turned else value
    if options["tie_embeddings"]:
        weights.pop(HEAD, None)
    return Pretrained(options, positions, weights, folder, _line(given, options, positions))


def _published_options(path: Path) -> tuple[dict[str, Any], int]:
    values = _json(path)
    if values.get("model_type") != "gpt2":
        raise CheckpointError(f"{path}: model_type: {values.get('model_type')} is not gpt2.")
    for key, expected in FIXED.items():
        if values.get(key, expected) != expected:
            raise CheckpointError(
                f"{path}: {key}: {values[key]} cannot be computed here, only {expected} can."
            )
    activation = values.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation_function: {activation} is none of {', '.join(ACTIVATIONS)}."
        )
    width = _count(values, "n_embd", path)
    inner = 4 * width if values.get("n_inner") is None else _count(values, "n_inner", path)
    if inner % width:
        raise CheckpointError(f"{path}: n_inner: {inner} is not a multiple of n_embd: {width}.")
    options = _shape(values, path) | {
        "bias": True,
        "activation": ACTIVATIONS[activation],
        "mlp_scale_factor": inner // width,
        "tie_embeddings": bool(values.get("tie_word_embeddings", True)),
    }
    return options, _count(values, "n_positions" if "n_positions" in values else "n_ctx", path)


def _shape(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """What both layouts call the same, and the options that no file speaks of."""
    sizes = {
        key: _count(values, key, path) for key in ("n_layer", "n_head", "n_embd", "vocab_size")
    }
    parts = dict.fromkeys(("mlp_bias", "attn_bias", "proj_bias", "ln_bias"))  # follow bias
    return {"name": "gpt", **sizes, **parts, "cls_head_bias": False}


def _count(values: dict[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        found = f"{key}: {value} is not a whole number above 0" if key in values else f"no {key}"
        raise CheckpointError(f"{path}: {found}.")
    return value


def _line(given: str, options: dict[str, Any], positions: int) -> str:
    return (
        f"{given}: {options['n_layer']} layers, {options['n_head']} heads, width "
        f"{options['n_embd']}, {options['vocab_size']:,} tokens, {positions:,} positions"
    )


def _weight_files(folder: Path) -> list[Path]:
    """One file, or those that an index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise CheckpointError(f"{folder}: no {WEIGHTS} in it. It has {there}.")
    named = _json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or any(Path(str(n)).name != n for n in named.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensors to files beside it.")
    return [folder / name for name in sorted(set(named.values()))]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object.")
    return values


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(_not_installed(path, "safetensors")) from None
    try:
        loaded: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, and {INDEX} names it.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}). Download or copy it again."
        ) from error
    return loaded


def _read_nanogpt(path: Path, given: str) -> Pretrained:
    content = _load(path)
    weights, values = content.get("model"), content.get("model_args")
    if not isinstance(weights, dict) or not isinstance(values, dict):
        hint = (
            OURS if "format" in content else f"It has {', '.join(map(str, content)) or 'nothing'}."
        )
        raise CheckpointError(f"{path}: no model and model_args of nanoGPT in it. {hint}")
    if type(values.get("bias")) is not bool:
        raise CheckpointError(
            f"{path}: model_args: bias: {values.get('bias')} is not true or false."
        )
    found = {str(name).removeprefix("_orig_mod."): value for name, value in weights.items()}
    found = {name: value for name, value in found.items() if not name.endswith(BUFFERS)}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is no tensor.")
    tied = HEAD not in found or _same(found[HEAD], found.get(EMBEDDING))
    if tied:
        found.pop(HEAD, None)
    options = _shape(values, path) | {
        "bias": values["bias"],
        "activation": "gelu",
        "mlp_scale_factor": 4,
        "tie_embeddings": tied,
    }
    positions = _count(values, "block_size", path)
    return Pretrained(
        options, positions, found, path, _line(given, options, positions) + _history(content)
    )


def _same(head: Tensor, embedding: Tensor | None) -> bool:
    if embedding is None or head.shape != embedding.shape:
        return False
    return head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)


def _history(content: dict[str, Any]) -> str:
    """What nanoGPT notes of the training; its loss is a tensor of one number."""
    step, loss = content.get("iter_num"), content.get("best_val_loss")
    told = f", {step:,} iterations" if isinstance(step, int) else ""
    if isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1):
        told += f", best held-out loss {float(loss):.4f}"
    return told


def _load(path: Path) -> dict[str, Any]:
    """The content of a `torch.save` file; only tensors and plain values are taken."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [e for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch writes none; a small file could unpack to any size
            raise CheckpointError(f"{path}: is compressed, which no checkpoint is.")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        names = ", ".join(sorted(_refused(path))) or "of unknown type"
        raise CheckpointError(f"{path}: holds a Python object ({names}); refused.") from None
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can make the loader raise anything
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no dictionary, as nanoGPT's {NANOGPT} does.")
    return content


def _refused(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above; this only words the message
        return []
