"""The order in which text is seen, as pure functions of integers.

The one idea: every order is a sort by a hash of (seed, epoch, what the thing is called). No random
library takes part, so no version of one can change a run, nothing has to be stored to continue,
and any process can compute the order of any other.

Vocabulary: a *unit* is the smallest piece read at once: documents of one row group, or a row of
tokens of a token file. Units that share a *key* are neighbours in one row group and stay together
(a block), because reading them in turn is cheaper. A *lane* is one of V endless token streams; a
step takes G / V rows from each, in the order of the lanes, so the rows of a step do not depend on
who reads which lane.
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
Tokens: TypeAlias = npt.NDArray[Any]
"""Token ids of any integer type."""
Pieces: TypeAlias = Integers
"""(n, 3): a unit, and the first and the last (not included) of its tokens."""

MAX_LANES = 16
# Small data is cut into at least about this many units, so that it can be split and mixed.
MIN_UNITS = 128
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_UNIT_SALT, _DOCUMENT_SALT, _SPLIT_SALT, _CUT_SALT = 1, 2, 3, 4


def mix(values: Keys) -> Keys:
    """Hash each value; a bijection on 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
    z = values + np.uint64(_GOLDEN)
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MULTIPLY_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MULTIPLY_2)
    z ^= z >> np.uint64(31)
    return z


