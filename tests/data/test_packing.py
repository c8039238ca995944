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
from data.loading.packing import LaneStream, RowStream, Trace, document_ids, positions, windows

Array = npt.NDArray[np.uint8]


class Units:
    """Units of given lengths; token values count up over the whole epoch."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def lane_units(self, epoch: int, lane: int) -> npt.NDArray[np.int64]:
        return np.roll(np.arange(len(self.lengths)), epoch)

    def tokens(self, epoch: int, lane: int, place: int) -> Array:
        unit = int(self.lane_units(epoch, lane)[place])
        return (np.arange(self.lengths[unit]) + 31 * unit + 7 * epoch).astype(np.uint8)

    def stream(self, epochs: int) -> Array:
        places = range(len(self.lengths))
        parts = [self.tokens(e, 0, place) for e in range(epochs) for place in places]
        return np.concatenate(parts)


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


def filled(
    lane: LaneStream | RowStream, count: int, block_size: int, dtype: type = np.uint8
) -> tuple[npt.NDArray[Any], Trace]:
    """The next rows (count, T + 1), written between others, and where they came from."""
    out: npt.NDArray[Any] = np.zeros((count, 3, block_size + 1), dtype=dtype)
    trace = lane.fill(out[:, 1])
    assert not out[:, ::2].any()
    return out[:, 1], trace


@given(lengths, st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 5))
def test_rows_are_windows_of_the_stream_over_all_joins(
    sizes: list[int], reads: list[int], T: int
) -> None:
    units = Units(sizes)
    expected = units.stream(epochs=sum(reads) * T + 2)
    lane, done = LaneStream(units, 0), 0
    for count in reads:
        rows, _ = filled(lane, count, T)
        assert np.array_equal(rows, windows(expected[done : done + count * T + 1], T))
        done += count * T


@given(lengths, st.integers(1, 9), st.integers(1, 5), st.data())
def test_every_address_continues_the_stream(
    sizes: list[int], count: int, T: int, draw: st.DataObject
) -> None:
    units = Units(sizes)
    rows, trace = filled(LaneStream(units, 0), count, T)
    stream = np.append(rows[:, :-1], rows[-1, -1])
    token = draw.draw(st.integers(0, count * T))
    rest, _ = filled(LaneStream(units, 0, trace.address(token)), count, T)
    assert np.array_equal(
        rest[:, :-1].flatten()[: len(stream) - token], stream[token:][: count * T]
    )
    assert sum(length for _, length in trace.runs(0, count * T)) == count * T + 1


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_units_of_any_type_are_read_into_rows_of_another(dtype: type) -> None:
    class Large(Units):
        def tokens(self, epoch: int, lane: int, place: int) -> npt.NDArray[Any]:
            return (super().tokens(epoch, lane, place).astype(np.int64) + 40_000).astype(dtype)

    for stream, sizes in ((LaneStream, [3, 0, 701]), (RowStream, [1401, 15])):
        rows, _ = filled(stream(Large(sizes), 0), 100, 14, np.int32)
        expected = windows(Units(sizes).stream(2).astype(np.int32) + 40_000, 14)
        assert np.array_equal(rows, expected[:100])


whole = st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 4))
"""The rows of each unit, and T."""


def whole_rows(counts: list[int], T: int, epochs: int) -> list[tuple[tuple[int, int, int], Array]]:
    """Slow and separate: address and tokens of every row."""
    units = Units([count * T + 1 for count in counts])
    return [
        ((epoch, place, row * T), units.tokens(epoch, 0, place)[row * T :][: T + 1])
        for epoch in range(epochs)
        for place, unit in enumerate(units.lane_units(epoch, 0).tolist())
        for row in range(counts[unit])
    ]


@given(whole, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_rows_of_units_of_whole_rows_join_nothing(
    shape: tuple[list[int], int], reads: list[int]
) -> None:
    counts, T = shape
    expected = whole_rows(counts, T, sum(reads) + 2)
    lane, done = RowStream(Units([count * T + 1 for count in counts]), 0), 0
    for count in reads:
        rows, trace = filled(lane, count, T)
        for i in range(count):
            address, row = expected[done + i]
            assert trace.address(i * T) == address
            assert trace.runs(i * T, (i + 1) * T) == [(address, T + 1)]
            assert np.array_equal(rows[i], row)
        done += count
        assert trace.address(count * T) == expected[done][0]


@given(whole, st.integers(1, 20), st.data())
def test_every_row_is_the_begin_of_the_same_rows(
    shape: tuple[list[int], int], count: int, draw: st.DataObject
) -> None:
    counts, T = shape
    units = Units([n * T + 1 for n in counts])
    rows, trace = filled(RowStream(units, 0), count, T)
    start = draw.draw(st.integers(0, count))
    again, _ = filled(RowStream(units, 0, trace.address(start * T)), count, T)
    assert np.array_equal(again[: count - start], rows[start:])


def test_a_lane_keeps_nothing_of_what_it_reads_from() -> None:
    class Views(Units):
        def tokens(self, epoch: int, lane: int, place: int) -> Array:
            whole = super().tokens(epoch, lane, place)
            kept.append(weakref.ref(whole))
            return whole[:]

    kept: list[weakref.ref[Array]] = []
    filled(LaneStream(Views([500, 500]), 0), 9, 11)
    assert [view() for view in kept] == [None]


def test_a_lane_without_text_is_an_error_not_a_hang() -> None:
    for sizes in ([], [0], [0, 0, 0]):
        with pytest.raises(DataError, match="no text in the"):
            filled(LaneStream(Units(sizes), 0), 1, 1)


@pytest.mark.parametrize("address", [(0, 2, 0), (0, 1, 5)])
def test_a_data_state_of_other_data_is_refused(address: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="belongs to other data"):
        filled(LaneStream(Units([5, 5]), 0, address), 1, 1)


@pytest.mark.parametrize("address", [(0, 2, 0), (0, 1, 3), (1, 0, 4)])
def test_a_data_state_between_whole_rows_is_refused(address: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="belongs to other data"):
        filled(RowStream(Units([5, 5]), 0, address), 1, 2)


def test_rows_overlap_by_one_token() -> None:
    rows = windows(np.arange(9, dtype=np.uint8), 4)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_documents_cannot_be_told_apart_without_a_separator() -> None:
    with pytest.raises(AssertionError, match="no separator"):
        document_ids(torch.zeros(1, 4), None)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**31))
def test_document_ids_and_positions_match_a_slow_count(B: int, T: int, seed: int) -> None:
    rows = torch.randint(0, 3, (B, T), generator=torch.Generator().manual_seed(seed))
    ids, places = document_ids(rows, 0), positions(rows, 0)
    for b in range(B):
        document = place = 0
        for t in range(T):
            assert (int(ids[b, t]), int(places[b, t])) == (document, place)
            place += 1
            if rows[b, t] == 0:
                document, place = document + 1, 0
    assert ids.dtype == places.dtype == torch.int32
