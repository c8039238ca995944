"""Endless training batches, read ahead by a thread or by worker processes.

A worker reads some lanes of its process and sends chunks: several steps of these lanes at once. The
loader joins the chunks of all workers and cuts them into the batches of single steps. Which rows
these are follows from the plan (load_plan.py), so workers change the speed and nothing else.

Memory: one segment per lane of this process (of parquet files about segments.SEGMENT_BYTES,
more if documents are long), the plans of two epochs (32 bytes a segment, twice that while they are
made), the chunks that are ready (`prefetch_factor` batches, rounded up to whole chunks), and for
parquet files about 40 MB to decode a segment, most of which Arrow's allocator keeps for the next.
Of remote parquet files also what is read ahead, up to read_ahead.READ_AHEAD_BYTES for each worker
and source.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from config import DataError, DataLoaderConfig
from data.loading.batch_hash import hash_rows
from data.loading.batch_spec import BatchSpec
from data.loading.data_state import DataState
from data.loading.load_plan import LoadPlan, as_numbers, plan_loading
from data.loading.order import Integers, Tokens
from data.loading.packing import (
    Lane,
    LaneReader,
    PackedLane,
    Position,
    PositionMap,
    RowLane,
    shifted,
)
from data.loading.prefetch import Prefetcher
from data.sources.dataset import Dataset, Stored, errors_of_source

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Chunk:
    """The rows of successive steps: (steps * rows of this process in a step, T + 1).

    A chunk of one of several workers has only the rows of its lanes, lane after lane.
    """

    rows: Tensor
    order: Integers | None
    """The number of each row in the batches; None: they are in order."""
    given: Integers
    """What each source has given before and after each step: (steps + 1, sources)."""
    lane_tokens: list[list[int]]
    """The tokens that each lane of this process has moved on until each step."""
    position_maps: list[PositionMap]
    """Of each lane."""
    skipped_counts: Counter[str]
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> Chunk:
        """Returns a chunk that only says why there are no rows."""
        return cls(torch.empty(0), None, np.zeros((1, 0), np.int64), [], [], Counter(), error)

    def pin_memory(self) -> Chunk:
        """Returns the chunk in page-locked memory; torch's DataLoader calls this."""
        self.rows = self.rows.pin_memory()
        return self


class ChunkDataset(IterableDataset[Chunk]):
    """Endless chunks; of n workers, worker w reads every n-th lane from the w-th on."""

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[Chunk]:
        plan, info = self._plan, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        numbers = range(worker, len(plan.lanes), workers)
        readers = open_readers(plan, numbers)
        try:
            # The first segment of all lanes at once: the first batch needs every one of them.
            for source, lane, (epoch, index, _) in plan.lanes[worker::workers]:
                readers[source].prefetch(epoch, lane, index, 1)
            # Inside the try: a position that does not fit raises DataError too.
            lanes = [_open_lane(plan, readers, number) for number in numbers]
            for given, layout in plan.chunks(worker, workers):
                # One more row, in which the rows of other processes end.
                shape = (len(layout.order) + 1, plan.spec.block_size + 1)
                rows = np.empty(shape, dtype=plan.dtype)
                chunk = Chunk(
                    rows=torch.from_numpy(rows[:-1]),
                    order=None if workers == 1 else layout.order,
                    given=given,
                    lane_tokens=layout.lane_tokens,
                    position_maps=[
                        _fill(plan, number, lane, rows, own)
                        for number, lane, own in zip(numbers, lanes, layout.places, strict=True)
                    ],
                    skipped_counts=Counter(),
                )
                # Counts travel with the rows that they belong to, from worker to trainer.
                for source_reader in readers.values():
                    chunk.skipped_counts.update(source_reader.reader.skipped_counts)
                    source_reader.reader.skipped_counts.clear()
                yield chunk
        except DataError as error:
            # DataLoader would add the worker's traceback to an exception; a text arrives as it is.
            yield Chunk.failed(str(error))
        finally:
            close_readers(readers)


def open_readers(plan: LoadPlan, numbers: Iterable[int]) -> dict[int, LaneReader]:
    """Opens the sources of some lanes; by index of the source."""
    return {
        index: LaneReader(plan.sources[index].segments.open_reader(), plan.sources[index].lane_plan)
        for index in sorted({plan.lanes[number].source for number in numbers})
    }


