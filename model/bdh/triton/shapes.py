"""Which shapes BDH's Triton kernels take, and how they are cut. Needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.bdh.tiling import Tiling, chunk_tokens, longest_chunk

WIDTHS = (64, 128, 256, 512)  # n_embd: the kernel `attend` holds whole rows of the residual stream
WIDE_BUFFERS = 5  # (M, H * N): s, r, z, dv and du, all alive in backward
# Budgets do not depend on the memory of the GPU: sums, and so the losses of a resumed run, would.
WIDE_BYTES = 2**34  # of these buffers: beyond it, sequences are taken in groups
KEPT_BYTES = 2**33  # of s and r kept for backward: other layers compute them again, 1 product of 10


def unsupported_shape(shape: tuple[int, int, int]) -> str | None:
    """Returns why the kernels do not take encoders of this shape, (H, D, N); None if they do."""
    H, D, N = shape
    if D not in WIDTHS:
        return f"Triton kernels take n_embd 64, 128, 256 or 512, not {D}"
    if N % 128 != 0:
        return f"Triton kernels take multiples of 128 neurons per head, not {N}"
    if 2 * longest_chunk(D) * H * N >= 2**31:
        return f"{H * N:,} neurons are too many for the 32-bit offsets of Triton kernels"
    return None


def triton_tiling(tokens: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype) -> Tiling:
    """Returns the tiling for tokens (B, T) and encoders of this shape, (H, D, N): chunks of whole
    blocks, all neurons in one tile."""
    (batch, length), (H, D, N) = tokens, shape
    chunk = chunk_tokens(length, D, 128)
    if chunk == length:
        # Padding is computed like tokens, small blocks are slow: a compromise.
        chunk = _round_up(length, 64 if length > 32 else 16)
    wide = _round_up(length, chunk) * H * N * dtype.itemsize  # of one sequence
    sequences = max(1, WIDE_BYTES // (WIDE_BUFFERS * wide))
    kept = KEPT_BYTES // (2 * wide * batch) if batch <= sequences else 0
    return Tiling(chunk, H, N // 2, True, sequences=sequences, kept_layers=kept)


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
