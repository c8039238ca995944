"""Triton kernels of BDH's layers: products with weights or tokens, and what follows them.

A pass over a tensor as wide as all neurons costs about as much as a product that makes it. These
kernels apply relu, rope, dropout, norm and their derivatives to the results of a product while
those are in registers. Products that nothing follows are left to cuBLAS (`layers.py`).

Tensors are token-major. M = X * C rows are the tokens of X chunks; a wide tensor is (M, H * N), and
the N columns of a head are the first members of its rotated pairs, then the second members. So y,
dx and dE are one product each, which sums over heads too. S is (M, H, C): for each token and head,
its scores with the tokens of its chunk.

    encode           s = relu(x E), r = rope(s)
    scores           S = r r^T where a token sees the other, else 0
    attend           a = LN(S x + past)
    gate             z = s * relu(a G) * mask
    gate_backward    v = a G and dz = dy W^T; z, dv, and the part of du that comes by way of z
    scores_backward  dS + dS^T with dS = dc x^T where a token sees the other
    rope_backward    dr = (dS + dS^T) r + dr_states; du = [s > 0] * (du + rope^T(dr))
    scan_states      from what each chunk adds to the state, the state before each chunk

Rules of this file:

* A program owns the block that it writes, and sums in a fixed order: no atomics, the same bits in
  every run.
* Addresses are a 64-bit base per block plus 32-bit offsets within it. With 64-bit offsets each
  element's address takes two registers, about a hundred per thread, and accumulators spill. For the
  same reason numbers of the block, such as h * D * N, are added to the pointer and not to a range:
  `(h * D + depth)[:, None] * N` in `gate` took 70 registers more.
* Sizes are multiples of the blocks, so no load or store has a mask: masks of rows cost as many
  registers. `layers.py` pads tokens with zeros, which stay zeros through all kernels.
* `input_precision="ieee"`: float32 operands are multiplied as float32, not as TF32.
* An argument that is None is known when a kernel is compiled: what depends on it is left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.bdh.elementwise import HASH_MULTIPLIERS

_MULTIPLY_1 = tl.constexpr(HASH_MULTIPLIERS[0])
_MULTIPLY_2 = tl.constexpr(HASH_MULTIPLIERS[1])


@triton.jit
def _block_of_program(rows, columns, GROUP: tl.constexpr):
    """Returns block row and block column of this program, for a matrix of so many blocks.

    Programs run about in order of their number. Those of GROUP block rows go through the columns
    together, so that the rows stay in the L2 cache and each block of weights is read from it GROUP
    times."""
    pid = tl.program_id(0)
    first = pid // (GROUP * columns) * GROUP
    size = min(rows - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def _is_kept(row_hash, column_hash, threshold):
    """Returns what dropout keeps of a block: the mask of `masks.DropoutMask`, bit for bit.

    No random numbers: forward, backward and `elementwise` compute the same hashes."""
    x = row_hash[:, None] + column_hash[None, :]
    x = (x ^ (x >> 16)) * _MULTIPLY_1
    x = (x ^ (x >> 15)) * _MULTIPLY_2
    return x >= threshold


@triton.jit
def _may_share_document(documents, first, second, B: tl.constexpr):
    """Returns whether two blocks of B tokens can have a document in common: their ranges meet."""
    rows = tl.load(documents + first + tl.arange(0, B))
    columns = tl.load(documents + second + tl.arange(0, B))
    return (tl.max(columns) >= tl.min(rows)) & (tl.max(rows) >= tl.min(columns))


@triton.jit
def _is_seen(documents, chunk_start, rows, columns):
    """Returns which of the columns a row sees: earlier tokens of the chunk, of its own document."""
    seen = rows[:, None] > columns[None, :]
    if documents is not None:
        own = tl.load(documents + chunk_start + rows)
        other = tl.load(documents + chunk_start + columns)
        seen = seen & (own[:, None] == other[None, :])
    return seen


@triton.jit
def encode(
    x,
    encoder,
    cos,
    sin,
    s,
    r,
    M,
    C,
    D: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x (M, D), encoder (D, H * N), cos and sin (C, N/2) -> s, r (M, H * N).

    A block is BN pairs: both members are accumulated side by side, for rope needs both."""
    P: tl.constexpr = N // 2
    WIDE: tl.constexpr = H * N
    i, j = _block_of_program(M // BM, H * (P // BN), GROUP)
    h = j // (P // BN)
    pairs = j % (P // BN) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    start = (i * BM).to(tl.int64)
    x += start * D
    first = tl.zeros((BM, BN), tl.float32)
    second = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        x_block = tl.load(x + rows[:, None] * D + depth[None, :])
        weight = encoder + depth[:, None] * WIDE + h * N + pairs[None, :]
        first = tl.dot(x_block, tl.load(weight), first, input_precision="ieee")
        second = tl.dot(x_block, tl.load(weight + P), second, input_precision="ieee")
    # Backward tells from the stored s where relu passed a gradient, so r is made of s as stored.
    s_first = tl.maximum(first, 0.0).to(s.dtype.element_ty)
    s_second = tl.maximum(second, 0.0).to(s.dtype.element_ty)
    angle = ((i * BM + rows) % C)[:, None] * P + pairs[None, :]
    c, d = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
    a, b = s_first.to(tl.float32), s_second.to(tl.float32)
    base, at = start * WIDE + h * N, rows[:, None] * WIDE + pairs[None, :]
    s += base
    r += base
    tl.store(s + at, s_first)
    tl.store(s + P + at, s_second)
    tl.store(r + at, (a * c - b * d).to(r.dtype.element_ty))
    tl.store(r + P + at, (b * c + a * d).to(r.dtype.element_ty))


@triton.jit
def scores(
    r,
    out,
    documents,
    C,
    H: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """r (M, H * N), documents (M,) or None -> out (M, H, C).

    Blocks above the diagonal, and those that share no document, are zeros without a product."""
    WIDE: tl.constexpr = H * N
    blocks = C // BM
    pid = tl.program_id(0)
    i, j = pid // blocks % blocks, pid % blocks
    h, chunk = pid // (blocks * blocks) % H, pid // (blocks * blocks * H)
    rows, columns = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BM), tl.float32)
    has_work = j <= i
    if documents is not None:
        first, second = chunk * C + i * BM, chunk * C + j * BM
        has_work = has_work & _may_share_document(documents, first, second, BM)
    start = (chunk * C).to(tl.int64)
    if has_work:
        base = r + start * WIDE + h * N
        for k in range(0, N, BK):
            depth = k + tl.arange(0, BK)
            left = tl.load(base + rows[:, None] * WIDE + depth[None, :])
            right = tl.load(base + columns[None, :] * WIDE + depth[:, None])
            total = tl.dot(left, right, total, input_precision="ieee")
        total = tl.where(_is_seen(documents, chunk * C, rows, columns), total, 0.0)
    out += (start * H + h) * C
    tl.store(out + rows[:, None] * (H * C) + columns[None, :], total.to(out.dtype.element_ty))


@triton.jit
def attend(
    S,
    x,
    past,
    a,
    inverse_std,
    M,
    C,
    D: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EPS: tl.constexpr,
):
    """S (M, H, C), x (M, D), past (H, M, D) float32 or None -> a (M, H, D), inverse_std (M, H).

    A block is whole rows of c = S x, since the norm needs them."""
    blocks = C // BM
    pid = tl.program_id(0)
    i, h, chunk = pid % blocks, pid // blocks % H, pid // (blocks * H)
    rows, columns = i * BM + tl.arange(0, BM), tl.arange(0, D)
    start = (chunk * C).to(tl.int64)
    S += (start * H + h) * C
    x += start * D
    c = tl.zeros((BM, D), tl.float32)
    for k in range(0, (i + 1) * BM, BK):  # the rest of the rows is zero
        depth = k + tl.arange(0, BK)
        left = tl.load(S + rows[:, None] * (H * C) + depth[None, :])
        c = tl.dot(
            left, tl.load(x + depth[:, None] * D + columns[None, :]), c, input_precision="ieee"
        )
    if past is not None:
        past += (h.to(tl.int64) * M + start) * D
        c += tl.load(past + rows[:, None] * D + columns[None, :])
    c -= (tl.sum(c, 1) / D)[:, None]
    inverse = 1.0 / tl.sqrt_rn(tl.sum(c * c, 1) / D + EPS)
    a += (start * H + h) * D
    at = rows[:, None] * (H * D) + columns[None, :]
    tl.store(a + at, (c * inverse[:, None]).to(a.dtype.element_ty))
    tl.store(inverse_std + start * H + h + rows * H, inverse)


@triton.jit
def gate(
    a,
    encoder_v,
    s,
    z,
    row_hash,
    column_hash,
    threshold,
    M,
    D: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a (M, H, D), encoder_v (H, D, N), s (M, H * N) -> z (M, H * N), without dropout's scale.

    row_hash (M,) and column_hash (H * N,), int32: None without dropout."""
    WIDE: tl.constexpr = H * N
    i, j = _block_of_program(M // BM, WIDE // BN, GROUP)
    h, columns = j * BN // N, j * BN % N + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    start = (i * BM).to(tl.int64)
    a += (start * H + h) * D
    v = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        a_block = tl.load(a + rows[:, None] * (H * D) + depth[None, :])
        weight = tl.load(encoder_v + h * D * N + depth[:, None] * N + columns[None, :])
        v = tl.dot(a_block, weight, v, input_precision="ieee")
    base, at = start * WIDE + h * N, rows[:, None] * WIDE + columns[None, :]
    product = tl.maximum(v, 0.0) * tl.load(s + base + at).to(tl.float32)
    if row_hash is not None:
        row, column = tl.load(row_hash + i * BM + rows), tl.load(column_hash + h * N + columns)
        product = tl.where(_is_kept(row, column, threshold), product, 0.0)
    tl.store(z + base + at, product.to(z.dtype.element_ty))


@triton.jit
def gate_backward(
    a,
    encoder_v,
    dy,
    decoder,
    s,
    z,
    dv,
    du,
    row_hash,
    column_hash,
    threshold,
    M,
    D: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a (M, H, D), encoder_v (H, D, N), dy (M, D), decoder (H * N, D), s -> z, dv, du (M, H * N).

    Two products share a loop, since the epilogue needs both. du is what comes by way of z; the rest
    comes by way of r, in `rope_backward`."""
    WIDE: tl.constexpr = H * N
    i, j = _block_of_program(M // BM, WIDE // BN, GROUP)
    h, columns = j * BN // N, j * BN % N + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    start = (i * BM).to(tl.int64)
    a += (start * H + h) * D
    dy += start * D
    v = tl.zeros((BM, BN), tl.float32)
    dz = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        a_block = tl.load(a + rows[:, None] * (H * D) + depth[None, :])
        weight = tl.load(encoder_v + h * D * N + depth[:, None] * N + columns[None, :])
        v = tl.dot(a_block, weight, v, input_precision="ieee")
        dy_block = tl.load(dy + rows[:, None] * D + depth[None, :])
        weight = tl.load(decoder + h * N * D + columns[None, :] * D + depth[:, None])  # transposed
        dz = tl.dot(dy_block, weight, dz, input_precision="ieee")
    base, at = start * WIDE + h * N, rows[:, None] * WIDE + columns[None, :]
    s_block = tl.load(s + base + at).to(tl.float32)
    relu_v = tl.maximum(v, 0.0)
    product = s_block * relu_v
    if row_hash is not None:
        row, column = tl.load(row_hash + i * BM + rows), tl.load(column_hash + h * N + columns)
        kept = _is_kept(row, column, threshold)
        product, dz = tl.where(kept, product, 0.0), tl.where(kept, dz, 0.0)
    dv_block = tl.where(v > 0, dz * s_block, 0.0)
    du_block = tl.where(s_block > 0, dz * relu_v, 0.0)
    tl.store(z + base + at, product.to(z.dtype.element_ty))
    tl.store(dv + base + at, dv_block.to(dv.dtype.element_ty))
    tl.store(du + base + at, du_block.to(du.dtype.element_ty))


@triton.jit
def scores_backward(
    dc,
    x,
    out,
    documents,
    C,
    D: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """dc (M, H, D), x (M, D), documents (M,) or None -> out = dS + dS^T, (M, H, C).

    dS is zero above its diagonal: a program below it also writes the mirrored block."""
    blocks = C // BM
    pid = tl.program_id(0)
    i, j = pid // blocks % blocks, pid % blocks
    h, chunk = pid // (blocks * blocks) % H, pid // (blocks * blocks * H)
    if j <= i:
        rows, columns = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
        start = (chunk * C).to(tl.int64)
        total = tl.zeros((BM, BM), tl.float32)
        has_work = True
        if documents is not None:
            first, second = chunk * C + i * BM, chunk * C + j * BM
            has_work = _may_share_document(documents, first, second, BM)
        if has_work:
            dc += (start * H + h) * D
            x += start * D
            for k in range(0, D, BK):
                depth = k + tl.arange(0, BK)
                left = tl.load(dc + rows[:, None] * (H * D) + depth[None, :])
                right = tl.load(x + columns[None, :] * D + depth[:, None])
                total = tl.dot(left, right, total, input_precision="ieee")
            total = tl.where(_is_seen(documents, chunk * C, rows, columns), total, 0.0)
        mirrored = tl.trans(total)
        out += (start * H + h) * C
        if i == j:
            total += mirrored
        else:
            at = columns[:, None] * (H * C) + rows[None, :]
            tl.store(out + at, mirrored.to(out.dtype.element_ty))
        tl.store(out + rows[:, None] * (H * C) + columns[None, :], total.to(out.dtype.element_ty))


@triton.jit
def rope_backward(
    dscores_symmetric,
    r,
    s,
    dr_states,
    du,
    cos,
    sin,
    C,
    H: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dscores_symmetric (M, H, C), r, s (M, H * N), dr_states (M, H * N) or None: completes du.

    Queries are keys, so r gets the gradient of its row of S and that of its column at once."""
    P: tl.constexpr = N // 2
    WIDE: tl.constexpr = H * N
    blocks = C // BM
    pid = tl.program_id(0)
    # Programs of the same pairs follow one another: they read the same columns of r.
    i, pairs = pid % blocks, pid // blocks % (P // BN) * BN + tl.arange(0, BN)
    h, chunk = pid // (blocks * (P // BN)) % H, pid // (blocks * (P // BN) * H)
    rows = i * BM + tl.arange(0, BM)
    start = (chunk * C).to(tl.int64)
    dscores_symmetric += (start * H + h) * C
    base = start * WIDE + h * N
    r += base
    first = tl.zeros((BM, BN), tl.float32)
    second = tl.zeros((BM, BN), tl.float32)
    for k in range(0, C, BK):
        depth = k + tl.arange(0, BK)
        left = tl.load(dscores_symmetric + rows[:, None] * (H * C) + depth[None, :])
        right = r + depth[:, None] * WIDE + pairs[None, :]
        first = tl.dot(left, tl.load(right), first, input_precision="ieee")
        second = tl.dot(left, tl.load(right + P), second, input_precision="ieee")
    at = rows[:, None] * WIDE + pairs[None, :]
    if dr_states is not None:
        dr_states += base
        first += tl.load(dr_states + at).to(tl.float32)
        second += tl.load(dr_states + P + at).to(tl.float32)
    angle = rows[:, None] * P + pairs[None, :]
    c, d = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
    s += base
    du += base
    a = tl.load(du + at).to(tl.float32) + first * c + second * d
    tl.store(du + at, tl.where(tl.load(s + at) > 0, a, 0.0).to(du.dtype.element_ty))
    b = tl.load(du + P + at).to(tl.float32) + second * c - first * d
    tl.store(du + P + at, tl.where(tl.load(s + P + at) > 0, b, 0.0).to(du.dtype.element_ty))


@triton.jit
def scan_states(
    sums,
    cos,
    sin,
    carries,
    K,
    D: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """sums (B, K, H * N, D), what each of K chunks adds: replaced by the state before each chunk.

    cos and sin (N/2,) are of a whole chunk; carries (B, K), 0 where a state does not go on into the
    next one, or None. One launch for all chunks: a program walks along K with the states of BN
    pairs in registers, in float32. REVERSE: from the last chunk to the first, as for gradients."""
    P: tl.constexpr = N // 2
    pid = tl.program_id(0)
    pairs = pid % (P // BN) * BN + tl.arange(0, BN)
    h, sequence = pid // (P // BN) % H, pid // (P // BN * H)
    at = (h * N + pairs)[:, None] * D + tl.arange(0, D)[None, :]
    c, d = tl.load(cos + pairs)[:, None], tl.load(sin + pairs)[:, None]
    if REVERSE:
        d = -d
    first = tl.zeros((BN, D), tl.float32)
    second = tl.zeros((BN, D), tl.float32)
    for step in range(K):
        k = sequence * K + (K - 1 - step if REVERSE else step)
        chunk = sums + k.to(tl.int64) * (H * N * D)
        a, b = tl.load(chunk + at).to(tl.float32), tl.load(chunk + P * D + at).to(tl.float32)
        tl.store(chunk + at, first.to(sums.dtype.element_ty))
        tl.store(chunk + P * D + at, second.to(sums.dtype.element_ty))
        if carries is not None:
            goes_on = tl.load(carries + k).to(tl.float32)
            first, second = first * goes_on, second * goes_on
        a += first
        b += second
        first, second = a * c + b * d, b * c - a * d
