"""From segments to rows of T + 1 tokens.

A lane is an endless stream of tokens, epoch after epoch. Documents are packed: a row is a window of
T + 1 tokens that moves on by T, across the ends of documents and segments, so no token is dropped
and none is padding. The last token of a row is the first of the next one: there it is a target,
here an input. In token files every segment is whole rows, and no row crosses its end.

The state of a lane is therefore the position of its next token: three integers.
"""

from __future__ import annotations

import bisect
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from config import DataError
from data.loading.lanes import LanePlan
from data.loading.order import Tokens
from data.sources.dataset import Passage, Reader, Stored

# As many empty segments in a row, and a whole epoch of them, mean that there is no text.
_EMPTY_SEGMENTS = 1000


class Position(NamedTuple):
    """A token of a lane."""

    epoch: int
    segment_index: int
    """Among the segments that the lane reads in this epoch."""
    token: int
    """Counted in the part of the segment that the lane reads."""


START = Position(0, 0, 0)


class LaneReader:
    """Reads the segments of lanes, as a plan orders them."""

    def __init__(self, reader: Reader, plan: LanePlan) -> None:
        self.reader, self._plan = reader, plan

    def count(self, epoch: int, lane: int) -> int:
        """Returns the number of segments that a lane reads in one epoch."""
        return len(self._plan.lane_segments(epoch, lane))

    def tokens(self, epoch: int, lane: int, index: int) -> Tokens:
        """Returns what a lane reads of its index-th segment."""
        plan = self._plan
        segment = int(plan.lane_segments(epoch, lane)[index])
        tokens = self.reader.tokens(segment, plan.seed, epoch, plan.shuffle)
        return tokens[plan.share(epoch, lane, index).of(len(tokens))]

    def prefetch(self, epoch: int, lane: int, index: int, count: int | None = None) -> None:
        """States that a lane reads its index-th segment next, and those after it.

        Args:
            count: how many of them; None: all, to the end of the next epoch.
        """
        self.reader.prefetch(lane, islice(self._upcoming(epoch, lane, index), count))

    def _upcoming(self, epoch: int, lane: int, index: int) -> Iterator[int]:
        # A generator, as a reader of local files takes nothing from it: near the end of an epoch
        # the next one would be planned too early.
        yield from map(int, self._plan.lane_segments(epoch, lane)[index:])
        yield from map(int, self._plan.lane_segments(epoch + 1, lane))

    def locate(self, lane: int, start: Position, length: int) -> list[Stored]:
        """Returns where `length` tokens of one segment are stored; they are counted from 0."""
        epoch, index, token = start
        segment = int(self._plan.lane_segments(epoch, lane)[index])
        # Positions count what the lane reads; the reader counts from the begin of the segment.
        order = self._plan.seed, epoch, self._plan.shuffle
        share = self._plan.share(epoch, lane, index)
        token += share.of(len(self.reader.tokens(segment, *order))).start
        parts = self.reader.locate(segment, *order, range(token, token + length))
        return [shifted(part, -token) for part in parts]

    def find(
        self, epoch: int, lane: int, index: int, passage: Passage
    ) -> Iterator[tuple[int, Stored]]:
        """Yields where a text begins in what a lane reads of its index-th segment, each time."""
        plan = self._plan
        segment, share = int(plan.lane_segments(epoch, lane)[index]), plan.share(epoch, lane, index)
        order = plan.seed, epoch, plan.shuffle
        found = self.reader.find(segment, *order, passage)
        own = share.of(len(self.reader.tokens(segment, *order))) if found else slice(0, 0)
        for part in found:
            if own.start <= part.tokens.start < own.stop:
                yield part.tokens.start - own.start, part


def shifted(part: Stored, by: int) -> Stored:
    """Returns stored tokens that are counted from elsewhere."""
    return part._replace(tokens=range(part.tokens.start + by, part.tokens.stop + by))


class PositionMap:
    """The position of each token in some successive rows of one lane.

    A resume begins at one of them, and an error names the text that it finds through them.

    Tokens are counted over all rows, T of each: token row * T + t is the t-th input of a row.

    Args:
        packed: whether the token after a row is the first one of the next row.
    """

    def __init__(self, packed: bool) -> None:
        self._packed = packed
        self._starts: list[int] = []
        self._positions: list[Position] = []

    def add(self, start: int, position: Position) -> None:
        """States that tokens from `start` on are stored one after the other from `position` on."""
        self._starts.append(start)
        self._positions.append(position)

    def position(self, token: int) -> Position:
        """Returns the position of a token, which may be the one after the last row."""
        # The last start at or before the token.
        i = bisect.bisect_right(self._starts, token) - 1
        epoch, index, offset = self._positions[i]
        return Position(epoch, index, offset + token - self._starts[i])

    def pieces(self, begin: int, end: int) -> list[tuple[Position, int]]:
        """Returns (position, length) of the stored pieces that hold tokens [begin, end) and the
        last target of their rows."""
        if self._packed:
            end += 1
        # Cut at the starts inside, so that each piece is stored without a gap.
        edges = [begin, *(start for start in self._starts if begin < start < end), end]
        # Each piece of whole rows is followed by its own target.
        target = 0 if self._packed else 1
        return [(self.position(a), b - a + target) for a, b in pairwise(edges) if a < b]


