"""Weights of other programs, recognized by the content of the file and converted to our names.

    GPT-2         a published folder: four weights of each layer are transposed, the head left out
    nanoGPT       ckpt.pt, with the names of model/gpt.py
    BDH           a state dict of the public reference, bare or in a checkpoint (fivezeroes/bdh);
                  also a folder of `export.py --format upstream`
    CS336         a state dict of the Stanford course's Transformer, bare or in a checkpoint

Nothing in a file is executed. A missing or unknown tensor, or one of another shape, is an error.

    pretrained = read("gpt2-medium")       # or a folder, or a file
    load_into(model, pretrained, block_size=512)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import GPT2_NAMES, BDHConfig, CheckpointError
from model.bdh.upstream import UPSTREAM_FREQUENCIES, from_upstream, without_wrappers
from model.torch_file import Inert, load_torch_file

OWNER = "openai-community"  # of the published files on the Hub
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NANOGPT = "ckpt.pt"
CONNECT_TIMEOUT_S = 10
# The only values of these keys of config.json that model/gpt.py can compute.
REQUIRED: dict[str, Any] = {
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
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which is no weight
EMBEDDING, POSITIONS = "transformer.wte.weight", "transformer.wpe.weight"
HEAD = "lm_head.weight"
GPT2_TOKENS = 50257
STATE_DICT_KEYS = ("model", "model_state_dict", "state_dict")  # within checkpoints
SIDECARS = (CONFIG, "model_config.json")  # files beside a state dict that tell its shape
CS336_TOP = {
    "embedding": ("token_embeddings",),
    "norm": ("ln_final",),
    "lm_head": ("lm_head",),
}
CS336_LAYER = {  # our name: their names, fused in this order
    "attn_norm": ("ln1",),
    "attn.wqkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.wo": ("attn.output_proj",),
    "mlp_norm": ("ln2",),
    "mlp.w13": ("ffn.w1", "ffn.w3"),
    "mlp.w2": ("ffn.w2",),
}
# All layers of a BDH share their weights, so a state dict does not tell how many there are.
DEFAULT_BDH_LAYERS = 6  # of the reference


@dataclass(frozen=True)
class Pretrained:
    """A model's shape and weights; weights may still be on the disk, mapped to memory."""

    options: dict[str, Any]
    """The options of `config.ModelConfig` that the weights determine."""
    block_size: int | None
    """The number of learned positions, which limit the context; None without any."""
    weights: dict[str, Tensor]
    """By the names of our models; without the head where it is tied to the embedding."""
    path: Path
    source: str
    """One line for the start of a run: `init_from` and the shape."""
    tokenizer: dict[str, Any] | None = None
    """Its tokenizer, as `data.sources.tokens.meta.open_tokenizer` takes it; None: unknown."""


def find(init_from: str) -> Path:
    """Returns the file or folder that `training.init_from` names, and downloads published ones.

    Raises CheckpointError.
    """
    if init_from in GPT2_NAMES:
        return _published(init_from)
    path = Path(init_from).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"training.init_from: {init_from}: no such file or folder. It takes scratch, resume, "
            f"{', '.join(GPT2_NAMES)}, a checkpoint, run or export of this trainer, or weights of "
            "others: a GPT-2 folder, nanoGPT's ckpt.pt, a state dict of BDH or of CS336."
        )
    return path


def read(init_from: str, shape: Mapping[str, int] | None = None) -> Pretrained:
    """Reads the shape and the weights of `training.init_from`; raises CheckpointError.

    shape: `n_layer` and `n_head` if the user gave them, for files that do not contain them.
    """
    path, shape = find(init_from), shape or {}
    if path.name == WEIGHTS and (path.parent / CONFIG).exists():
        path = path.parent
    if path.is_dir() and (path / CONFIG).exists():
        described = _json(path / CONFIG)
        if "mlp_internal_dim_multiplier" not in described:
            return _read_published(path, init_from)
        state = {key: value for f in _weight_files(path) for key, value in _safetensors(f).items()}
        return _read_bdh(path, init_from, state, described)
    if path.is_dir() and (path / NANOGPT).exists():
        path = path / NANOGPT
    if path.is_dir() or path.suffix == ".json":
        raise CheckpointError(
            f"{path} must be a file of weights or a folder with {CONFIG} and {WEIGHTS}, or with "
            f"nanoGPT's {NANOGPT}."
        )
    content = _load_file(path)
    state, kind = _find_state_dict(content), _kind(content)
    if kind == "bdh":
        return _read_bdh(
            path, init_from, state, dict(shape) | _options_beside(path) | _options_within(content)
        )
    if kind == "cs336":
        return _read_cs336(path, init_from, state, dict(shape) | _options_beside(path))
    if kind == "nanogpt":
        return _read_nanogpt(path, init_from, content)
    found = ", ".join(map(str, list(state or content)[:8])) or "nothing"
    raise CheckpointError(
        f"{path}: holds no weights of a BDH, of nanoGPT with its model_args, or of CS336. "
        f"It has {found}."
    )


