"""FP8 training: checks the device and chooses the backend.

`native` (plain torch, fp8_native.py) covers every linear layer and BDH's fused layers.
`transformer_engine` (fp8_te.py) additionally has recipes with a scale per block of numbers.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from config import ConfigError, Fp8Config
from engine.hardware.sharding import is_sharded
from engine.precision.fp8_backend import Fp8Backend
from engine.precision.fp8_native import NativeBackend
from engine.precision.fp8_te import TransformerEngineBackend, checked_library
from model import LanguageModel

TE_ONLY_RECIPES = ("block", "mxfp8")
MIN_CAPABILITY = (8, 9)  # compute capability of the first GPUs with FP8 matmuls


def check_device(fp8: Fp8Config, device: torch.device) -> None:
    """Raises ConfigError if `device` cannot compute FP8 matmuls as configured."""
    if fp8.backend == "transformer_engine" or fp8.recipe in TE_ONLY_RECIPES:
        checked_library(fp8, device)
    switch, off = "low_precision.use_fp8=true", "Set low_precision.use_fp8: false."
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{switch}: {device} has no FP8 matmuls. {off}")
    if device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, MIN_CAPABILITY))
        raise ConfigError(
            f"{switch}: needs compute capability {needed} or newer (Ada, Hopper, Blackwell); "
            f"{device} ({name}) has {capability[0]}.{capability[1]}. {off}"
        )


def attach_fp8(
    fp8: Fp8Config, model: LanguageModel, device: torch.device, dtype: torch.dtype
) -> Fp8Backend:
    """Attaches the configured backend to the model; dtype: of the products' results.

    `backend: auto` is Transformer Engine for its own recipes, and where it is installed for models
    whose hidden weights are in linear layers; else plain torch. Its modules take no shards, and
    cannot be called again in backward without its autocast. Raises ConfigError.
    """
    backend = fp8.backend
    if backend == "auto":
        # BDH's fused layers multiply tile by tile, which modules of Transformer Engine cannot: with
        # them BDH would hold activations of all neurons at once.
        linear = model.matmul_backend is None
        installed = device.type == "cuda" and find_spec("transformer_engine") is not None
        fits = linear and not is_sharded(model) and not model.recompute
        te = fp8.recipe in TE_ONLY_RECIPES or (fits and installed)
        backend = "transformer_engine" if te else "native"
    if backend == "transformer_engine":
        return TransformerEngineBackend(fp8, device, model)
    return NativeBackend(fp8, model, device, dtype)