class Lane(ABC):
    """One lane, read from a position on; holds one segment at a time."""

    def __init__(self, source: LaneReader, lane: int, position: Position = START) -> None:
        self._source, self._lane = source, lane
        self._epoch, self._index, self._token = position
        self._count = source.count(self._epoch, lane)
        self._tokens: Tokens | None = None
        # Without this a data state of other data would be read as another text in silence.
        if self._index >= self._count > 0:
            self._refuse(f"segment {self._index} of {self._count}")

    @abstractmethod
    def fill(self, rows: Tokens) -> PositionMap:
        """Reads the next rows (n, T + 1), which may be none; raises DataError without any text."""

    @property
    def _position(self) -> Position:
        return Position(self._epoch, self._index, self._token)

    def _next_segment(self) -> None:
        self._index, self._token, self._tokens = self._index + 1, 0, None

    def _next_epoch(self) -> None:
        self._epoch, self._index = self._epoch + 1, 0
        self._count = self._source.count(self._epoch, self._lane)

    def _refuse(self, position: str) -> NoReturn:
        raise DataError(
            f"lane {self._lane}, epoch {self._epoch}: the data state asks for {position}, so it "
            "belongs to other data, or text that was there is now skipped. Restore the data."
        )


class PackedLane(Lane):
    """Rows that run across documents, segments and epochs."""

    def fill(self, rows: Tokens) -> PositionMap:
        """Reads the next rows."""
        block_size, positions = rows.shape[1] - 1, PositionMap(packed=True)
        if not len(rows):
            positions.add(0, self._position)
            return positions
        # One array for all rows, as neighbours share a token; it is copied once.
        flat = np.empty(len(rows) * block_size + 1, dtype=rows.dtype)
        self._read(flat, positions)
        rows[:] = windows(flat, block_size)
        return positions

    def _read(self, out: Tokens, positions: PositionMap) -> None:
        """Fills `out` with the next tokens; the last of them will be read again."""
        filled = 0
        while filled < len(out):
            part = self._load()[self._token :][: len(out) - filled]
            positions.add(filled, self._position)
            out[filled : filled + len(part)] = part
            filled += len(part)
            self._token += len(part)
            del part  # frees a finished segment before the next one is read
        # The last token was a target only; as an input it begins the next row.
        self._token -= 1

    def _load(self) -> Tokens:
        """Returns the segment of the next token; passes over finished and empty segments."""
        finished = 0
        while self._tokens is None or self._token >= len(self._tokens):
            if self._tokens is not None:
                finished += 1
                self._next_segment()
            if self._index >= self._count:
                # Without a limit, a lane whose documents are all empty would search for ever.
                if finished > max(self._count, _EMPTY_SEGMENTS) or not self._count:
                    raise DataError(
                        f"no text in the {self._count} segments of lane {self._lane} "
                        f"(epoch {self._epoch}): every document is null or empty, or was skipped."
                    )
                self._next_epoch()
                continue
            tokens = self._source.tokens(self._epoch, self._lane, self._index)
            self._source.prefetch(self._epoch, self._lane, self._index + 1)
            self._tokens = _own_memory(tokens)
            # The original goes now: it would be held until the next segment is read.
            del tokens
            if 0 < self._token >= len(self._tokens):
                self._refuse(f"token {self._token} of a segment of {len(self._tokens)}")
        return self._tokens


class RowLane(Lane):
    """Rows of segments that are whole rows; no row crosses the end of its segment."""

    def fill(self, rows: Tokens) -> PositionMap:
        """Reads the next rows."""
        block_size, positions, filled = rows.shape[1] - 1, PositionMap(packed=False), 0
        for row in rows:
            tokens = self._load(block_size)
            positions.add(filled, self._position)
            row[:] = tokens[self._token : self._token + block_size + 1]
            filled += block_size
            self._token += block_size
            if self._token + 1 >= len(tokens):  # the last token is a target only
                self._next_segment()
                if self._index >= self._count:
                    self._next_epoch()
        positions.add(filled, self._position)
        return positions

    def _load(self, block_size: int) -> Tokens:
        if self._tokens is None:
            self._tokens = self._source.tokens(self._epoch, self._lane, self._index)
            # A row that began elsewhere would cross the end of its segment.
            if self._token % block_size or self._token + block_size >= len(self._tokens):
                self._refuse(f"token {self._token} of a segment of {len(self._tokens)}")
        return self._tokens


def _own_memory(tokens: Tokens) -> Tokens:
    """Copies tokens into a mapping that goes back to the system when it is dropped.

    A lane holds a segment for many steps. In the memory of Arrow or malloc, segments would keep
    whole pools from shrinking: 130 MB for 16 lanes instead of 98.
    """
    if not len(tokens):
        return tokens
    copy = np.frombuffer(mmap.mmap(-1, tokens.nbytes), dtype=tokens.dtype)
    copy[:] = tokens
    return copy


def windows(tokens: Tokens, block_size: int) -> Tokens:
    """Returns n * T + 1 tokens as a view of n rows of T + 1; neighbours share one token."""
    rows = (len(tokens) - 1) // block_size
    step = tokens.strides[0]
    return np.lib.stride_tricks.as_strided(
        tokens, (rows, block_size + 1), (block_size * step, step), writeable=False
    )


def document_ids(rows: torch.Tensor, separator: int | None) -> torch.Tensor:
    """Numbers the documents in each row, counted from 0.

    A separator belongs to the document that it ends.

    Args:
        rows: (B, T), of any integer type.
        separator: the token after each document; None, of a tokenizer without one, is an error.

    Returns:
        (B, T) int32, on the device of `rows`.
    """
    assert separator is not None, "the tokenizer has no separator"
    ids = torch.zeros(rows.shape, dtype=torch.int32, device=rows.device)
    torch.cumsum(rows[..., :-1] == separator, dim=-1, dtype=torch.int32, out=ids[..., 1:])
    return ids