def close_readers(readers: dict[int, LaneReader]) -> None:
    """Closes the files of all sources."""
    for source_reader in readers.values():
        source_reader.reader.close()


def _open_lane(plan: LoadPlan, readers: dict[int, LaneReader], number: int) -> Lane:
    source, lane, start = plan.lanes[number]
    whole_rows = plan.sources[source].segments.whole_rows
    lane_type: type[Lane] = RowLane if whole_rows else PackedLane
    return lane_type(readers[source], lane, start)


def _fill(
    plan: LoadPlan, number: int, lane: Lane, rows: Tokens, places: Integers | slice
) -> PositionMap:
    """Reads the next rows of a lane into their places."""
    if isinstance(places, slice):
        own = rows[places]
    else:
        own = np.empty((len(places), rows.shape[1]), rows.dtype)
    with errors_of_source(plan.sources[plan.lanes[number].source].source.name):
        positions = lane.fill(own)
    if not isinstance(places, slice):
        rows[places] = own
    return positions


def join_chunks(parts: list[Chunk], pin: bool) -> Chunk:
    """Returns the chunks of all workers as one, with the rows and lanes in order."""
    for part in parts:
        if part.error is not None:
            raise DataError(part.error)
    first, workers = parts[0], len(parts)
    if workers == 1:
        return first
    shape = (sum(len(part.rows) for part in parts), first.rows.shape[1])
    rows = torch.empty(shape, dtype=first.rows.dtype, pin_memory=pin)
    position_maps = [PositionMap(packed=True)] * sum(len(part.position_maps) for part in parts)
    skipped = Counter[str]()
    for worker, part in enumerate(parts):
        rows.numpy()[part.order] = part.rows.numpy()
        # Worker w has lanes w, w + n, ...: interleaving puts them in order, whatever n is.
        position_maps[worker::workers] = part.position_maps
        skipped.update(part.skipped_counts)
    return Chunk(rows, None, first.given, first.lane_tokens, position_maps, skipped)


class RowOrigin(NamedTuple):
    """What a row is made of."""

    number: int
    """In the batch of the whole step."""
    source: str
    parts: list[Stored]
    """Its documents, with their tokens in the row."""


class StepBatch:
    """The rows of one optimizer step on this process."""

    micro_batches: tuple[Tensor, ...]
    """Tensors (B, T + 1) of uint8 or int32: inputs [:, :-1], targets [:, 1:]."""

    def __init__(self, plan: LoadPlan, chunk: Chunk, step: int, rows: Tensor) -> None:
        """Takes rows (micro-batches, B, T + 1) and the number of the step in its chunk."""
        self._plan, self._chunk, self._step = plan, chunk, step
        self.micro_batches = rows.unbind(0)

    def _positions(self) -> list[Position]:
        """Returns the position of each lane after this batch."""
        # After this batch, not after the chunk: what is read ahead does not count as seen.
        chunk, step = self._chunk, self._step
        return list(map(PositionMap.position, chunk.position_maps, chunk.lane_tokens[step + 1]))

    @property
    def epoch(self) -> int:
        """The number of epochs that all lanes have completed after this batch."""
        return min(position.epoch for position in self._positions())

    def rows_hash(self) -> int:
        """Returns the sum of the hashes of these rows, for `hash_step` (batch_hash.py)."""
        return hash_rows(self.micro_batches, self._plan.rows.start)

    def data_state(self) -> DataState:
        """Returns plain values from which a loader continues with the next batch."""
        given = self._chunk.given[self._step + 1].tolist()
        return self._plan.data_state(given, self._positions())

    def describe(self) -> list[str]:
        """Returns the file and the rows or tokens that this batch is made of.

        Slow: reads the segments again.
        """
        found = defaultdict[str, list[range]](list)
        for row in self.origins():
            for part in row.parts:
                found[part.place].append(part.numbers)
        return [f"{name} {_format_ranges(numbers)}" for name, numbers in sorted(found.items())]

    def origins(self) -> list[RowOrigin]:
        """Returns what each row is made of, in the order of the batch.

        Slow: reads the segments again.
        """
        plan, found, block_size = self._plan, list[RowOrigin](), self._plan.spec.block_size
        layout = plan.layout(self._chunk.given[self._step : self._step + 2])
        readers = open_readers(plan, range(len(plan.lanes)))
        lanes = zip(plan.lanes, layout.places, self._chunk.lane_tokens[self._step], strict=True)
        for number, ((source, lane, _), places, token) in enumerate(lanes):
            numbers = as_numbers(places)
            own = np.flatnonzero(numbers >= 0)
            if not len(own):
                continue
            begin = token + int(own[0]) * block_size
            maps = self._chunk.position_maps[number]
            pieces = [
                readers[source].locate(lane, position, length)
                for position, length in maps.pieces(begin, begin + len(own) * block_size)
            ]
            if not plan.sources[source].segments.whole_rows:
                pieces = _cut_rows(pieces, len(own), block_size)
            name = plan.sources[source].source.name
            first = numbers[own] + plan.rows.start
            found += map(RowOrigin, first.tolist(), [name] * len(own), pieces)
        close_readers(readers)
        return sorted(found)


