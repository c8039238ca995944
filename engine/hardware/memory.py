"""How much memory this process holds and can still get, on a device or in the machine, and whether
an error means that it ran out."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # names of glibc's malloc.h
_RETURNED_BYTES = 1 << 20  # freed blocks from this size on, by `return_freed_memory`
# Out of memory where torch raises a plain RuntimeError: on a CPU, from the CUDA runtime, from NCCL,
# and from cuBLAS and cuDNN, whose handles are made at first use.
_RAN_OUT = re.compile(
    "can't allocate memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED|failure.* 'out of memory'"
)
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# Of a control group: files with limit and usage, and the line of memory.stat with idle file pages.
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")


def keep_freed_memory() -> None:
    """Has the C library keep large freed blocks instead of returning them to the system.

    Each step frees tensors of tens of megabytes and asks for the same again; the system hands out
    fresh pages then, one fault for each 4 KB. Keeping them made BDH's training step on a CPU 8 %
    faster. Does nothing where the C library is not glibc.
    """
    if can_keep_freed_memory():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Undoes `keep_freed_memory`: the C library returns large freed blocks to the system at once.

    For sharded models on a CPU. Whole layers are gathered and freed between slices that stay, and
    the gaps, of many sizes, came to more than all blocks in use. Does nothing without glibc.
    """
    if can_keep_freed_memory():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 65536)  # glibc's default
        library.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _RETURNED_BYTES)


def can_keep_freed_memory() -> bool:
    """Returns whether `keep_freed_memory` has an effect: only glibc knows its options."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak device memory on CUDA; elsewhere the peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage would count the memory of a large parent process that forked this one.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def allocated_bytes(device: torch.device) -> int:
    """Returns what the process holds now: device memory on CUDA, elsewhere resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    return peak_memory_bytes(device)


def free_bytes(device: torch.device) -> int | None:
    """Returns how much more memory the process can get on a device, None where it is unknown.

    On a CPU this is the least of the machine's available memory, the limits of the process's
    control groups, and the limit on its address space.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [*_available_bytes(), *cgroup_free_bytes(), *_address_space_bytes()]
    return max(0, min(known)) if known else None


def pinned_bytes(size: int) -> int:
    """Returns what torch takes for `size` bytes of pinned host memory: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def cublas_workspace_bytes(device: torch.device) -> int:
    """Returns what torch allocates for cuBLAS in a training step; 0 elsewhere than on CUDA.

    Each thread has its own workspace: the main one, and autograd's for the backward pass. The sizes
    are torch's defaults.
    """
    if device.type != "cuda":
        return 0
    on_hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    return 2 * ((32 << 20) if on_hopper else (8 << 20) + (128 << 10))


def ran_out(error: BaseException) -> bool:
    """Returns whether Python, a device or torch on a CPU ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _RAN_OUT.search(str(error)) is not None


def _available_bytes() -> Iterator[int]:
    with contextlib.suppress(OSError):
        meminfo = Path("/proc/meminfo").read_text()
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)
        if found:
            yield int(found[1]) * 1024


def _address_space_bytes() -> Iterator[int]:
    """Yields what a limit on the address space (ulimit -v) leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            yield limit - pages * resource.getpagesize()


def cgroup_free_bytes(
    process: Path = Path("/proc/self"), root: Path = _CGROUP_ROOT
) -> Iterator[int]:
    """Yields what each memory limit on the control groups of a process leaves, of version 1 or 2.

    process: the folder of the process in /proc. root: where control groups are mounted.
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
        names = _CGROUP_V1 if controllers else _CGROUP_V2
        own = top / path.lstrip("/")
        # A limit of any ancestor holds too. In a container the named folders may be missing, and
        # its own group is mounted as the root, which the walk reaches last.
        for folder in (own, *own.parents):
            yield from _cgroup_left(folder, *names)
            if folder == top:
                break


def _cgroup_left(folder: Path, limit: str, usage: str, idle: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return
        used = int((folder / usage).read_text())
        # The kernel drops cached file pages that have not been used for a while before it refuses
        # memory, so they count as free.
        found = re.search(rf"^{idle} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        yield int(allowed) - used + (int(found[1]) if found else 0)