def fold(*words: int) -> int:
    """Hash integers of any size, in order, into one 64-bit integer."""
    state = 0
    for word in words:
        z = ((state ^ (word & _MASK)) + _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK
        z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK
        state = z ^ (z >> 31)
    return state


def path_keys(paths: Iterable[str]) -> Keys:
    """The key of each relative path: the first 8 bytes of its BLAKE2b."""
    encoded = (path.encode("utf-8", "surrogateescape") for path in paths)
    digests = b"".join(hashlib.blake2b(path, digest_size=8).digest() for path in encoded)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def combine(keys: Keys, numbers: npt.NDArray[np.integer]) -> Keys:
    """Extend each key by a number: the key of group 3 of a file, of slice 2 of a group."""
    return mix(mix(keys) ^ numbers.astype(np.uint64))


def epoch_order(keys: Keys, seed: int, epoch: int, shuffle: bool = True) -> Integers:
    """The permutation of units in one epoch; units of equal key stay together, in file order."""
    if not shuffle:
        return np.arange(len(keys), dtype=np.int64)
    hashed = mix(keys ^ np.uint64(fold(_UNIT_SALT, seed, epoch)))
    return np.argsort(hashed, kind="stable").astype(np.int64)


def document_order(key: int, seed: int, epoch: int, count: int, shuffle: bool = True) -> Integers:
    """The permutation of the documents inside the unit called `key`."""
    numbers = np.arange(count, dtype=np.int64)
    if not shuffle:
        return numbers
    hashed = mix(numbers.astype(np.uint64) ^ np.uint64(fold(_DOCUMENT_SALT, key, seed, epoch)))
    return np.argsort(hashed, kind="stable").astype(np.int64)


@lru_cache(maxsize=256)  # asked for every row
def cut_hash(seed: int, epoch: int, shuffle: bool = True) -> int:
    """What moves the cuts between the rows of token files from epoch to epoch, 64 bits; or 0."""
    return fold(_CUT_SALT, seed, epoch) if shuffle else 0


def split_units(keys: Keys, sizes: Integers, fraction: float) -> npt.NDArray[np.bool_]:
    """Which units are held out for testing: about `fraction` of the bytes, the same for every seed.

    Whole keys are held out, so a block never lies on both sides. With a fraction above 0 at least
    one key is held out and never all; a key that would take the test share above one half (or
    above `fraction`) is passed over. With fewer than two keys nothing is held out.
    """
    names, inverse = np.unique(keys, return_inverse=True)
    if fraction <= 0 or len(names) < 2:
        return np.zeros(len(keys), dtype=np.bool_)
    weights = np.maximum(np.bincount(inverse, weights=sizes), 1)
    total = float(weights.sum())
    order = np.argsort(mix(names ^ np.uint64(fold(_SPLIT_SALT))), kind="stable")
    held_out = np.zeros(len(names), dtype=np.bool_)
    taken = 0.0
    for name in order:
        if taken >= fraction * total:
            break
        if taken + weights[name] <= max(0.5, fraction) * total:
            held_out[name] = True
            taken += weights[name]
    return held_out[inverse]


def lane_count(sequences_per_step: int, blocks: int, limit: int = MAX_LANES) -> int:
    """The largest divisor of `sequences_per_step` that is at most `limit` and at most `blocks`."""
    most = max(1, min(limit, blocks, sequences_per_step))
    return next(v for v in range(most, 0, -1) if sequences_per_step % v == 0)


def count_blocks(keys: Keys) -> int:
    """How many different keys there are."""
    ordered = np.sort(keys)  # np.unique is ten times slower for millions
    return min(1, len(keys)) + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def lane_of(keys: Keys, lanes: int) -> Integers:
    """The lane of each place in a plan, given the keys in the order of the plan.

    Blocks go to the lanes in turn, so equal neighbours stay in one lane.
    """
    starts = np.ones(len(keys), dtype=np.int64)
    starts[1:] = keys[1:] != keys[:-1]
    return (np.cumsum(starts) - 1) % lanes


def lane_targets(tokens: int, lanes: int, epoch: int) -> list[int]:
    """How many of an epoch's tokens each lane gets; over n epochs ceil(n * tokens / lanes) at most.

    What does not divide moves from lane to lane, so none falls behind by more than one token.
    """
    before, after = epoch * tokens, (epoch + 1) * tokens
    return [(after + lane) // lanes - (before + lane) // lanes for lane in range(lanes)]


def balance(lanes: list[Integers], sizes: Integers, targets: list[int]) -> list[Pieces]:
    """Lanes of units as lanes of pieces, of as many tokens as `targets`, which sum to all of them.

    Each lane keeps its units from the front, up to its target; what lies behind is dealt out, in
    the order of the lanes, to those whose units end before it.
    """
    streams = []
    for units in lanes:
        ends = sizes[units]
        streams.append(np.stack((units, np.zeros_like(ends), ends), axis=1))
    totals = [int(stream[:, 2].sum()) for stream in streams]
    kept = [_between(each, 0, target) for each, target in zip(streams, targets, strict=True)]
    rest = np.concatenate(
        [_between(s, t, n) for s, t, n in zip(streams, targets, totals, strict=True)]
    )
    taken, result = 0, []
    for pieces, target, total in zip(kept, targets, totals, strict=True):
        if target > total:
            more = _between(rest, taken, taken + target - total)
            pieces = np.concatenate((pieces, more))
            taken += target - total
        result.append(pieces)
    return result


def _between(pieces: Pieces, first: int, last: int) -> Pieces:
    """The tokens [first, last) of a stream of pieces; empty pieces go with what is before them."""
    ends = np.cumsum(pieces[:, 2] - pieces[:, 1])
    if 0 < first >= last:
        return pieces[:0]
    begin = np.searchsorted(ends, first, "right") if first else 0
    end = np.searchsorted(ends, last, "right")
    is_cut = end < len(ends) and (ends[end - 1] if end else 0) < last
    found = pieces[begin : end + 1 if is_cut else end].copy()
    if is_cut:  # first the end: where there is one piece only, its begin is moved below
        found[-1, 2] -= ends[end] - last
    if first and len(found):
        found[0, 1] += first - (ends[begin - 1] if begin else 0)
    return found


def rank_rows(sequences_per_step: int, world_size: int, rank: int) -> range:
    """The rows of the global batch that process `rank` reads; the world size divides the rows."""
    share = sequences_per_step // world_size
    return range(rank * share, (rank + 1) * share)


def rank_lanes(rows: range, sequences_per_step: int, lanes: int) -> range:
    """The lanes these rows belong to; neighbours may share one when lanes are fewer than ranks."""
    each = sequences_per_step // lanes
    return range(rows.start // each, (rows.stop - 1) // each + 1)
