"""Launches BDH's kernels, on blocks of sizes from a table.

Sizes are not chosen by timing at run time: another block sums in another order, and a resumed run
would differ from an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.bdh.forward import LAYER_NORM_EPS
from model.bdh.masks import DropoutMask
from model.bdh.tiling import Geometry, Rotation
from model.bdh.triton import kernels

Capability = tuple[int, int]
"""CUDA's compute capability of a GPU, e.g. (9, 0)."""


@dataclass(frozen=True)
class KernelBlock:
    """What a program computes at once, and how."""

    rows: int  # tokens
    columns: int  # neurons or pairs of them; 0 where columns are tokens or all of D
    depth: int  # of a step along the summed dimension
    warps: int
    stages: int  # steps whose operands are in shared memory at once


# Chosen by what the compiler reports for 16-bit operands: no spilled registers, and two or three
# programs to a multiprocessor where possible. At D = 256 a product has 4 steps, too few to hide the
# epilogue behind: it is the other programs that do. Not timed on a GPU.
_BLOCKS = {  # Hopper: 227 KB of shared memory, products of 64 rows at once
    "encode": KernelBlock(64, 64, 64, 4, 3),
    "scores": KernelBlock(128, 0, 64, 8, 4),
    "attend": KernelBlock(64, 0, 64, 8, 3),
    "gate": KernelBlock(128, 128, 64, 8, 3),
    "gate_backward": KernelBlock(64, 64, 64, 4, 2),
    "scores_backward": KernelBlock(128, 0, 64, 8, 3),
    "rope_backward": KernelBlock(64, 64, 64, 4, 3),
    "scan_states": KernelBlock(0, 8, 0, 4, 1),
}
_SMALLER_BLOCKS = _BLOCKS | {  # other GPUs: they fit into 99 KB
    "scores": KernelBlock(128, 0, 64, 8, 3),
    "attend": KernelBlock(64, 0, 32, 8, 3),
    "gate": KernelBlock(128, 64, 64, 8, 3),
}


def launch(
    kernel: Any, programs: int, block: KernelBlock, *args: object, **constants: object
) -> None:
    """Runs a kernel; constants are compiled into it."""
    options = {"num_warps": block.warps, "num_stages": block.stages}
    kernel[(programs,)](*args, **constants, **options)