def _cut_rows(pieces: list[list[Stored]], rows: int, block_size: int) -> list[list[Stored]]:
    """Returns the parts of each of some packed rows, from pieces that follow each other."""
    joined, at = list[Stored](), 0
    for parts in pieces:
        joined += [shifted(part, at) for part in parts]
        at = joined[-1].tokens.stop
    cut = list[list[Stored]]()
    for begin in range(0, rows * block_size, block_size):
        end, inside = begin + block_size + 1, list[Stored]()
        for part in joined:
            first, last = max(part.tokens.start, begin), min(part.tokens.stop, end)
            if first < last:
                inside.append(part._replace(tokens=range(first - begin, last - begin)))
        cut.append(inside)
    return cut


def _format_ranges(ranges: list[range]) -> str:
    """Formats range(1, 4) and range(7, 8) as '1-3, 7'; ranges that touch or overlap are joined."""
    groups: list[tuple[int, int]] = []
    for numbers in sorted(ranges, key=lambda numbers: numbers.start):
        first, last = numbers.start, numbers.stop - 1
        if groups and first <= groups[-1][1] + 1:
            first, last = groups[-1][0], max(groups.pop()[1], last)
        groups.append((first, last))
    return ", ".join(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in groups)


class TrainLoader:
    """Endless training batches of one process; use as a context manager or call `close`.

    Iterating touches no global random state. `data_state` continues after the `StepBatch` whose
    state it is; of several processes, `merge_data_states` first. Raises DataError for a data state
    that does not fit, and from `next` for text that cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: BatchSpec,
        dataloader: DataLoaderConfig,
        data_state: DataState | None = None,
    ) -> None:
        self.plan = plan = plan_loading(dataset, spec, dataloader.shuffle, data_state)
        self.skipped_counts = Counter[str]()
        """Null and empty documents and NUL bytes met so far, by kind."""
        self._batches: Iterator[StepBatch] = iter(())
        # A worker without a lane would send chunks without rows.
        workers = min(dataloader.num_workers, len(plan.lanes))
        if workers < dataloader.num_workers:
            log.warning(
                "dataloader.num_workers: %d, but this process reads %d lanes; %d workers are used",
                dataloader.num_workers,
                len(plan.lanes),
                workers,
            )
        pin = spec.pin and dataloader.pin_memory
        # Neither source nor join refers to this loader: it could then never be collected.
        self._prefetcher: Prefetcher[Chunk] = Prefetcher(
            ChunkDataset(plan),
            partial(join_chunks, pin=pin),
            workers=workers,
            ahead=-(-dataloader.prefetch_factor // plan.chunk_steps),
            pin=pin,
        )
        # A loader that is dropped without close, or alive at exit, still ends thread and workers.
        self._close = weakref.finalize(self, self._prefetcher.close)
        self._prefetcher.start()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> StepBatch:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._split(self._prefetcher.get())
            batch = next(self._batches)
        return batch

    def _split(self, chunk: Chunk) -> Iterator[StepBatch]:
        """Returns the batches of the steps of a chunk."""
        self.skipped_counts.update(chunk.skipped_counts)
        plan = self.plan
        shape = (len(chunk.given) - 1, plan.spec.micro_batches, -1, plan.spec.block_size + 1)
        steps = enumerate(chunk.rows.view(shape).unbind(0))
        return (StepBatch(plan, chunk, step, rows) for step, rows in steps)

    def first_data_state(self) -> DataState:
        """Returns the data state before the first batch of this loader."""
        return self.plan.first_data_state()

    def close(self) -> None:
        """Ends the thread and the workers; batches already handed out stay valid."""
        self._close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
