"""What one process reads in each step, decided before anything is read; and where a resume begins.

The batch of a step is a fixed list of rows: source after source, and of a source lane after lane. A
process takes its slice of it, so neither the number of processes nor an interruption changes a
batch. How many rows each source gives follows from the weights (shares.py).

A BatchSpec (batch_spec.py) and a LanePlan for each source (lanes.py: the segments of every lane)
make the LoadPlan of one process: its rows, its lanes, and the position where each begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from config import DataError
from data.loading.batch_spec import BatchSpec
from data.loading.data_state import (
    NEW_RUN,
    DataState,
    check_continuable,
    lane_positions,
    rows_at_weights,
    source_states,
)
from data.loading.lanes import LanePlan
from data.loading.order import (
    MAX_LANES,
    PLAN_VERSION,
    Integers,
    count_distinct,
    lane_count,
    rank_lanes,
    rank_rows,
    rows_before_lane,
)
from data.loading.packing import Position
from data.loading.shares import Shares
from data.sources.dataset import Dataset, Segments, Source, segments_of_split
from data.tokenizers.base import row_dtype

CHUNK_BYTES = 1 << 18
"""About how much a worker sends at once: a message costs more than the bytes of a small batch."""


@dataclass(frozen=True, eq=False)
class SourcePlan:
    """The lanes of one source, and those of them that one process reads."""

    source: Source
    segments: Segments
    lane_plan: LanePlan
    rows_before: int
    """The rows that the source gave before its weight was last changed; 0 without a mixture."""
    lanes: range
    """Those whose positions this process states. It reads them, unless the weight is 0."""
    start: tuple[Position, ...]
    """The first token of each of these lanes."""

    @property
    def is_read(self) -> bool:
        """Whether any row comes from this source."""
        return self.source.weight > 0


class OwnLane(NamedTuple):
    """A lane that a process reads."""

    source: int
    """The index of its source."""
    lane: int
    start: Position


@dataclass(frozen=True)
class ChunkLayout:
    """Where the rows go that a process, or one of its workers, reads in some successive steps."""

    lane_tokens: list[list[int]]
    """The tokens that each lane of the process has moved on until each step: (steps + 1, lanes)."""
    places: list[Integers | slice]
    """For each lane and each of its rows, where the row goes in the chunk; -1: to one more row at
    the end, as it belongs to a neighbouring process, which reads the same lane. A slice where they
    are evenly spaced, as without a mixture: rows are then read right into their places."""
    order: Integers
    """For each row of the chunk, its number in the batches of the process."""

    def of_worker(self, worker: int, workers: int) -> ChunkLayout:
        """Returns the layout of every n-th lane, in which the rows of a lane follow each other."""
        if workers == 1:
            return self
        places = [as_numbers(own) for own in self.places[worker::workers]]
        joined = np.concatenate(places)
        kept = joined >= 0
        consecutive = np.where(kept, np.cumsum(kept) - 1, -1)
        edges = np.cumsum([len(lane) for lane in places])[:-1]
        split = [as_slice(own) for own in np.split(consecutive, edges)]
        return ChunkLayout(self.lane_tokens, split, joined[kept])


def as_slice(places: Integers) -> Integers | slice:
    """Returns places as a slice if they are evenly spaced, else as they are."""
    steps = np.diff(places)
    if len(steps) and places[0] >= 0 and steps[0] > 0 and (steps == steps[0]).all():
        return slice(int(places[0]), int(places[-1]) + 1, int(steps[0]))
    return places


def as_numbers(places: Integers | slice) -> Integers:
    """Returns places as numbers."""
    if isinstance(places, slice):
        return np.arange(places.start, places.stop, places.step)
    return places


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """The rows of each step that one process reads, and where it begins."""

    spec: BatchSpec
    version: int
    """The PLAN_VERSION that the run began with."""
    shares: Shares
    sources: tuple[SourcePlan, ...]
    given: tuple[int, ...]
    """The rows that each source has given at these weights before the first step."""
    rows: range
    """Of the batch: those of this process."""
    dtype: np.dtype[Any]

    @property
    def chunk_steps(self) -> int:
        """The steps in one chunk."""
        row_bytes = (self.spec.block_size + 1) * self.dtype.itemsize
        # About: all rows of the lanes that are read, also those that other processes keep.
        rows = sum(
            self.shares.rounded_share(own.source, self.spec.sequences_per_step)
            / self.sources[own.source].lane_plan.lanes
            for own in self.lanes
        )
        return max(1, int(CHUNK_BYTES / (max(rows, 1) * row_bytes)))

    @cached_property
    def lanes(self) -> list[OwnLane]:
        """The lanes that this process reads, source after source."""
        return [
            OwnLane(index, lane, start)
            for index, source in enumerate(self.sources)
            if source.is_read
            for lane, start in zip(source.lanes, source.start, strict=True)
        ]

    def chunks(self, worker: int, workers: int) -> Iterator[tuple[Integers, ChunkLayout]]:
        """Yields for each chunk the rows that each source has given at these weights before and
        after each step, (steps + 1, sources), and the layout of every n-th lane."""
        lanes = [source.lane_plan.lanes for source in self.sources]
        rows, steps = self.spec.sequences_per_step, self.chunk_steps
        given = self.shares.after_steps(self.given, rows, steps)
        layout = self.layout(given).of_worker(worker, workers)
        while True:
            yield given, layout
            before, given = given, self.shares.after_steps(given[-1].tolist(), rows, steps)
            moved = given - before
            # Without a mixture all chunks are laid out alike.
            if (moved != moved[0]).any() or (moved[0] % lanes).any():
                layout = self.layout(given).of_worker(worker, workers)

    def lane_rows(self, given: Integers) -> tuple[Integers, Integers]:
        """Returns how many rows each lane that is read has given since the first of some steps, and
        how many the lanes below it of its source have in the run: (steps + 1, lanes) both.

        given: the rows of each source before and after each step, (steps + 1, sources).
        """
        given = given + np.array([source.rows_before for source in self.sources])
        index = np.array([own.source for own in self.lanes])
        lane = np.array([own.lane for own in self.lanes])
        lanes = np.array([source.lane_plan.lanes for source in self.sources])[index]
        below = rows_before_lane(given[:, index], lane, lanes)
        rows = rows_before_lane(given[:, index], lane + 1, lanes) - below
        return rows - rows[0], below

    def layout(self, given: Integers) -> ChunkLayout:
        """Lays out the steps between the rows of `given`: (steps + 1, sources)."""
        # The batch of a step has the sources one after the other.
        counts = np.diff(given, axis=0)
        source_begins = np.cumsum(counts, axis=1) - counts
        # From here on one column for each lane that is read.
        index = np.array([own.source for own in self.lanes])
        lane_rows, below = self.lane_rows(given)
        row_counts = np.diff(lane_rows, axis=0)
        row_begins = source_begins[:, index] + np.diff(below, axis=0)
        # And from here on one entry for each row that is read, lane after lane.
        steps = np.arange(len(row_counts))[:, None] + np.zeros_like(row_counts)
        step, begin, count = (table.T.ravel() for table in (steps, row_begins, row_counts))
        ends = np.cumsum(count)
        number = np.arange(ends[-1]) + np.repeat(begin - ends + count, count)  # in the batch
        place = number - self.rows.start
        kept = (place >= 0) & (place < len(self.rows))
        assert kept.sum() == len(row_counts) * len(self.rows), "a row of a lane that is not read"
        place = np.where(kept, place + np.repeat(step, count) * len(self.rows), -1)
        return ChunkLayout(
            lane_tokens=(lane_rows * self.spec.block_size).tolist(),
            places=[as_slice(own) for own in np.split(place, np.cumsum(lane_rows[-1])[:-1])],
            order=np.arange(len(row_counts) * len(self.rows)),
        )

    def data_state(self, given: Sequence[int], positions: Sequence[Position]) -> DataState:
        """Returns the data state of this process.

        Args:
            given: the rows that each source has given at these weights.
            positions: where the lanes that this process reads stand.
        """
        rest, sources = iter(positions), list[DataState]()
        for plan, rows in zip(self.sources, given, strict=True):
            lanes = islice(rest, len(plan.lanes)) if plan.is_read else plan.start
            state: DataState = {
                "lanes": plan.lane_plan.lanes,
                "epoch_tokens": plan.lane_plan.epoch_tokens,
                "first_lane": plan.lanes.start,
                "positions": [list(position) for position in lanes],
            }
            if plan.source.name:
                rows_in_run = plan.rows_before + rows
                own = {"name": plan.source.name, "weight": plan.source.weight}
                state = {**own, "rows": rows_in_run, "rows_at_weight": rows, **state}
            sources.append(state)
        return {
            "version": self.version,
            "sequences_per_step": self.spec.sequences_per_step,
            "block_size": self.spec.block_size,
            "seed": self.spec.seed,
            "shuffle": self.sources[0].lane_plan.shuffle,
            # Without a mixture as before there were any.
            **({"sources": sources} if self.sources[0].source.name else sources[0]),
        }

    def first_data_state(self) -> DataState:
        """Returns the data state before the first step."""
        return self.data_state(self.given, [own.start for own in self.lanes])


def plan_loading(
    dataset: Dataset, spec: BatchSpec, shuffle: bool, data_state: DataState | None = None
) -> LoadPlan:
    """Plans the rows of one process, from the start of the data or from a data state on.

    Raises DataError for too little text, and for a data state that does not fit.
    """
    assert spec.sequences_per_step % (spec.world_size * spec.micro_batches) == 0
    if data_state is not None:
        check_continuable(data_state, dataset, spec, shuffle)
    sources = dataset.sources
    shares = Shares([source.weight for source in sources])
    saved = source_states(data_state) if data_state else [None] * len(sources)
    rows = rank_rows(spec.sequences_per_step, spec.world_size, spec.rank)
    given, plans = rows_at_weights(shares, saved), list[SourcePlan]()
    bounds = shares.bounds(spec.sequences_per_step)
    for i, (source, state) in enumerate(zip(sources, saved, strict=True)):
        if state is not None and state.get("rows") == 0:
            state = None  # its weight was 0: it may begin with as many lanes as it now needs
        segments = source.dataset.segments(spec.block_size)
        share = shares.rounded_share(i, spec.lanes or MAX_LANES)
        lane_plan = _plan_lanes(source, segments, spec, shuffle, share, state)
        lanes = range(lane_plan.lanes)
        if source.weight:
            lanes = rank_lanes(rows, *bounds[i], lane_plan.lanes)
        rows_before = state.get("rows", 0) - given[i] if state else 0
        start = lane_positions(state, lanes)
        plans.append(SourcePlan(source, segments, lane_plan, rows_before, lanes, start))
    return LoadPlan(
        spec=spec,
        version=data_state["version"] if data_state else PLAN_VERSION,
        shares=shares,
        sources=tuple(plans),
        given=given,
        rows=rows,
        dtype=row_dtype(dataset.vocab_size),
    )


def _plan_lanes(
    source: Source,
    segments: Segments,
    spec: BatchSpec,
    shuffle: bool,
    share: int,
    state: DataState | None,
) -> LanePlan:
    """Plans the lanes of a source: those of the data state or, in a mixture, about `share`."""
    training = segments_of_split(segments, "train")
    if not len(training):
        raise source.dataset.too_short("train", spec.block_size)
    # A run keeps the rule it began with: another one would repeat and skip text from here on.
    # Without `tokens` the plan deals segments in turn, which is the rule of version 1.
    tokens = segments.tokens if state is None or state["version"] > 1 else None
    keys, total = segments.shuffle_keys, spec.sequences_per_step
    available = count_distinct(keys[training])
    # A lane needs a row group of its own, and a token of every epoch.
    most = available if tokens is None else min(available, int(tokens[training].sum()))
    if state is not None:
        lanes = state["lanes"]
    elif source.name:
        lanes = max(1, min(share, most, total))
    else:
        # Other numbers would do as well, but runs have these.
        lanes = spec.lanes or lane_count(total, most)
    if lanes > available or (total % lanes and not source.name):
        raise DataError(
            f"{_named(source.name)}{lanes} lanes do not fit {total} sequences per step and "
            f"{available} row groups of text: without a mixture lanes must divide the sequences, "
            "and there must be a row group for each."
        )
    plan = LanePlan(keys, training, lanes=lanes, seed=spec.seed, shuffle=shuffle, tokens=tokens)
    # Lanes that were balanced by another count of tokens have other shares. Version 1 has none.
    if state is not None and state.get("epoch_tokens") != plan.epoch_tokens:
        raise DataError(
            f"{_named(source.name)}data state: the checkpoint counted {state.get('epoch_tokens')} "
            f"tokens of training text, this program {plan.epoch_tokens}, so its order differs. "
            f"Restore the data and the tokenizer, or {NEW_RUN}"
        )
    return plan


def _named(name: str) -> str:
    return f"source {name}: " if name else ""