def is_foreign(path: Path) -> bool:
    """Whether `read` accepts a file or folder. It must not be a run or export of this trainer."""
    if path.is_dir() or path.name == WEIGHTS:
        folder = path if path.is_dir() else path.parent
        return (folder / CONFIG).is_file() or (folder / NANOGPT).is_file()
    try:
        return path.is_file() and _kind(_load_file(path)) is not None
    except CheckpointError:
        return False


def _load_file(path: Path) -> dict[str, Any]:
    return dict(_safetensors(path)) if path.suffix == ".safetensors" else _load_checkpoint(path)


def _kind(content: Mapping[str, Any]) -> str | None:
    state = _find_state_dict(content)
    if "format" in content:  # a checkpoint of this trainer
        return None
    if state.keys() >= {"encoder", "encoder_v", "decoder"}:
        return "bdh"
    if "token_embeddings.weight" in state and state["token_embeddings.weight"].dim() == 2:
        return "cs336"
    return "nanogpt" if "model_args" in content else None


def _find_state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict that a file is or contains; empty if there is none."""
    for found in (*(content.get(name) for name in STATE_DICT_KEYS), content):
        if isinstance(found, dict) and found and all(type(name) is str for name in found):
            tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
            if len(tensors) == len(found):
                return without_wrappers(tensors)
    return {}


def _options_beside(path: Path) -> dict[str, Any]:
    """Returns the options in a JSON file beside a state dict that its tensors do not tell."""
    sidecar = next((path.parent / n for n in SIDECARS if (path.parent / n).is_file()), None)
    values = {} if sidecar is None else _json(sidecar)
    if "num_heads" in values:
        values.setdefault("n_head", values["num_heads"])
    return {name: values[name] for name in ("n_layer", "n_head", "rope_theta") if name in values}


def _options_within(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns n_layer from a checkpoint's config: a dict, or an object of another program."""
    config = _as_dict(content.get("config"))
    inner = _as_dict(config.get("model", config))
    return {"n_layer": inner["n_layer"]} if "n_layer" in inner else {}


def _as_dict(value: object) -> dict[str, Any]:
    if isinstance(value, Inert):
        return vars(value)
    return value if isinstance(value, dict) else {}


def _read_bdh(
    path: Path, init_from: str, state: dict[str, Tensor], values: dict[str, Any]
) -> Pretrained:
    shapes = {name: state[name].shape for name in ("encoder", "embed.weight") if name in state}
    if [len(shape) for shape in shapes.values()] != [3, 2]:
        raise CheckpointError(f"{path}: a BDH without encoder (H, D, N) or embed.weight (V, D).")
    (H, D, N), (V, _) = shapes["encoder"], shapes["embed.weight"]
    told = "" if "n_layer" in values else " (not told by the file: set model.n_layer if others)"
    options: dict[str, Any] = {
        "n_layer": _positive_int({"n_layer": DEFAULT_BDH_LAYERS} | values, "n_layer", path),
        "n_embd": D,
        "n_head": H,
        "mlp_internal_dim_multiplier": N * H // max(D, 1),
        "vocab_size": V,
    }
    try:
        model = from_upstream(state, BDHConfig(**options, dropout=0.0))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}.") from error
    own = " and its frequencies" if UPSTREAM_FREQUENCIES in state else ""
    line = (
        f"{init_from}: a BDH of {options['n_layer']} layers{told}, {H} heads, width {D}, "
        f"{N:,} neurons each{own}, {V:,} tokens"
    )
    tokenizer = {"kind": "name", "name": "bytes"} if V == 256 else _gpt2_tokenizer(V)
    options["name"] = "bdh"
    return Pretrained(options, None, dict(model.state_dict()), path, line, tokenizer)


def _gpt2_tokenizer(vocab_size: int) -> dict[str, Any] | None:
    """Returns GPT-2's tokenizer if the vocabulary has its size, bare or padded as by nanoGPT."""
    return {"kind": "name", "name": "gpt2"} if vocab_size in (GPT2_TOKENS, 50304) else None


