"""Compiles launches of Triton kernels for GPUs that are not there, and reads what they take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


@dataclass(frozen=True)
class Launch:
    """What a kernel is launched with; tensors may be on the device "meta"."""

    kernel: Any
    args: tuple[object, ...]
    constants: dict[str, object]
    warps: int
    stages: int


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int

    def __str__(self) -> str:
        return (
            f"registers {self.registers}, spilled {self.spilled_bytes} B, shared "
            f"{self.shared_bytes / 1024:.0f} KB, tensor cores {self.tensor_core_instructions}"
        )


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compiles for a compute capability such as 90; as Triton would at the launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    signature, aligned = dict.fromkeys(names, "constexpr"), {}
    for i, arg in enumerate(launch.args):
        if arg is None:
            constants[(i,)] = None
        elif isinstance(arg, Tensor):
            signature[names[i]] = POINTERS[arg.dtype]
        else:
            signature[names[i]] = "i32"
        # Triton compiles anew for addresses and sizes that are multiples of 16, as these are.
        if isinstance(arg, Tensor) or (isinstance(arg, int) and arg and arg % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    ptx = compiled.asm["ptx"]
    report = _assembler_report(ptx, Path(triton.__file__).parent)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spilled and registers, report
    return Resources(
        registers=int(registers[1]),
        spilled_bytes=int(spilled[1]) + int(spilled[2]),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
    )


def _assembler_report(ptx: str, triton: Path) -> str:
    """Returns what NVIDIA's assembler, which comes with Triton, says of a program."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        program = triton / "backends/nvidia/bin/ptxas"
        command = [program, "-v", f"--gpu-name={target[1]}", path, "-o", Path(folder) / "kernel"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        return done.stderr
