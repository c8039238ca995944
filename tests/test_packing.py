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
from data.packing import LaneStream, document_ids, positions, windows

Array = npt.NDArray[np.uint8]


class Units:
    """Units of given lengths; token values count up over the whole epoch."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def lane_units(self, epoch: int, lane: int) -> npt.NDArray[np.int64]:
        return np.roll(np.arange(len(self.lengths)), epoch)

    def tokens(self, unit: int, epoch: int) -> Array:
        return (np.arange(self.lengths[unit]) + 31 * unit + 7 * epoch).astype(np.uint8)

    def stream(self, epochs: int) -> Array:
        parts = [self.tokens(u, e) for e in range(epochs) for u in self.lane_units(e, 0)]
        return np.concatenate(parts)


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@given(lengths, st.lists(st.integers(1, 12), min_size=1, max_size=10))
def test_reads_are_the_stream_with_one_token_ahead(sizes: list[int], reads: list[int]) -> None:
    units = Units(sizes)
    expected = units.stream(epochs=sum(reads) + 2)
    lane, done = LaneStream(units, 0), 0
    for count in reads:
        out = np.empty(count + 1, dtype=np.uint8)
        lane.read(out)
        assert np.array_equal(out, expected[done : done + count + 1])
        done += count


@given(lengths, st.integers(1, 40), st.data())
def test_every_address_continues_the_stream(
    sizes: list[int], count: int, draw: st.DataObject
) -> None:
    units = Units(sizes)
    out = np.empty(count + 1, dtype=np.uint8)
    trace = LaneStream(units, 0).read(out)
    token = draw.draw(st.integers(0, count))
    rest = np.empty(count + 1, dtype=np.uint8)
    LaneStream(units, 0, trace.address(token)).read(rest)
    assert np.array_equal(rest[: count + 1 - token], out[token:])
    runs = trace.runs(0, count + 1)
    assert sum(length for _, length in runs) == count + 1


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_units_of_any_type_are_read_into_rows_of_another(dtype: type) -> None:
    class Large(Units):
        def tokens(self, unit: int, epoch: int) -> npt.NDArray[Any]:
            return (super().tokens(unit, epoch).astype(np.int64) + 40_000).astype(dtype)

    sizes = [3, 0, 700]
    out = np.empty(1400, dtype=np.int32)
    LaneStream(Large(sizes), 0).read(out)
    assert np.array_equal(out, Units(sizes).stream(2)[:1400].astype(np.int32) + 40_000)


def test_a_lane_keeps_nothing_of_what_it_reads_from() -> None:
    class Views(Units):
        def tokens(self, unit: int, epoch: int) -> Array:
            whole = super().tokens(unit, epoch)
            kept.append(weakref.ref(whole))
            return whole[:]

    kept: list[weakref.ref[Array]] = []
    lane = LaneStream(Views([500, 500]), 0)
    lane.read(np.empty(100, dtype=np.uint8))
    assert [view() for view in kept] == [None]


def test_a_lane_without_text_is_an_error_not_a_hang() -> None:
    for sizes in ([], [0], [0, 0, 0]):
        with pytest.raises(DataError, match="no text in the"):
            LaneStream(Units(sizes), 0).read(np.empty(2, dtype=np.uint8))


@pytest.mark.parametrize("address", [(0, 2, 0), (0, 1, 5)])
def test_a_cursor_of_other_data_is_refused(address: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="belongs to other data"):
        LaneStream(Units([5, 5]), 0, address).read(np.empty(2, dtype=np.uint8))


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
