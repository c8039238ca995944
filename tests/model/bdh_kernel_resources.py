"""Prints what BDH's Triton kernels take of a GPU, compiled without one: a list in JSON.

    python -m tests.model.bdh_kernel_resources 90

A process of its own: kernels that were made for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from model.bdh.masks import DropoutMask
from model.bdh.tiling import Geometry, Rotation, Tiling
from model.bdh.triton import launch
from tests.triton_compiler import Launch, compile_launch

BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32


def launches(width: int, capability: int, plain: bool) -> list[Launch]:
    """All kernels of a model of this width, or those that differ without documents, dropout and
    earlier chunks."""
    found: list[Launch] = []

    def record(
        kernel: Any, programs: int, block: launch.KernelBlock, *args: object, **constants: object
    ) -> None:
        found.append(Launch(kernel, args, constants, block.warps, block.stages))

    launch.launch = record
    geo = Geometry.of(torch.Size((8, 2048, width)), 4, 32 * width, Tiling(512, 4, 16 * width, True))
    M, D, H, N, C = geo.M, geo.D, geo.H, geo.N, geo.C
    x, wide, scores, a = empty(M, D), empty(M, H * N), empty(M, H, C), empty(M, H, D)
    rotation = Rotation(empty(C, N // 2), empty(C, N // 2), *2 * [empty(N // 2, dtype=FP32)])
    documents = None if plain else empty(M, dtype=torch.int64)
    past = None if plain else empty(H, M, D, dtype=FP32)
    mask = (
        None if plain else DropoutMask(empty(M, dtype=INT32), empty(H * N, dtype=INT32), -(2**30))
    )
    kernels = launch.Kernels(geo, BF16, (capability // 10, capability % 10))
    kernels.scores(wide, documents, scores)
    kernels.attend(scores, x, past, a, empty(M, H, dtype=FP32))
    kernels.gate(a, empty(H, D, N), wide, wide, mask)
    out = wide, wide, wide
    kernels.gate_backward(a, empty(H, D, N), x, empty(H * N, D), wide, out, mask)
    kernels.scores_backward(a, x, documents, scores)
    kernels.rope_backward(scores, wide, wide, None if plain else wide, rotation, wide)
    if not plain:
        kernels.encode(x, empty(D, H * N), rotation, wide, wide)
        carries = empty(geo.B, geo.K, dtype=torch.bool)
        kernels.scan_states(wide, rotation, carries)
        kernels.scan_states(wide, rotation, None, reverse=True)
    return found


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def resources(capability: int) -> Iterator[dict[str, object]]:
    # The widths of the table; the variants without arguments are tried at one of them.
    for width, plain in ((64, False), (128, False), (256, False), (256, True), (512, False)):
        for each in launches(width, capability, plain):
            taken = asdict(compile_launch(each, capability))
            yield {"kernel": each.kernel.__name__, "width": width, "plain": plain, **taken}


if __name__ == "__main__":
    print(json.dumps(list(resources(int(sys.argv[1])))))
