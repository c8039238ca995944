"""The order in which a run sees its text, as pure functions of integers.

Every order is a sort by a hash of (seed, epoch, name of the thing that is sorted). No random
generator takes part: no library version can change a run, nothing has to be stored to resume, and
every process can compute the order of every other.

    row groups   a.parquet: [ 0 ][    1    ]  b.parquet: [ 0 ][ 1 ]     documents, as stored
    segments     [s0][s1|s2]                  [s3][s4]                  what is read at once
                          shuffled, then dealt to the lanes in turn
    lanes        lane 0:  s3 s0 ...        =  t t t t t t t t t t ...   endless streams of tokens
                 lane 1:  s1 s2 s4 ...     =  t t t t t t t t t t ...
    rows         lane 0:  [ T+1 tokens ]          each begins with the last token of the one before
                                    [ T+1 tokens ]
    batch        [ lane 0: G/L rows | lane 1: G/L rows | ... ]          G rows in each step
    ranks        [ rank 0: G/W rows       | rank 1: G/W rows | ... ]

    mixture      [ source 0: lane 0 | lane 1 | ...  | source 1: lane 0 | ... ]      G rows as well

    T = training.block_size   G = sequences_per_step   L = lanes   W = world_size

Segment: what is read at once: successive documents of one row group, or rows of a token file.
Shuffle key: the name that a segment is sorted by. The segments of one row group share it and stay
    together (s1 and s2 above), because reading them one after the other is cheaper.
Own key: the name of one segment alone, by which its documents are shuffled.
Lane: one of L endless token streams. A batch has its rows lane after lane, so they do not depend on
    which process or worker reads which lane. The k-th row of the run comes from lane k % L: as L
    divides G, each gives the same number to every batch.
Source: one of the texts of dataset.mixture. Each has segments, lanes and epochs of its own, and its
    k-th row comes from its lane k % L. How many rows it gives to a batch follows from the weights
    (shares.py), so L need not divide it: lanes may differ by a row.
Row: one sequence of a batch: T + 1 tokens, since the T targets are the T inputs shifted by one.
Epoch: one pass over the training text. Each epoch has its own order of segments and documents.
Share (lanes.py): the tokens of a segment that one lane reads, where several lanes share it.
Position (packing.py): the next token of a lane. The positions of all lanes are what a resume needs,
    and of a mixture the rows that each source has given.
Chunk (loader.py): the rows of some successive steps, which the loader reads ahead as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = npt.NDArray[np.uint64]
Integers: TypeAlias = npt.NDArray[np.int64]
Booleans: TypeAlias = npt.NDArray[np.bool_]
Tokens: TypeAlias = npt.NDArray[Any]
"""Token ids of any integer type."""

PLAN_VERSION = 2
"""The rule that deals segments to lanes. In version 1, which old checkpoints continue, the lanes of
documents were not balanced."""

# More lanes mix documents better, but each holds a segment in memory.
MAX_LANES = 16
# Small data is cut into about this many segments, so that it can be split and mixed.
MIN_SEGMENTS = 128

# The constants of splitmix64 (Steele, Lea, Flood 2014). Changing one changes every run.
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
# Each use of the hash has its own salt, so that, say, the split says nothing about the order.
_SEGMENT_SALT, _DOCUMENT_SALT, _SPLIT_SALT, _OFFSET_SALT = 1, 2, 3, 4


def hash_array(values: Keys) -> Keys:
    """Hashes each value with the finalizer of splitmix64, a bijection on 64 bits."""
    z = values + np.uint64(_GOLDEN)
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MULTIPLY_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MULTIPLY_2)
    z ^= z >> np.uint64(31)
    return z


def hash_integers(*words: int) -> int:
    """Hashes a sequence of integers of any size into one 64-bit integer."""
    state = 0
    for word in words:
        z = ((state ^ (word & _MASK)) + _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK
        z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK
        state = z ^ (z >> 31)
    return state


def path_keys(paths: Iterable[str]) -> Keys:
    """Returns a key for each relative path: the first 8 bytes of its BLAKE2b."""
    # Relative paths, so that a folder can be moved. surrogateescape: names need not be UTF-8.
    encoded = (path.encode("utf-8", "surrogateescape") for path in paths)
    digests = b"".join(hashlib.blake2b(path, digest_size=8).digest() for path in encoded)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def numbered_keys(keys: Keys, numbers: npt.NDArray[np.integer]) -> Keys:
    """Returns a key for number i of a thing with key k, such as row group 3 of a file."""
    # The keys are hashed first: two that differ in low bits only could meet, k ^ 1 == k' ^ 2.
    return hash_array(hash_array(keys) ^ numbers.astype(np.uint64))


def segment_order(keys: Keys, seed: int, epoch: int, shuffle: bool = True) -> Integers:
    """Returns the permutation of segments in one epoch, given their shuffle keys.

    The sort is stable, so segments with the same key stay together and in file order.
    """
    if not shuffle:
        return np.arange(len(keys), dtype=np.int64)
    # XOR with a salted hash keeps equal keys equal; hashing then scatters the different ones.
    hashed = hash_array(keys ^ np.uint64(hash_integers(_SEGMENT_SALT, seed, epoch)))
    return np.argsort(hashed, kind="stable").astype(np.int64)


def document_order(key: int, seed: int, epoch: int, count: int, shuffle: bool = True) -> Integers:
    """Returns the permutation of the `count` documents in the segment whose own key is `key`."""
    numbers = np.arange(count, dtype=np.int64)
    if not shuffle:
        return numbers
    salt = np.uint64(hash_integers(_DOCUMENT_SALT, key, seed, epoch))
    return np.argsort(hash_array(numbers.astype(np.uint64) ^ salt), kind="stable").astype(np.int64)


@lru_cache(maxsize=256)  # called for every row of a token file
def row_offset_hash(seed: int, epoch: int, shuffle: bool = True) -> int:
    """Returns 64 bits that decide where the first row of a token file begins in an epoch, or 0."""
    return hash_integers(_OFFSET_SALT, seed, epoch) if shuffle else 0


def choose_held_out(keys: Keys, sizes: Integers, fraction: float) -> Booleans:
    """Marks the segments held out for testing: about `fraction` of the bytes, for every seed.

    Segments with the same shuffle key are held out together. With a fraction above 0 at least one
    key is held out and never all; a key that would raise the held-out share above
    max(1/2, fraction) is passed over. With fewer than two keys nothing is held out.
    """
    names, inverse = np.unique(keys, return_inverse=True)
    if fraction <= 0 or len(names) < 2:
        return np.zeros(len(keys), dtype=np.bool_)
    # At least 1 each: a key without text must not be held out for free, before any other.
    weights = np.maximum(np.bincount(inverse, weights=sizes), 1)
    total = float(weights.sum())
    # The training seed takes no part, so runs with different seeds evaluate on the same text.
    order = np.argsort(hash_array(names ^ np.uint64(hash_integers(_SPLIT_SALT))), kind="stable")
    held_out = np.zeros(len(names), dtype=np.bool_)
    taken = 0.0
    for name in order:
        if taken >= fraction * total:
            break
        # One row group of half the data would otherwise leave nothing to train on.
        if taken + weights[name] <= max(0.5, fraction) * total:
            held_out[name] = True
            taken += weights[name]
    return held_out[inverse]


def count_distinct(keys: Keys) -> int:
    """Returns the number of different keys."""
    ordered = np.sort(keys)  # np.unique is ten times slower for millions
    return min(1, len(keys)) + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def lane_count(sequences_per_step: int, available: int, limit: int = MAX_LANES) -> int:
    """Returns the largest divisor of `sequences_per_step` up to `limit` and `available`.

    The number of processes takes no part: a run resumed on other hardware keeps its lanes.
    """
    most = max(1, min(limit, available, sequences_per_step))
    return next(v for v in range(most, 0, -1) if sequences_per_step % v == 0)


def rank_rows(sequences_per_step: int, world_size: int, rank: int) -> range:
    """Returns the rows of the batch that process `rank` reads; world_size divides the rows."""
    share = sequences_per_step // world_size
    return range(rank * share, (rank + 1) * share)


def rows_before_lane(rows: Integers | int, lane: Integers, lanes: Integers | int) -> Integers:
    """Returns how many of the first `rows` rows of a source come from lanes below `lane`.

    Row k comes from lane k % lanes.
    """
    return rows // lanes * lane + np.minimum(rows % lanes, lane)


def rank_lanes(rows: range, firsts: range, counts: range, lanes: int) -> range:
    """Returns the lanes of a source that these rows of the batch can come from in any step.

    Neighbouring ranks may read the same lane and keep different rows.

    Args:
        firsts: what the number of the source's first row in the batch can be.
        counts: how many rows the source can give in a step.
    """
    # Of n successive rows, lanes below v have at most `highest` rows, and at least what the other
    # lanes leave them. With one source all rows begin at lane 0, and the two are equal.
    lane = np.arange(lanes + 1)
    highest = firsts[-1] + rows_before_lane(counts[-1], lane, lanes)
    lowest = firsts[0] + counts[0] - rows_before_lane(counts[0], lanes - lane, lanes)
    found = np.flatnonzero((lowest[:-1] < rows.stop) & (highest[1:] > rows.start)).tolist()
    return range(found[0], found[-1] + 1) if found else range(0)
