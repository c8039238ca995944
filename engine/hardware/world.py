"""Where the run happens: processes, device, what the hardware can do.

The launcher's environment is read here and nowhere else. The verbs of a `World` that talk to the
other processes are collective: all call them, in the same order, or none does.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from config import ConfigError, DistributedConfig, SystemConfig

T = TypeVar("T")

# Dense matrix rates in TFLOP/s by the makers' data sheets, of products in 16 bits, in FP8 and in
# float32 (not TF32, which torch leaves off). What is not here has no MFU.
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
    "RTX 4090 D": {},  # smaller ones with a longer name
    "RTX 4090 Laptop": {},
}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of glibc's malloc.h
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_GROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # what torchrun sets with WORLD_SIZE
_TIMEOUT = timedelta(minutes=30)  # of waiting for another process; rank 0 may prepare data so long


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        """Whether tensors lie in the machine's own memory."""
        return self.device.type == "cpu"

    @property
    def device_name(self) -> str:
        """What the start prints, such as `cuda:0 (NVIDIA H100 80GB HBM3)` or `cpu (2 threads)`."""
        name = str(self.device)
        if self.device.type == "cuda":
            name = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        elif self.device.type == "cpu":
            name = f"cpu ({torch.get_num_threads()} threads)"
        return name if self.size == 1 else f"{name} x {self.size} processes"

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes; in place where there are several."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_number(self, value: float) -> float:
        """The sum of `value` over all processes."""
        if self.size == 1:
            return value
        return float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def least(self, value: int) -> int:
        """The smallest `value` of all processes."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MIN)
        return int(box)

    def most(self, values: Tensor) -> Tensor:
        """The largest of each of `values` over all processes; in place where there are several."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in some process."""
        return bool(self.sum_number(flag))

    def broadcast(self, value: T) -> T:
        """The main process's `value`: of plain Python."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in the main one; elsewhere only its own."""
        if self.size == 1:
            return [value]
        box: list[T] = [value] * self.size
        dist.gather_object(value, box if self.is_main else None)
        return box if self.is_main else [value]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """What follows is done by the main process, then by the others, who find it done."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()


@contextlib.contextmanager
def enter_world(system: SystemConfig, distributed: DistributedConfig) -> Iterator[World]:
    """Joins the processes that torchrun started and resolves `system.device`; raises ConfigError.

    On a CPU this process keeps the memory that it frees, from here on. All processes but the main
    one are silent on standard output.
    """
    size = _launcher_number("WORLD_SIZE", 1, 10**6) if os.environ.get("WORLD_SIZE") else 1
    device = resolve_device(system.device)
    if size > 1:
        device = _join(size, device, distributed.backend)
    if device.type == "cpu":
        keep_freed_memory()
    yield World(rank=dist.get_rank() if size > 1 else 0, size=size, device=device)


def _join(size: int, device: torch.device, backend: str) -> torch.device:
    """Opens the connections; the device of this process."""
    missing = [name for name in _LAUNCHER if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size}, but {', '.join(missing)} is not set: several processes are "
            f"started with torchrun --standalone --nproc_per_node={size} train.py ..."
        )
    rank = _launcher_number("RANK", 0, size - 1)
    local = _launcher_number("LOCAL_RANK", 0, size - 1)
    _launcher_number("MASTER_PORT", 0, 65535)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU: torch sees "
                f"{torch.cuda.device_count()}. Lower --nproc_per_node."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
        logging.disable(logging.WARNING)
    wanted = {"cpu": "gloo", "mps": "gloo", "cuda": "nccl"}[device.type]
    if backend == "nccl" and wanted != "nccl":
        raise ConfigError(f"distributed.backend=nccl needs CUDA, and system.device is {device}.")
    kind = wanted if backend == "auto" else backend
    try:
        # Objects and single numbers go between CPUs whatever the tensors do.
        names = "cpu:gloo,cuda:nccl" if kind == "nccl" else "gloo"
        dist.init_process_group(names, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the {size} processes of WORLD_SIZE did not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})."
        ) from None
    return device


def _launcher_number(name: str, least: int, most: int) -> int:
    """Returns a whole number that torchrun sets; raises ConfigError."""
    text = os.environ[name]
    number = int(text) if re.fullmatch("[0-9]{1,7}", text) else -1
    if not least <= number <= most:
        raise ConfigError(
            f"the environment variable {name}={text!r} is not a whole number from {least} to "
            f"{most}. Unset it to train in one process; torchrun sets it for several."
        )
    return number


def end_process(code: int) -> NoReturn:
    """Leaves with an exit code; where there were several processes, without taking torch apart.

    Freeing gloo's group and what holds it has been seen to wait for ever. All is saved by now.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_main_process() -> bool:
    """Returns whether this process prints for all ranks, also before they have joined."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def lost_peer(error: BaseException) -> bool:
    """Whether an error of torch means that another process has gone."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Timed out waiting")
    return dist.is_initialized() and any(sign in text for sign in signs)


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
        # Attention in bf16 fails where torch was told to do with AVX2 (ATEN_CPU_CAPABILITY).
        below = torch.backends.cpu.get_cpu_capability() == "AVX2"
        return not below and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def keep_freed_memory() -> None:
    """Has the C library keep large blocks that are freed, instead of giving them to the system.

    Each step frees tensors of tens of megabytes and asks for the same again; the system hands out
    fresh pages then, one fault for each 4 KB. Keeping them made BDH's training step on a CPU 8 %
    faster. Without effect where the C library is not glibc.
    """
    if keeps_freed_memory():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` has an effect."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def compiler_for(device: torch.device) -> str | None:
    """The compiler torch.compile would use on this device; None when it is missing."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if device.type == "cuda":
        return "triton" if find_spec("triton") else None
    return None


def peak_flops(device: torch.device, products: str) -> float | None:
    """The device's dense matrix rate in FLOP/s, or None where it is unknown.

    products: "fp8", "bfloat16", "float16" or "float32".
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    if not known or " MIG " in name:  # a slice of a GPU: how much of it, the name does not say
        return None
    rate = PEAK_TFLOPS[max(known, key=len)].get(
        "16" if products in ("bfloat16", "float16") else products
    )
    return None if rate is None else rate * 1e12


def peak_memory_bytes(device: torch.device) -> int:
    """Peak device memory on CUDA; elsewhere the peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # getrusage would count a large parent that started this
        status = Path("/proc/self/status").read_text(encoding="ascii")
        found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes(device: torch.device) -> int:
    """What this process holds now: of the device's memory on CUDA, elsewhere of the machine's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    return peak_memory_bytes(device)


def free_bytes(device: torch.device) -> int | None:
    """What this process can still get of the device's memory; None where nobody tells.

    On a CPU the least of what the machine has available and what its control groups allow.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [*_available(Path("/proc/meminfo")), *_allowed(Path("/proc/self"), _CONTROL_GROUPS)]
    known += _addresses(Path("/proc/self/statm"))
    return max(0, min(known)) if known else None


def _available(meminfo: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if found:
            yield int(found[1]) * 1024


def _addresses(statm: Path) -> Iterator[int]:
    """What a limit on the address space (ulimit -v) leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(statm.read_text(encoding="ascii").split()[0])
            yield limit - pages * resource.getpagesize()


def _allowed(process: Path, root: Path) -> Iterator[int]:
    """What is left of each limit on the control groups of a process, by version 1 or 2.

    Cached pages of files that nobody has used for a while are given up first, so they are free. A
    container may show its own group as the root.
    """
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = _GROUP_V1 if controllers else _GROUP_V2
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            yield from _left(folder, *names)
            if folder == top:
                break


def _left(folder: Path, limit: str, usage: str, idle: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return
        used = int((folder / usage).read_text())
        found = re.search(rf"^{idle} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        yield int(allowed) - used + (int(found[1]) if found else 0)