def _read_cs336(
    path: Path, init_from: str, state: dict[str, Tensor], values: dict[str, Any]
) -> Pretrained:
    """Reads a Llama whose q, k, v and gate matrices are separate, and whose heads interleave the
    members of rotated pairs."""
    if "n_head" not in values:
        raise CheckpointError(
            f"{path}: does not tell the number of heads. Set model.n_head, or write "
            f'{{"num_heads": N}} into {path.parent / CONFIG}.'
        )
    V, D = state["token_embeddings.weight"].shape
    H, theta = _positive_int(values, "n_head", path), values.get("rope_theta", 10000.0)
    if type(theta) not in (int, float) or not theta > 0:
        raise CheckpointError(f"{path.parent}: rope_theta: {theta} is not a number above 0.")
    if D % (2 * H):
        raise CheckpointError(f"{path}: n_head: {H} does not cut width {D} into rotated pairs.")
    order = torch.arange(D // H).view(-1, 2).mT.reshape(-1)  # interleaved -> halves of a head
    numbers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    names = CS336_TOP | {
        f"layers.{layer}.{own}": tuple(f"layers.{layer}.{name}" for name in theirs)
        for layer in range(len(numbers))
        for own, theirs in CS336_LAYER.items()
    }
    own: dict[str, Tensor] = {}
    try:
        for name, theirs in names.items():
            parts = [state.pop(f"{each}.weight") for each in theirs]
            if name.endswith("wqkv"):
                parts[:2] = [part.view(H, -1, D)[:, order].flatten(0, 1) for part in parts[:2]]
            own[f"{name}.weight"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no Transformer of CS336: {error}.") from error
    own |= {name: value for name, value in state.items() if name.endswith((".weight", ".bias"))}
    options = {
        "name": "llama",
        "n_layer": len(numbers),
        "n_embd": D,
        "n_head": H,
        "d_ff": own["layers.0.mlp.w2.weight"].shape[-1] if numbers else None,
        "rope_theta": float(theta),
        "n_kv_head": None,
        "vocab_size": V,
    }
    line = f"{init_from}: a Llama of {len(numbers)} layers, {H} heads, width {D}, {V:,} tokens"
    return Pretrained(options, None, own, path, line, _gpt2_tokenizer(V))


def load_into(model: nn.Module, pretrained: Pretrained, block_size: int) -> None:
    """Copies `fitting_weights` into the model."""
    model.load_state_dict(fitting_weights(model, pretrained, block_size))


def fitting_weights(model: nn.Module, pretrained: Pretrained, block_size: int) -> dict[str, Tensor]:
    """Returns the state dict for a model that was built with `pretrained.options`.

    block_size: its positions; later ones of the weights are left out. Raises CheckpointError if the
    weights do not fit.
    """
    path = pretrained.path
    if pretrained.block_size is not None and block_size > pretrained.block_size:
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
    faults += [
        f"{name} holds NaN or infinite numbers"
        for name, value in weights.items()
        if not faults and not value.isfinite().all()
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(faults[:3])}{more}.")
    return weights


def _published(name: str) -> Path:
    """Returns the folder of the published files, from the Hub or its cache on this machine."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise CheckpointError(_install_message(name, "huggingface_hub")) from None
    repo = f"{OWNER}/{name}"
    cached = [hub.try_to_load_from_cache(repo, file) for file in (CONFIG, WEIGHTS)]
    if all(isinstance(path, str) for path in cached):
        return Path(cached[0]).parent
    hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    try:
        # Without network this request fails at once; the download would retry for half a minute.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, CONFIG), timeout=CONNECT_TIMEOUT_S)
        paths = [hub.hf_hub_download(repo, file) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # network, Hub and disk raise many kinds, with one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"training.init_from: {name} is not on this machine and could not be downloaded "
            f"({reason}). With network, run: hf download {repo} {CONFIG} {WEIGHTS}\n"
            f"Or give a folder: training.init_from=path/to/folder with {CONFIG} and {WEIGHTS}."
        ) from error
    return Path(paths[0]).parent


def _install_message(subject: object, package: str) -> str:
    return f"{subject}: reading it needs {package}. Install it: pip install {package}"


def _read_published(folder: Path, init_from: str) -> Pretrained:
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
    line = _shape_line(init_from, options, positions)
    tokenizer = _gpt2_tokenizer(options["vocab_size"])
    if (folder / "tokenizer.json").is_file():
        tokenizer = {"kind": "name", "name": str(folder)}
    return Pretrained(options, positions, weights, folder, line, tokenizer)


def _published_options(path: Path) -> tuple[dict[str, Any], int]:
    values = _json(path)
    if values.get("model_type") != "gpt2":
        raise CheckpointError(f"{path}: model_type: {values.get('model_type')} is not gpt2.")
    for key, expected in REQUIRED.items():
        if values.get(key, expected) != expected:
            raise CheckpointError(
                f"{path}: {key}: {values[key]} cannot be computed here, only {expected} can."
            )
    activation = values.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation_function: {activation} is none of {', '.join(ACTIVATIONS)}."
        )
    width = _positive_int(values, "n_embd", path)
    inner = 4 * width if values.get("n_inner") is None else _positive_int(values, "n_inner", path)
    if inner % width:
        raise CheckpointError(f"{path}: n_inner: {inner} is not a multiple of n_embd: {width}.")
    options = _shape(values, path) | {
        "bias": True,
        "activation": ACTIVATIONS[activation],
        "mlp_scale_factor": inner // width,
        "tie_embeddings": bool(values.get("tie_word_embeddings", True)),
    }
    return options, _positive_int(
        values, "n_positions" if "n_positions" in values else "n_ctx", path
    )


def _shape(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the options that both layouts have under the same names."""
    sizes = {
        key: _positive_int(values, key, path)
        for key in ("n_layer", "n_head", "n_embd", "vocab_size")
    }
    parts = dict.fromkeys(("mlp_bias", "attn_bias", "proj_bias", "ln_bias"))  # None: as `bias`
    return {"name": "gpt", **sizes, **parts, "cls_head_bias": False}


def _positive_int(values: dict[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        found = f"{key}: {value} is not a whole number above 0" if key in values else f"no {key}"
        raise CheckpointError(f"{path}: {found}.")
    return value


def _shape_line(init_from: str, options: dict[str, Any], positions: int) -> str:
    return (
        f"{init_from}: {options['n_layer']} layers, {options['n_head']} heads, width "
        f"{options['n_embd']}, {options['vocab_size']:,} tokens, {positions:,} positions"
    )


def _weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of a folder: one, or the shards that an index names."""
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
        raise CheckpointError(_install_message(path, "safetensors")) from None
    try:
        loaded: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, and {INDEX} names it.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}). Download or copy it again."
        ) from error
    return loaded


def _read_nanogpt(path: Path, init_from: str, content: dict[str, Any]) -> Pretrained:
    weights, values = content.get("model"), content["model_args"]
    if not isinstance(weights, dict) or not isinstance(values, dict):
        raise CheckpointError(f"{path}: model and model_args are not nanoGPT's.")
    if type(values.get("bias")) is not bool:
        raise CheckpointError(
            f"{path}: model_args: bias: {values.get('bias')} is not true or false."
        )
    found = without_wrappers({str(name): value for name, value in weights.items()})
    found = {name: value for name, value in found.items() if not name.endswith(BUFFERS)}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is no tensor.")
    tied = HEAD not in found or _are_equal(found[HEAD], found.get(EMBEDDING))
    if tied:
        found.pop(HEAD, None)
    options = _shape(values, path) | {
        "bias": values["bias"],
        "activation": "gelu",
        "mlp_scale_factor": 4,
        "tie_embeddings": tied,
    }
    positions = _positive_int(values, "block_size", path)
    line = _shape_line(init_from, options, positions) + _history(content)
    trained = content.get("config")
    dataset = trained.get("dataset") if isinstance(trained, dict) else None
    tokenizer = _gpt2_tokenizer(options["vocab_size"])
    if isinstance(dataset, str) and Path(dataset).name == dataset:
        tokenizer = {"kind": "dataset", "name": dataset, "vocab_size": options["vocab_size"]}
    return Pretrained(options, positions, found, path, line, tokenizer)


def _are_equal(head: Tensor, embedding: Tensor | None) -> bool:
    if embedding is None or head.shape != embedding.shape:
        return False
    return head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)


def _history(content: dict[str, Any]) -> str:
    """Returns nanoGPT's record of the training in words; its loss is a tensor of one number."""
    step, loss = content.get("iter_num"), content.get("best_val_loss")
    told = f", {step:,} iterations" if type(step) is int else ""
    if isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1):
        told += f", best held-out loss {float(loss):.4f}"
    return told + (" (weights alone: no optimizer moments)" if "optimizer" in content else "")


def _load_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the dictionary in a `torch.save` file, objects of unknown classes as `Inert`."""
    content = load_torch_file(path, mmap=True, inert_objects=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no dictionary, as checkpoints and state dicts are.")
    return dict(content)
