"""Devices: which one a run computes on, how torch is set up for it, and what it can do."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import ConfigError
from engine.hardware.memory import keep_freed_memory
from model.compiled import separate_caches_by_cpu

# Dense matmul rates in TFLOP/s from the makers' data sheets: 16 bits, FP8 and float32 (not TF32,
# which torch leaves off). A device that is not listed gets no MFU.
_HOPPER: dict[str, float] = {"16": 989, "fp8": 1979, "float32": 67}
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "A100": {"16": 312, "float32": 19.5},
    "H100 PCIe": {"16": 756, "fp8": 1513, "float32": 51},
    "H100 NVL": {"16": 835, "fp8": 1671, "float32": 60},
    "H100": _HOPPER,
    "H200 NVL": {"16": 835, "fp8": 1671, "float32": 60},
    "H200": _HOPPER,
    "GH200": _HOPPER,
    "B200": {"16": 2250, "fp8": 4500},
    "L40S": {"16": 362, "fp8": 733, "float32": 91.6},
    "RTX 4090": {"16": 165, "fp8": 330, "float32": 82.6},
    # Smaller chips whose names contain the one above: without rates, so that it does not match.
    "RTX 4090 D": {},
    "RTX 4090 Laptop": {},
}

# Holds contexts of torch open until the process ends: one that is freed undoes its setting.
_UNTIL_EXIT = ExitStack()


def resolve_device(name: str) -> torch.device:
    """Returns the device `system.device` names; auto is cuda, else mps, else cpu.

    Raises ConfigError for a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ConfigError(
                f"system.device: {name} was asked for, but torch {torch.__version__} sees {count} "
                "CUDA devices here. Use auto or cpu, or install a CUDA build of torch."
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("system.device: mps was asked for, but this machine has none. Use auto.")
    return device


def prepare_device(device: torch.device) -> None:
    """Sets up torch and the C library for a process that computes on this device.

    Call it before anything is allocated there.
    """
    separate_caches_by_cpu()
    if device.type == "cpu":
        keep_freed_memory()
    if device.type != "cuda":
        return
    # Segments that grow waste less memory when batches differ in size, as those of evaluation do.
    # torch reads this with its first allocation; the second name is that of torch before 2.9.
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # Streams, events and Triton's launches use the current device, which is cuda:0 otherwise.
    torch.cuda.set_device(device)
    # cuBLAS may cut the long sums of weight gradients into parts. They are added in float32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if torch.cuda.get_device_capability(device) >= (9, 0):
        _prefer_cudnn_attention()


def _prefer_cudnn_attention() -> None:
    """Makes cuDNN's attention the first choice of this process, where it takes the operands.

    torch prefers FlashAttention-2, which was written for Ampere and does not use all of what Hopper
    offers (reasoned, not measured). Compiled code keeps the choice made when it was compiled.
    """
    order = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    _UNTIL_EXIT.enter_context(sdpa_kernel(list(order), set_priority=True))


def cuda_versions(device: torch.device) -> dict[str, str | int | None]:
    """Returns compute capability and versions of driver and libraries, for environment.json; empty
    for other devices than CUDA. None: not there, or unknown.
    """
    if device.type != "cuda":
        return {}
    driver = triton = None
    with suppress(OSError):  # "... Kernel Module  580.65.06  ..."
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = next(iter(re.findall(r"\s(\d+\.[\d.]+)\s", text)), None)
    with suppress(PackageNotFoundError):
        triton = version("triton")
    nccl: tuple[int, ...] = ()
    if torch.distributed.is_nccl_available():
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # torch gives no types
    return {
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # the same
        "nccl": ".".join(map(str, nccl)) or None,
        "triton": triton,
    }


def supports_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether the device multiplies bfloat16 matrices in hardware, not by emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # With ATEN_CPU_CAPABILITY=avx2, torch's attention in bfloat16 fails.
        avx2_only = torch.backends.cpu.get_cpu_capability() == "AVX2"
        return not avx2_only and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def compiler_for(device: torch.device) -> str | None:
    """Returns the compiler that torch.compile would use on this device, None if it is missing."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if device.type == "cuda":
        return "triton" if find_spec("triton") else None
    return None


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Returns the device's dense matmul rate in FLOP/s, None where it is unknown.

    dtype: "fp8", "bfloat16", "float16" or "float32".
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    # MIG: a slice of a GPU, and the name does not tell how large it is.
    if not known or " MIG " in name:
        return None
    rates = PEAK_TFLOPS[max(known, key=len)]
    rate = rates.get("16" if dtype in ("bfloat16", "float16") else dtype)
    return None if rate is None else rate * 1e12
