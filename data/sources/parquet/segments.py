"""Cutting row groups into segments, from the rows and bytes that footers state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.loading.order import MIN_SEGMENTS, Integers, Keys, numbered_keys, path_keys
from data.sources.parquet.index import Index

SEGMENT_BYTES = 4 << 20  # of text whose bytes are its tokens
ENCODED_SEGMENT_BYTES = 1 << 19  # of text to be encoded, which takes 50 times as long
SEGMENT_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Successive rows of row groups, as arrays with one entry per segment."""

    group: Integers
    """The row group, counted over all files."""
    first: Integers
    """The first row in it."""
    rows: Integers
    bytes: Integers
    """By the footer: an estimate, as the sizes of documents are not known."""
    key: Keys
    """Names the segment, for the order of its documents."""
    shuffle_key: Keys
    """Names the row group or, of a large one, a part of it: see data/loading/order.py."""

    def __len__(self) -> int:
        return len(self.group)


def cut_segments(index: Index, segment_bytes: int) -> SegmentTable:
    """Cuts every row group into segments of equally many rows, of about `segment_bytes` or less.

    Footers do not tell how long each document is, so a segment with a long one is that much larger.

    A row group above 1 / MIN_SEGMENTS of the data is shuffled in several parts of that size. Its
    segments would otherwise all come one after the other. Up to that size they stay together: to
    read the end of a row group its front has to be decoded too.

    Example, with segment_bytes = 4 MB, and 1 / MIN_SEGMENTS of the data being 8 MB:

        row group   bytes    rows   segments of rows           parts
        0            3 MB     100   [100]                      1: the row group
        1           10 MB     100   [34, 34, 32]               2: [34, 34] and [32]
        2           20 MB       2   [1, 1]                     2, no more than segments
        3            0 MB       0   []                         0
    """
    rows, sizes = index.groups[:, 0], index.groups[:, 2]
    large = max(1, int(sizes.sum()) // MIN_SEGMENTS)
    # Rounding up can leave fewer segments than wanted: 9 rows in 4 segments make 3 of 3 rows.
    wanted = np.maximum(ceil_div(sizes, min(large, segment_bytes)), ceil_div(rows, SEGMENT_ROWS))
    rows_each = ceil_div(rows, np.maximum(_at_least_one(wanted, rows), 1))
    count = np.where(rows > 0, ceil_div(rows, np.maximum(rows_each, 1)), 0)
    parts = _at_least_one(ceil_div(sizes, large), count)

    # From here on one entry per segment instead of per row group.
    group = np.repeat(np.arange(len(rows)), count)
    number = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)  # in its row group
    first = number * rows_each[group]
    taken = np.minimum(rows_each[group], rows[group] - first)
    # Keys come from names, not from positions: a file that is added leaves the order of the others
    # as it was.
    file_keys = path_keys(index.paths)[index.group_file]
    group_keys = numbered_keys(file_keys, index.group_number)[group]
    return SegmentTable(
        group=group,
        first=first,
        rows=taken,
        bytes=sizes[group] * taken // rows[group],
        # The offset keeps the keys of segments apart from those of parts.
        key=numbered_keys(group_keys, number + (1 << 32)),
        shuffle_key=numbered_keys(group_keys, number * parts[group] // count[group]),
    )


def ceil_div(values: Integers, by: Integers | int) -> Integers:
    """Returns values / by, rounded up."""
    return -(-values // by)


def _at_least_one(wanted: Integers, most: Integers) -> Integers:
    """Returns `wanted` within 1 and `most`; 0 where `most` is 0."""
    return np.minimum(np.maximum(wanted, 1), most)
