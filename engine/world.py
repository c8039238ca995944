"""Where the run happens: processes, device, what the hardware can do.

The launcher's environment is read here and nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from config import ConfigError, SystemConfig

# Dense bf16 matrix rate in FLOP/s by the makers' data sheets; a device that is not here has no MFU.
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of glibc's malloc.h


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def device_name(self) -> str:
        """What the start prints, such as `cuda:0 (NVIDIA H100 80GB HBM3)` or `cpu (2 threads)`."""
        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        if self.device.type == "cpu":
            return f"cpu ({torch.get_num_threads()} threads)"
        return str(self.device)


def enter_world(system: SystemConfig) -> World:
    """Reads the launcher's variables and resolves `system.device`; raises ConfigError.

    On a CPU this process keeps the memory that it frees, from here on.
    """
    size = int(os.environ.get("WORLD_SIZE") or "1")
    if size > 1:
        raise ConfigError(
            f"WORLD_SIZE={size}: training on several processes is not available in this version; "
            "start it with `python train.py`, without torchrun."
        )
    device = resolve_device(system.device)
    if device.type == "cpu":
        keep_freed_memory()
    return World(rank=0, size=1, device=device)


def resolve_device(name: str) -> torch.device:
    """The device that `system.device` names; auto is cuda, else mps, else cpu."""
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


def supports_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware rather than by slow emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def keep_freed_memory() -> None:
    """Has the C library keep large blocks that are freed, instead of giving them to the system.

    Each step frees tensors of tens of megabytes and asks for the same again; the system hands out
    fresh pages then, one fault for each 4 KB. Keeping them made BDH's training step on a CPU 8 %
    faster. Without effect where the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def compiler_for(device: torch.device) -> str | None:
    """The compiler torch.compile would use on this device; None when it is missing."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if device.type == "cuda":
        return "triton" if find_spec("triton") else None
    return None


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 rate in FLOP/s, or None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_BF16_FLOPS if key in name]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak device memory on CUDA; elsewhere the peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