class Kernels:
    """The kernels for tensors of some sizes; shapes as in `kernels`."""

    def __init__(self, geo: Geometry, dtype: torch.dtype, capability: Capability) -> None:
        self._geo, self._itemsize = geo, dtype.itemsize
        self._table = _BLOCKS if capability[0] == 9 else _SMALLER_BLOCKS
        self._widths = {"D": geo.D, "H": geo.H, "N": geo.N}

    def encode(self, x: Tensor, encoder: Tensor, rotation: Rotation, s: Tensor, r: Tensor) -> None:
        geo = self._geo
        block = self._block("encode", geo.M, geo.N // 2, geo.D)
        programs = geo.M // block.rows * geo.H * (geo.N // 2 // block.columns)
        args = x, encoder, rotation.cos, rotation.sin, s, r, geo.M, geo.C
        launch(kernels.encode, programs, block, *args, **self._widths, **_blocked(block))

    def scores(self, r: Tensor, documents: Tensor | None, out: Tensor) -> None:
        geo = self._geo
        block = self._block("scores", geo.C, 0, geo.N)
        programs = geo.X * geo.H * (geo.C // block.rows) ** 2
        sizes = {"H": geo.H, "N": geo.N, "BM": block.rows, "BK": block.depth}
        launch(kernels.scores, programs, block, r, out, documents, geo.C, **sizes)

    def attend(
        self, scores: Tensor, x: Tensor, past: Tensor | None, a: Tensor, inverse_std: Tensor
    ) -> None:
        geo = self._geo
        block = self._block("attend", geo.C, 0, geo.C)
        programs = geo.X * geo.H * (geo.C // block.rows)
        args = scores, x, past, a, inverse_std, geo.M, geo.C
        sizes = {"D": geo.D, "H": geo.H, "BM": block.rows, "BK": block.depth}
        launch(kernels.attend, programs, block, *args, **sizes, EPS=LAYER_NORM_EPS)

    def gate(
        self, a: Tensor, encoder_v: Tensor, s: Tensor, z: Tensor, mask: DropoutMask | None
    ) -> None:
        geo = self._geo
        block = self._block("gate", geo.M, geo.N, geo.D)
        programs = geo.M // block.rows * (geo.H * geo.N // block.columns)
        args = a, encoder_v, s, z, *_hashes(mask), geo.M
        launch(kernels.gate, programs, block, *args, **self._widths, **_blocked(block))

    def gate_backward(
        self,
        a: Tensor,
        encoder_v: Tensor,
        dy: Tensor,
        decoder: Tensor,
        s: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
        mask: DropoutMask | None,
    ) -> None:
        """out: z, dv and du."""
        geo = self._geo
        block = self._block("gate_backward", geo.M, geo.N, geo.D)
        programs = geo.M // block.rows * (geo.H * geo.N // block.columns)
        args = a, encoder_v, dy, decoder, s, *out, *_hashes(mask), geo.M
        launch(kernels.gate_backward, programs, block, *args, **self._widths, **_blocked(block))

    def scores_backward(self, dc: Tensor, x: Tensor, documents: Tensor | None, out: Tensor) -> None:
        geo = self._geo
        block = self._block("scores_backward", geo.C, 0, geo.D)
        programs = geo.X * geo.H * (geo.C // block.rows) ** 2
        sizes = {"D": geo.D, "H": geo.H, "BM": block.rows, "BK": block.depth}
        launch(kernels.scores_backward, programs, block, dc, x, out, documents, geo.C, **sizes)

    def rope_backward(
        self,
        dscores_symmetric: Tensor,
        r: Tensor,
        s: Tensor,
        dr_states: Tensor | None,
        rotation: Rotation,
        du: Tensor,
    ) -> None:
        geo = self._geo
        block = self._block("rope_backward", geo.C, geo.N // 2, geo.C)
        programs = geo.X * (geo.C // block.rows) * geo.H * (geo.N // 2 // block.columns)
        args = dscores_symmetric, r, s, dr_states, du, rotation.cos, rotation.sin, geo.C
        sizes = {"H": geo.H, "N": geo.N}
        sizes |= {"BM": block.rows, "BN": block.columns, "BK": block.depth}
        launch(kernels.rope_backward, programs, block, *args, **sizes)

    def scan_states(
        self, sums: Tensor, rotation: Rotation, carries: Tensor | None, reverse: bool = False
    ) -> None:
        geo = self._geo
        block = self._block("scan_states", 0, geo.N // 2, 0)
        programs = geo.B * geo.H * (geo.N // 2 // block.columns)
        args = sums, rotation.chunk_cos, rotation.chunk_sin, carries, geo.K
        sizes = self._widths | {"BN": block.columns, "REVERSE": reverse}
        launch(kernels.scan_states, programs, block, *args, **sizes)

    def _block(self, kernel: str, rows: int, columns: int, depth: int) -> KernelBlock:
        """Returns the table's block, halved until it divides these sizes."""
        block = self._table[kernel]
        if self._geo.D > 256 and kernel in ("attend", "scan_states"):
            # They hold rows of all D numbers in registers: as many numbers as at D = 256.
            block = replace(block, rows=block.rows // 2, columns=block.columns // 2)
        depth_bytes = 2 * block.depth  # of shared memory, in 16 bits
        return KernelBlock(
            rows=math.gcd(block.rows, rows),
            columns=math.gcd(block.columns, columns),
            depth=math.gcd(depth_bytes // max(2, self._itemsize), depth),
            warps=block.warps,
            stages=block.stages,
        )


def _blocked(block: KernelBlock) -> dict[str, int]:
    return {"BM": block.rows, "BN": block.columns, "BK": block.depth, "GROUP": 8}


def _hashes(mask: DropoutMask | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Returns the hashes by row (M,) and by neuron (H * N,), and the threshold."""
    if mask is None:
        return None, None, 0
    return mask.rows.view(-1), mask.columns.view(-1), mask.threshold
