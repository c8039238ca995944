"""Prints what the cast kernel takes of a GPU, compiled without one: a list in JSON.

    python -m tests.precision.fp8_cast_resources 90

A process of its own: kernels that were made for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

from engine.precision import fp8_cast
from engine.precision.fp8_native import E4M3, E5M2, largest
from tests.triton_compiler import Launch, compile_launch

M, K = 4096, 8192


def launches() -> Iterator[Launch]:
    with torch.device("meta"):
        scale, amax = torch.empty(()), torch.empty(1, 2048, dtype=torch.int32)
        for source in (torch.bfloat16, torch.float32):
            x = torch.empty(1, M, K, dtype=source)
            constants: dict[str, object] = {"x_column": 1, "BLOCK": fp8_cast.BLOCK}
            for dtype in (E4M3, E5M2):
                out = (torch.empty(shape, dtype=dtype) for shape in ((1, M, K), (1, K, M)))
                args = (x, scale, *out, amax, M, K, M * K, K)
                casts = {**constants, "LIMIT": largest(dtype), "ONE_SCALE": True}
                yield Launch(fp8_cast.cast_kernel, args, casts, fp8_cast.WARPS, 3)
            args = (x, None, None, None, amax, M, K, M * K, K)
            finds = {**constants, "LIMIT": 0.0, "ONE_SCALE": False}
            yield Launch(fp8_cast.cast_kernel, args, finds, fp8_cast.WARPS, 3)


if __name__ == "__main__":
    print(json.dumps([asdict(compile_launch(each, int(sys.argv[1]))) for each in launches()]))
