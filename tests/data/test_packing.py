"""A lane is an endless stream: nothing lost, nothing twice, and it can be entered anywhere."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import DataError
from data.loading.packing import (
    Lane,
    LaneReader,
    PackedLane,
    Position,
    PositionMap,
    RowLane,
    document_ids,
    windows,
)

Array = npt.NDArray[Any]


class Counted(LaneReader):
    """Segments of given lengths, rolled by one in each epoch; values count up over all of them."""

    def __init__(self, lengths: list[int], offset: int = 0, dtype: type = np.uint8) -> None:
        self.lengths, self.offset, self.dtype = lengths, offset, dtype

    def count(self, epoch: int, lane: int) -> int:
        return len(self.lengths)

    def segment(self, epoch: int, index: int) -> int:
        return (index - epoch) % len(self.lengths)

    def tokens(self, epoch: int, lane: int, index: int) -> Array:
        segment = self.segment(epoch, index)
        values = (np.arange(self.lengths[segment]) + 31 * segment + 7 * epoch) % 256
        return (values + self.offset).astype(self.dtype)

    def prefetch(self, epoch: int, lane: int, index: int, count: int | None = None) -> None:
        pass

    def stream(self, epochs: int) -> Array:
        indexes = range(len(self.lengths))
        return np.concatenate([self.tokens(e, 0, i) for e in range(epochs) for i in indexes])


def filled(
    lane: Lane, count: int, block_size: int, dtype: type = np.uint8
) -> tuple[Array, PositionMap]:
    """The next rows (count, T + 1), written between others, and where they came from."""
    out: Array = np.zeros((3 * count, block_size + 1), dtype=dtype)
    here = lane.fill(out[:0]).position(0)  # reading no row changes nothing
    positions = lane.fill(out[1::3])
    assert positions.position(0) >= here
    assert not out[::3].any()
    assert not out[2::3].any()
    return out[1::3], positions


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
reads = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@given(lengths, reads, st.integers(1, 5), st.data())
def test_packed_rows_are_windows_of_the_stream_and_every_position_continues_it(
    sizes: list[int], counts: list[int], T: int, draw: st.DataObject
) -> None:
    source = Counted(sizes)
    expected = source.stream(epochs=(sum(counts) + 4) * T + 2)
    lane, done = PackedLane(source, 0), 0
    for count in counts:
        rows, positions = filled(lane, count, T)
        assert np.array_equal(rows, windows(expected[done : done + count * T + 1], T))
        assert sum(length for _, length in positions.pieces(0, count * T)) == count * T + 1
        token = draw.draw(st.integers(0, count * T))
        again, _ = filled(PackedLane(source, 0, positions.position(token)), 1, T)
        assert np.array_equal(again[0], expected[done + token :][: T + 1])
        done += count * T


whole = st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 4))
"""The rows of each segment, and T."""


@given(whole, reads)
def test_rows_of_segments_of_whole_rows_cross_no_end_and_every_row_can_begin(
    shape: tuple[list[int], int], counts: list[int]
) -> None:
    rows_each, T = shape
    source = Counted([count * T + 1 for count in rows_each])
    expected = [
        (Position(epoch, index, row * T), source.tokens(epoch, 0, index)[row * T :][: T + 1])
        for epoch in range(sum(counts) + 2)
        for index in range(len(rows_each))
        for row in range(rows_each[source.segment(epoch, index)])
    ]
    lane, done = RowLane(source, 0), 0
    for count in counts:
        rows, positions = filled(lane, count, T)
        for i in range(count):
            position, row = expected[done + i]
            assert positions.position(i * T) == position
            assert positions.pieces(i * T, (i + 1) * T) == [(position, T + 1)]
            assert np.array_equal(rows[i], row)
            again, _ = filled(RowLane(source, 0, position), 1, T)
            assert np.array_equal(again[0], row)
        done += count
        assert positions.position(count * T) == expected[done][0]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_segments_of_any_type_are_read_into_rows_of_another(dtype: type) -> None:
    for lane, sizes in ((PackedLane, [3, 0, 701]), (RowLane, [1401, 15])):
        source = Counted(sizes, 40_000, dtype)
        rows, _ = filled(lane(source, 0), 100, 14, np.int32)
        assert np.array_equal(rows, windows(source.stream(2).astype(np.int32), 14)[:100])


def test_a_lane_keeps_nothing_of_what_it_reads_from() -> None:
    kept: list[weakref.ref[Array]] = []

    class Views(Counted):
        def tokens(self, epoch: int, lane: int, index: int) -> Array:
            tokens = super().tokens(epoch, lane, index)
            kept.append(weakref.ref(tokens))
            return tokens[:]

    filled(PackedLane(Views([500, 500]), 0), 9, 11)
    assert [view() for view in kept] == [None]


def test_lanes_without_text_and_positions_in_other_data_are_errors() -> None:
    for sizes in ([], [0], [0, 0, 0]):
        with pytest.raises(DataError, match="no text in the"):
            filled(PackedLane(Counted(sizes), 0), 1, 1)
    cases: list[tuple[type[Lane], tuple[int, int, int]]] = [
        (PackedLane, (0, 2, 0)),
        (PackedLane, (0, 1, 5)),
        (RowLane, (0, 2, 0)),
        (RowLane, (0, 1, 3)),  # between two rows
        (RowLane, (1, 0, 4)),
    ]
    for lane, position in cases:
        with pytest.raises(DataError, match="belongs to other data"):
            filled(lane(Counted([5, 5]), 0, Position(*position)), 1, 2)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**31))
def test_document_ids_match_a_slow_count(B: int, T: int, seed: int) -> None:
    rows = torch.randint(0, 3, (B, T), generator=torch.Generator().manual_seed(seed))
    ids = document_ids(rows, separator=0)
    for b in range(B):
        document = 0
        for t in range(T):
            assert int(ids[b, t]) == document
            document += int(rows[b, t] == 0)
    assert ids.dtype == torch.int32
    with pytest.raises(AssertionError, match="no separator"):
        document_ids(rows, None)
