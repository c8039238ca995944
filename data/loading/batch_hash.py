"""A hash of the rows that a step is trained on.

Each row is hashed with its place in the batch of the whole step, and the hashes are added: so any
number of processes, each with some of the rows, finds the same sum, however a step is cut into
micro-steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from torch import Tensor

MODULUS = 2**63
"""Sums travel between processes, and stand in checkpoints, as integers of 64 bits with a sign."""


def hash_rows(micro_batches: Sequence[Tensor], first: int) -> int:
    """Returns the sum of the hashes of rows (B, T + 1) that follow each other in a batch.

    first: the number of the first row in the batch of the whole step.
    """
    rows = (row for rows in micro_batches for row in rows.numpy())
    return sum(_hash(row, place) for place, row in enumerate(rows, first)) % MODULUS


def hash_step(number: int, sums: Iterable[int]) -> int:
    """Returns the hash of a step from what `hash_rows` returned on each process: equal batches of
    two steps have different ones."""
    return _hash((sum(sums) % MODULUS).to_bytes(8, "little"), number) % MODULUS


def _hash(content: object, salt: int) -> int:
    digest = hashlib.blake2b(content, digest_size=8, salt=salt.to_bytes(8, "little"))  # type: ignore[arg-type]  # any buffer
    return int.from_bytes(digest.digest(), "little")
