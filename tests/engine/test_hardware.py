"""What is found out of devices and of memory."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from config import ConfigError
from engine.hardware.device import (
    cuda_versions,
    peak_flops,
    prepare_device,
    resolve_device,
)
from engine.hardware.distributed import World
from engine.hardware.memory import (
    allocated_bytes,
    cgroup_free_bytes,
    free_bytes,
    peak_memory_bytes,
    pinned_bytes,
    ran_out,
)
from engine.planning.memory import MemoryBudget
from tests.conftest import ROOT

CPU = torch.device("cpu")
CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def groups(folder: Path, version: int, limits: dict[str, str]) -> tuple[Path, Path]:
    """Makes a process in a control group a/b, and the root of the groups, with some limits."""
    process, root = folder / "self", folder / "cgroup"
    process.mkdir(parents=True)
    lines = {1: "5:cpu:/\n4:memory:/a/b\n0::/\n", 2: "0::/a/b\n"}
    (process / "cgroup").write_text(lines[version])
    limit_file, usage_file, idle = CGROUP_FILES[version]
    for path, limit in limits.items():
        own = (root / "memory" if version == 1 else root) / path
        own.mkdir(parents=True, exist_ok=True)
        (own / limit_file).write_text(f"{limit}\n")
        (own / usage_file).write_text("300\n")
        (own / "memory.stat").write_text(f"anon 200\n{idle} 50\n")
    return process, root


def test_limits_of_all_control_groups_above_a_process_count(tmp_path: Path) -> None:
    all_three = {"a/b": "5000", "a": "1000", "": "9000"}
    cases: list[tuple[int, dict[str, str], list[int]]] = [
        (1, all_three, [750, 4750, 8750]),
        (2, all_three, [750, 4750, 8750]),
        (2, {"": "1000"}, [750]),  # a container shows its own group as the root
        (2, {"a/b": "max"}, []),
    ]
    for number, (version, limits, free) in enumerate(cases):
        process, root = groups(tmp_path / str(number), version, limits)
        assert sorted(cgroup_free_bytes(process, root)) == free
    assert list(cgroup_free_bytes(tmp_path / "none", tmp_path)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_free_memory_is_less_than_there_is_and_processes_on_a_cpu_share_it() -> None:
    free = free_bytes(CPU)
    assert free is not None and free_bytes(torch.device("mps")) is None
    assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    one, four = (MemoryBudget.of(World(0, size, CPU, size)).free for size in (1, 4))
    assert one is not None and four == pytest.approx(one / 4, rel=0.2)


def test_pinned_memory_is_counted_as_torch_rounds_it() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]


def test_a_process_holds_what_it_allocates() -> None:
    before = allocated_bytes(CPU)
    with mmap.mmap(-1, 64 << 20) as block:  # fresh from the system
        for page in range(0, len(block), 4096):
            block[page] = 1
        assert allocated_bytes(CPU) - before == pytest.approx(len(block), rel=0.1)
    assert peak_memory_bytes(CPU) > 64 << 20


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    measure = """
import resource, sys, torch
from engine.hardware.memory import keep_freed_memory
if "keep" in sys.argv: keep_freed_memory()
for _ in range(10): torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", measure, argument], cwd=ROOT))
        for argument in ("give", "keep")
    ]
    # How many of the ten blocks of 64 MB the heap can reuse depends on what was imported before.
    assert faults[0] - faults[1] > 2 * 2**26 / 4096


def test_errors_of_memory_are_told_from_others_by_type_or_by_the_words_of_each_library() -> None:
    words = [
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 64 bytes",
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ]
    errors = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        *map(RuntimeError, words),
    ]
    assert all(map(ran_out, errors))
    others = ["CUDA error: an illegal memory access was encountered", "NCCL error: remote process"]
    assert not any(ran_out(RuntimeError(each)) for each in others)
    assert not ran_out(OSError("out of memory"))


def test_devices_that_are_not_there_are_refused_with_a_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"system.device: cuda was asked for.* Use auto or cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type in ("cpu", "mps")


def test_a_process_on_cuda_1_is_set_up_for_it_and_what_the_user_set_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    second = torch.device("cuda", 1)
    prepare_device(CPU)
    assert not current and "PYTORCH_ALLOC_CONF" not in os.environ
    prepare_device(second)
    assert current == [second]
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    prepare_device(second)
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_versions_of_cuda_libraries_are_told_for_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_versions(CPU) == {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = cuda_versions(torch.device("cuda", 0))
    assert found["capability"] == "9.0" and found["cuda"] == torch.version.cuda
    assert found.keys() == {"capability", "driver", "cuda", "cudnn", "nccl", "triton"}


def test_the_peak_rate_is_that_of_the_device_and_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[tuple[str, str], float | None] = {
        ("NVIDIA H100 80GB HBM3", "bfloat16"): 989,
        ("NVIDIA H100 80GB HBM3", "fp8"): 1979,
        ("NVIDIA H100 80GB HBM3", "float32"): 67,
        ("NVIDIA H100 PCIe", "float16"): 756,
        ("NVIDIA GH200 480GB", "fp8"): 1979,
        ("NVIDIA A100-SXM4-80GB", "bfloat16"): 312,
        ("NVIDIA A100-SXM4-80GB", "fp8"): None,  # it has none
        ("NVIDIA RTX A1000", "bfloat16"): None,  # no A100
        ("NVIDIA GeForce RTX 4090", "bfloat16"): 165,
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"): None,
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"): None,
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"): None,
        ("Tesla T4", "float16"): None,
    }
    for (name, dtype), tflops in rates.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        expected = None if tflops is None else tflops * 1e12
        assert peak_flops(torch.device("cuda", 0), dtype) == expected, name
    assert peak_flops(CPU, "float32") is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    "capability, first",
    [((8, 0), SDPBackend.FLASH_ATTENTION), ((9, 0), SDPBackend.CUDNN_ATTENTION)],
)
def test_on_hopper_cudnn_is_asked_first_and_compiled_attention_stays_one_graph(
    capability: tuple[int, int], first: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    attention = F.scaled_dot_product_attention
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 2, 8, 16)
    with sdpa_kernel(_cur_sdpa_kernel_backends(with_priority=True), set_priority=True):
        prepare_device(torch.device("cuda", 0))
        assert _cur_sdpa_kernel_backends(with_priority=True)[0] == first
        assert torch.equal(compiled(q, q, q), attention(q, q, q))
