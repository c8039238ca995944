"""Endless training batches, read ahead by a thread or by worker processes.

A worker reads some lanes of its process and sends chunks: several steps of these lanes at once. The
loader joins the chunks of all workers and cuts them into the batches of single steps. Which rows
these are follows from the plan (load_plan.py), so workers change the speed and nothing else.

Memory: one segment per lane of this process (of parquet files about parquet_segments.SEGMENT_BYTES,
more if documents are long), the plans of two epochs (32 bytes a segment, twice that while they are
made), the chunks that are ready (`prefetch_factor` batches, rounded up to whole chunks), and for
parquet files about 40 MB to decode a segment, most of which Arrow's allocator keeps for the next.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from config import DataError, DataLoaderConfig
from data.loading.load_plan import BatchSpec, DataState, LoadPlan, plan_loading
from data.loading.packing import Lane, LaneReader, PackedLane, Position, PositionMap, RowLane
from data.loading.prefetch import Prefetcher
from data.sources.dataset import Dataset

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Chunk:
    """Successive steps of some lanes: `rows` is (steps, lanes, rows per lane, T + 1)."""

    rows: Tensor
    position_maps: list[PositionMap] = field(default_factory=list)
    """Of each lane."""
    skipped_counts: dict[str, int] = field(default_factory=dict)
    error: str | None = None

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
        reader = plan.segments.open_reader()
        source = LaneReader(reader, plan.lane_plan)
        lane_type: type[Lane] = RowLane if plan.segments.whole_rows else PackedLane
        starts = list(zip(plan.lanes, plan.start, strict=True))[worker::workers]
        try:
            # The first segment of all lanes at once: the first batch needs every one of them.
            for lane, (epoch, index, _) in starts:
                source.prefetch(epoch, lane, index, 1)
            # Inside the try: a position that does not fit raises DataError too.
            lanes: list[Lane] = [lane_type(source, lane, position) for lane, position in starts]
            while True:
                chunk = self._read(lanes)
                # Counts travel with the rows that they belong to, from worker to trainer.
                chunk.skipped_counts = dict(reader.skipped_counts)
                reader.skipped_counts.clear()
                yield chunk
        except DataError as error:
            # DataLoader would add the worker's traceback to an exception; a text arrives as it is.
            yield Chunk(torch.empty(0), error=str(error))
        finally:
            reader.close()

    def _read(self, lanes: list[Lane]) -> Chunk:
        plan = self._plan
        shape = (plan.chunk_steps, len(lanes), plan.rows_per_lane, plan.spec.block_size + 1)
        rows = np.empty(shape, dtype=plan.dtype)
        position_maps = [lane.fill(rows[:, i]) for i, lane in enumerate(lanes)]
        return Chunk(torch.from_numpy(rows), position_maps)


def join_chunks(parts: list[Chunk], pin: bool) -> Chunk:
    """Returns the chunks of all workers as one, with the lanes in order."""
    for part in parts:
        if part.error is not None:
            raise DataError(part.error)
    if len(parts) == 1:
        return parts[0]
    steps, _, rows_per_lane, width = parts[0].rows.shape
    lanes, workers = sum(part.rows.shape[1] for part in parts), len(parts)
    shape = (steps, lanes, rows_per_lane, width)
    rows = torch.empty(shape, dtype=parts[0].rows.dtype, pin_memory=pin)
    position_maps = [PositionMap(packed=True)] * lanes
    skipped = Counter[str]()
    # Worker w has lanes w, w + n, ...: interleaving puts them in order, whatever n is.
    for worker, part in enumerate(parts):
        rows[:, worker::workers] = part.rows
        position_maps[worker::workers] = part.position_maps
        skipped.update(part.skipped_counts)
    return Chunk(rows, position_maps, dict(skipped))


class StepBatch:
    """The rows of one optimizer step on this process."""

    micro_batches: tuple[Tensor, ...]
    """Tensors (B, T + 1) of uint8 or int32: inputs [:, :-1], targets [:, 1:]."""

    def __init__(
        self, plan: LoadPlan, rows: Tensor, position_maps: list[PositionMap], step: int
    ) -> None:
        """Takes rows (micro-batches, B, T + 1) and the number of the step in its chunk."""
        self._plan, self._position_maps, self._step = plan, position_maps, step
        self.micro_batches = rows.unbind(0)

    def _positions(self) -> list[Position]:
        """Returns the position of each lane after this batch."""
        # After this batch, not after the chunk: what is read ahead does not count as seen.
        token = (self._step + 1) * self._plan.lane_step_tokens
        return [positions.position(token) for positions in self._position_maps]

    @property
    def epoch(self) -> int:
        """The number of epochs that all lanes have completed after this batch."""
        return min(position.epoch for position in self._positions())

    def data_state(self) -> DataState:
        """Returns plain values from which a loader continues with the next batch."""
        return self._plan.data_state(self._positions())

    def describe(self) -> list[str]:
        """Returns the file and the rows or tokens that this batch is made of.

        Slow: reads the segments again.
        """
        plan, found = self._plan, defaultdict[str, list[range]](list)
        reader = plan.segments.open_reader()
        source = LaneReader(reader, plan.lane_plan)
        for lane, positions in zip(plan.lanes, self._position_maps, strict=True):
            # A PositionMap counts tokens from the begin of the chunk.
            step_begin = self._step * plan.lane_step_tokens
            own, block_size = plan.own_rows(lane), plan.spec.block_size
            begin, end = step_begin + own.start * block_size, step_begin + own.stop * block_size
            for position, length in positions.pieces(begin, end):
                name, numbers = source.locate(lane, position, length)
                found[name] += numbers
        reader.close()
        return [f"{name} {_format_ranges(numbers)}" for name, numbers in sorted(found.items())]


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
        # With fewer lanes than processes, the chunk also has rows of other processes.
        first = plan.own_rows(plan.lanes.start).start
        rows = chunk.rows.flatten(1, 2)[:, first : first + len(plan.rows)]
        steps = rows.view(len(rows), plan.spec.micro_batches, -1, rows.shape[-1]).unbind(0)
        return (StepBatch(plan, rows, chunk.position_maps, step) for step, rows in enumerate(steps))

    def first_data_state(self) -> DataState:
        """Returns the data state before the first batch of this loader."""
        return self.plan.data_state(self.plan.start)

    def close(self) -> None:
        """Ends the thread and the workers; batches already handed out stay valid."""
        self._close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
