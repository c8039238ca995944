"""A Triton kernel that casts matrices to 8 bits and writes them in both layouts.

`torch._scaled_mm` takes its left operand by rows and its right one by columns, so an operand of two
products is needed as it is and transposed. torch's copy of an 8-bit transpose moves single bytes
that are far apart. Here a block is read once, and written both ways from registers.

The numbers are bit for bit those of `fp8_native.cast_with_scale` on Hopper; on Ada float32 becomes
e4m3 by way of float16, and may be rounded twice. No block depends on another one, and the maximum
is taken over blocks in a second step: nothing is atomic, so runs are reproducible.

This file imports Triton, which comes with torch for CUDA: import it only for tensors on a GPU.
Not measured on a GPU; docs/gpu-predictions.md says what it should save.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # rows and columns: 128 bytes of 8-bit numbers, one transaction, in either layout
WARPS = 8


@triton.jit
def cast_kernel(
    x,
    scale,
    rows,
    columns,
    amax,
    M,
    K,
    x_matrix,
    x_row,
    x_column,
    LIMIT: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x (g, M, K) by its strides, scale (g,) or () -> rows (g, M, K), columns (g, K, M) in 8 bits,
    and amax (g, blocks), the largest absolute value of each block, as the bits of a float32.
    Without rows only amax."""
    j, i, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, k = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (i * BLOCK + m < M) & (j * BLOCK + k < K)
    # 64-bit addresses of every element would take most of the registers: only those of the block's
    # corner are.
    corner = i.to(tl.int64) * BLOCK * x_row + j.to(tl.int64) * BLOCK * x_column
    x += matrix.to(tl.int64) * x_matrix + corner
    values = tl.load(x + m * x_row + k * x_column, mask=inside, other=0.0).to(tl.float32)
    # The bits of positive floats are ordered as integers, and those of NaN are above all others: a
    # maximum of floats would lose NaN.
    bits = tl.abs(values).to(tl.int32, bitcast=True)
    block = (matrix * tl.num_programs(1) + i) * tl.num_programs(0) + j
    tl.store(amax + block, tl.max(tl.max(bits, 1), 0))
    if rows is not None:
        factor = tl.load(scale if ONE_SCALE else scale + matrix)
        scaled = tl.clamp(values * factor, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        small = scaled.to(rows.dtype.element_ty)
        whole = matrix.to(tl.int64) * M * K
        rows += whole + i.to(tl.int64) * BLOCK * K + j * BLOCK
        columns += whole + j.to(tl.int64) * BLOCK * M + i * BLOCK
        tl.store(rows + m * K + k, small, mask=inside)
        tl.store(columns + k * M + m, small, mask=inside)


def amax_of(x: Tensor) -> Tensor:
    """Returns the largest absolute value of each matrix of x (g, M, K): (g,) in float32."""
    return _launch(x, None, None).amax(1)


def cast_both_layouts(
    x: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Casts x (g, M, K) times scale, (g,) or (), to an 8-bit dtype.

    Returns it, (g, M, K), and its transpose, (g, K, M), both row-major, and the largest absolute
    value of each block of x, (g, blocks) in float32.
    """
    g, M, K = x.shape
    rows, columns = (x.new_empty(shape, dtype=dtype) for shape in ((g, M, K), (g, K, M)))
    return rows, columns, _launch(x, scale, (rows, columns))


def _launch(x: Tensor, scale: Tensor | None, out: tuple[Tensor, Tensor] | None) -> Tensor:
    """Writes x in 8 bits to `out`, if given; returns amax of each block, (g, blocks)."""
    g, M, K = x.shape
    grid = triton.cdiv(K, BLOCK), triton.cdiv(M, BLOCK), g
    amax = torch.empty(g, grid[0] * grid[1], dtype=torch.int32, device=x.device)
    rows, columns = out or (None, None)
    cast_kernel[grid](
        x,
        scale,
        rows,
        columns,
        amax,
        M,
        K,
        *x.stride(),
        LIMIT=0.0 if rows is None else torch.finfo(rows.dtype).max,
        ONE_SCALE=scale is not None and scale.dim() == 0,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return amax.view(torch.float32)
