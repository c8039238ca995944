"""`system.kernels`: whether a model's layers run by Triton kernels of its own or by torch's."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from config import Config, ConfigError
from model import LanguageModel

# GPUs, as torch names them, on which BDH's Triton kernels were faster than torch's: `auto` takes
# them there. An entry goes with the table that shows it, bench/results/gpu-<device>.md.
MEASURED_DEVICES: tuple[str, ...] = ()


def check_kernels(config: Config, device: torch.device) -> None:
    """Raises ConfigError where `system.kernels: triton` cannot run."""
    lack = _lack(config, device)
    if config.system.kernels == "triton" and lack is not None:
        raise ConfigError(
            f"system.kernels=triton was asked for, but {lack}. Set system.kernels: auto or torch."
        )


def choose_kernels(model: LanguageModel, config: Config, device: torch.device) -> list[str]:
    """Sets the model's kernels; returns a line for the start of the run where there is a choice:
    on CUDA, for a model with fused layers."""
    kernels = config.system.kernels
    if device.type != "cuda" or model.matmul_backend is None:
        return []
    reason: str | None
    if kernels == "torch":
        reason = "system.kernels=torch"
    elif (lack := _lack(config, device)) is not None:
        reason = lack
    elif kernels == "auto" and torch.cuda.get_device_name(device) not in MEASURED_DEVICES:
        reason = "system.kernels=auto takes Triton's only on GPUs where they were measured"
    else:
        reason = model.use_triton()
    return ["Kernels: Triton" if reason is None else f"Kernels: torch ({reason})"]


def _lack(config: Config, device: torch.device) -> str | None:
    """Returns what keeps Triton kernels from running here; None if nothing does."""
    if device.type != "cuda":
        return f"this run computes on {device}, and Triton needs a CUDA device"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if config.low_precision.use_fp8:
        return "Triton's do not compute 8-bit matmuls"
    return None
