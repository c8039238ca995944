"""Batches for training and rows for evaluation.

The one idea: the global batch of a step is a fixed list of rows, lane after lane, and a process
takes its share of that list. So neither the number of processes, workers and micro-batches nor an
interruption changes a batch. Workers send chunks of about 256 KB that cover many steps of some
lanes, because a message costs more than the bytes of a small batch.

Memory: one unit per lane of this process (of parquet files about data.index.UNIT_BYTES, more where
documents are long), the plan of two epochs (32 bytes a unit, twice that while it is made), the
chunks that are ready (`prefetch_factor` batches, rounded up to whole chunks), and for parquet files
about 40 MB to decode one unit, most of which Arrow's allocator keeps for the next one.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from config import DataError, DataLoaderConfig
from data.loading.order import Integers, Tokens, lane_count, rank_lanes, rank_rows
from data.loading.packing import Address, LaneStream, RowStream, Trace, windows
from data.loading.prefetch import Feed
from data.sources.base import PLAN_VERSION, Dataset, Plan, Reader, Units, split_of, training_blocks
from data.tokenizers.base import row_dtype

log = logging.getLogger(__name__)

STATE_VERSIONS = (1, PLAN_VERSION)
"""Of the plan that a data state is a place in; a run goes on with the one that it began with."""
CHUNK_BYTES = 1 << 18
_EVALUATION_SEED = 0
_EVALUATION_UNITS = 16
_NEW_RUN = "start a new run with its weights: training.init_from=RUN in place of the resume."


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpec:
    """The shape of a step and this process's place in it.

    A step is `sequences_per_step` rows of `block_size` + 1 tokens over all processes; this one
    gets 1 / `world_size` of them in `micro_batches` equal tensors. `pin` says that they go to
    a GPU, so that `dataloader.pin_memory` applies. `lanes` is the number of lanes, by default the
    most that fit.
    """

    block_size: int
    sequences_per_step: int
    micro_batches: int
    seed: int
    rank: int = 0
    world_size: int = 1
    lanes: int | None = None
    pin: bool = False


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which rows of which lanes this process reads."""

    block_size: int
    rows: range
    lanes: range
    rows_per_lane: int
    dtype: np.dtype[Any]

    @property
    def step_tokens(self) -> int:
        """Tokens of one lane and step."""
        return self.rows_per_lane * self.block_size

    @property
    def chunk_steps(self) -> int:
        """Steps in one chunk."""
        step_tokens = len(self.lanes) * self.rows_per_lane * (self.block_size + 1)
        return max(1, CHUNK_BYTES // (step_tokens * self.dtype.itemsize))

    def own_rows(self, lane: int) -> tuple[int, int]:
        """The rows [first, last) of a lane's step that belong to this process."""
        start = lane * self.rows_per_lane
        return max(self.rows.start - start, 0), min(self.rows.stop - start, self.rows_per_lane)


@dataclass(slots=True)
class Chunk:
    """Some steps of some lanes: `rows` is (steps, lanes, rows per lane, T + 1)."""

    rows: Tensor
    traces: list[Trace] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    def pin_memory(self) -> Chunk:
        """The chunk in page-locked memory; called by DataLoader."""
        self.rows = self.rows.pin_memory()
        return self


class _Source:
    """The units of a plan, for `LaneStream` and `RowStream`."""

    def __init__(self, reader: Reader, plan: Plan) -> None:
        self._reader, self._plan = reader, plan

    def lane_units(self, epoch: int, lane: int) -> Integers:
        """The units of a lane in one epoch."""
        return self._plan.lane_units(epoch, lane)

    def tokens(self, epoch: int, lane: int, place: int) -> Tokens:
        """What the lane reads of the unit at that place."""
        plan = self._plan
        unit = int(plan.lane_units(epoch, lane)[place])
        tokens = self._reader.tokens(unit, plan.seed, epoch, plan.shuffle)
        return tokens[plan.part(epoch, lane, place, len(tokens))]


class _ChunkSource(IterableDataset[Chunk]):
    """Endless chunks; worker w of n reads every n-th lane from w on."""

    def __init__(self, units: Units, plan: Plan, layout: _Layout, addresses: list[Address]) -> None:
        self._units, self._plan = units, plan
        self._layout, self._addresses = layout, addresses

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = self._units.reader()
        source = _Source(reader, self._plan)
        stream: type[LaneStream | RowStream] = RowStream if self._units.whole_rows else LaneStream
        starts = list(zip(self._layout.lanes, self._addresses, strict=True))[worker::workers]
        try:
            lanes = [stream(source, lane, address) for lane, address in starts]
            while True:
                chunk = self._read(lanes)
                chunk.counts = dict(reader.counts)
                reader.counts.clear()
                yield chunk
        except DataError as error:  # as text, so that it arrives from a worker as it was raised
            yield Chunk(torch.empty(0), error=str(error))
        finally:
            reader.close()

    def _read(self, lanes: list[LaneStream | RowStream]) -> Chunk:
        layout = self._layout
        shape = (layout.chunk_steps, len(lanes), layout.rows_per_lane, layout.block_size + 1)
        rows = np.empty(shape, dtype=layout.dtype)
        traces = [lane.fill(rows[:, i]) for i, lane in enumerate(lanes)]
        return Chunk(torch.from_numpy(rows), traces)


def _join(parts: list[Chunk], pin: bool) -> Chunk:
    """The chunks of all workers as one, lanes in order."""
    for part in parts:
        if part.error is not None:
            raise DataError(part.error)
    if len(parts) == 1:
        return parts[0]
    steps, _, rows_per_lane, width = parts[0].rows.shape
    lanes = sum(part.rows.shape[1] for part in parts)
    shape, dtype = (steps, lanes, rows_per_lane, width), parts[0].rows.dtype
    rows = torch.empty(shape, dtype=dtype, pin_memory=pin)
    traces = [Trace() for _ in range(lanes)]
    counts: collections.Counter[str] = collections.Counter()
    for worker, part in enumerate(parts):
        rows[:, worker :: len(parts)] = part.rows
        traces[worker :: len(parts)] = part.traces
        counts.update(part.counts)
    return Chunk(rows, traces, dict(counts))


class StepBatch:
    """The rows of one optimizer step on this process."""

    def __init__(self, loader: TrainLoader, rows: Tensor, traces: list[Trace], step: int) -> None:
        self._loader, self._traces, self._step = loader, traces, step
        self.micro_batches: tuple[Tensor, ...] = rows.unbind(0)
        """Tensors (B, T + 1) of uint8 or int32: inputs [:, :-1], targets [:, 1:]."""

    def _addresses(self) -> list[Address]:
        token = (self._step + 1) * self._loader.layout.step_tokens
        return [trace.address(token) for trace in self._traces]

    @property
    def epoch(self) -> int:
        """Completed epochs after this batch: of the lane that has the fewest."""
        return min(epoch for epoch, _, _ in self._addresses())

    def data_state(self) -> dict[str, Any]:
        """Plain values; `TrainLoader(data_state=...)` continues with the batch after this one."""
        return self._loader.data_state_at(self._addresses())

    def describe(self) -> list[str]:
        """File and rows or tokens that this batch is made of; reads parquet files again."""
        plan, layout = self._loader.plan, self._loader.layout
        found: dict[str, list[range]] = collections.defaultdict(list)
        reader = self._loader.units.reader()
        for lane, trace in zip(layout.lanes, self._traces, strict=True):
            begin = self._step * layout.step_tokens
            first, last = (begin + row * layout.block_size for row in layout.own_rows(lane))
            for (epoch, place, offset), length in trace.runs(first, last):
                unit = int(plan.lane_units(epoch, lane)[place])
                where = unit, plan.seed, epoch, plan.shuffle
                offset += plan.part(epoch, lane, place, len(reader.tokens(*where))).start
                name, numbers = reader.places(*where, range(offset, offset + length))
                found[name] += numbers
        reader.close()
        return [f"{name} {_joined(numbers)}" for name, numbers in sorted(found.items())]


def _joined(ranges: list[range]) -> str:
    """range(1, 4) and range(7, 8) as '1-3, 7'; what touches or overlaps is one."""
    groups: list[tuple[int, int]] = []
    for numbers in sorted(ranges, key=lambda numbers: numbers.start):
        first, last = numbers.start, numbers.stop - 1
        if groups and first <= groups[-1][1] + 1:
            first, last = groups[-1][0], max(groups.pop()[1], last)
        groups.append((first, last))
    return ", ".join(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in groups)


class TrainLoader:
    """Endless training batches of one process; use as a context manager or call `close`.

    Iterating touches no global random state. `data_state` continues where a
    `StepBatch.data_state` (of all lanes this process reads, see `merge_data_states`) was taken.
    Raises DataError for a data state that does not fit, and from `next` for text that cannot be
    read.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: BatchSpec,
        dataloader: DataLoaderConfig,
        data_state: dict[str, Any] | None = None,
    ) -> None:
        self.spec, self.units = spec, dataset.source.units(spec.block_size)
        chosen = split_of(self.units, "train")
        if not len(chosen):
            raise dataset.too_short("train", spec.block_size)
        self._version = PLAN_VERSION if data_state is None else data_state["version"]
        tokens = None if self._version == 1 else self.units.tokens
        lanes = _lanes(self.units, spec, dataloader.shuffle, data_state, tokens)
        total = spec.sequences_per_step
        assert total % (spec.world_size * spec.micro_batches) == 0
        rows = rank_rows(total, spec.world_size, spec.rank)
        mine = rank_lanes(rows, total, lanes)
        dtype = row_dtype(dataset.vocab_size)
        self.layout = _Layout(spec.block_size, rows, mine, total // lanes, dtype)
        shuffle = dataloader.shuffle
        self.plan = Plan(self.units.block, chosen, lanes, spec.seed, shuffle, tokens)
        if data_state is not None:
            _check_tokens(data_state, self.plan)
        self.skipped_counts: collections.Counter[str] = collections.Counter()
        """Null and empty documents and NUL bytes met so far, counted by kind."""
        self._batches: Iterator[StepBatch] = iter(())
        workers = min(dataloader.num_workers, len(mine))
        if workers < dataloader.num_workers:
            log.warning(
                "dataloader.num_workers: %d, but this process reads %d lanes; %d workers are used",
                dataloader.num_workers,
                len(mine),
                workers,
            )
        pin = spec.pin and dataloader.pin_memory
        ahead = -(-dataloader.prefetch_factor // self.layout.chunk_steps)
        self._begin = _starts(mine, data_state)
        source = _ChunkSource(self.units, self.plan, self.layout, self._begin)
        self._feed: Feed[Chunk] = Feed(source, lambda parts: _join(parts, pin), workers, ahead, pin)

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> StepBatch:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._cut(self._feed.get())
            batch = next(self._batches)
        return batch

    def _cut(self, chunk: Chunk) -> Iterator[StepBatch]:
        """The steps of a chunk."""
        self.skipped_counts.update(chunk.counts)
        first, _ = self.layout.own_rows(self.layout.lanes.start)
        rows = chunk.rows.flatten(1, 2)[:, first : first + len(self.layout.rows)]
        shape = len(rows), self.spec.micro_batches, -1, rows.shape[-1]
        steps = rows.view(shape).unbind(0)
        return (StepBatch(self, rows, chunk.traces, step) for step, rows in enumerate(steps))

    def first_data_state(self) -> dict[str, Any]:
        """The data state before the first batch of this loader."""
        return self.data_state_at(self._begin)

    def data_state_at(self, addresses: list[Address]) -> dict[str, Any]:
        """The data state of this process's lanes at these addresses."""
        return {
            "version": self._version,
            "lanes": self.plan.lanes,
            "epoch_tokens": self.plan.epoch_tokens,
            "sequences_per_step": self.spec.sequences_per_step,
            "block_size": self.spec.block_size,
            "seed": self.spec.seed,
            "shuffle": self.plan.shuffle,
            "first_lane": self.layout.lanes.start,
            "positions": [list(address) for address in addresses],
        }

    def close(self) -> None:
        """End the thread and the workers; batches already handed out stay valid."""
        self._feed.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_tokens(data_state: dict[str, Any], plan: Plan) -> None:
    """Raises DataError where the lanes of the data state were balanced by other counts."""
    then = data_state.get("epoch_tokens")
    if then != plan.epoch_tokens:
        raise DataError(
            f"data state: the checkpoint counted {then} tokens of training text, this program "
            f"{plan.epoch_tokens}, so its order is another. Restore the data and the tokenizer, or "
            f"{_NEW_RUN}"
        )


def _lanes(
    units: Units,
    spec: BatchSpec,
    shuffle: bool,
    data_state: dict[str, Any] | None,
    tokens: Integers | None,
) -> int:
    """The number of lanes: the data state's, else the spec's, else the most that fit."""
    blocks, sequences = training_blocks(units), spec.sequences_per_step
    if data_state is None:
        most = blocks if tokens is None else min(blocks, int(tokens[~units.held_out].sum()))
        lanes = spec.lanes or lane_count(sequences, most)
    else:
        _check_steps(data_state, units, spec, shuffle)
        lanes = data_state["lanes"]
    if sequences % lanes or lanes > blocks:
        raise DataError(
            f"{lanes} lanes do not fit {sequences} sequences per step and {blocks} "
            "blocks of text: lanes must divide the sequences and not exceed the blocks."
        )
    return lanes


def check_fits(data_state: dict[str, Any], units: Units, spec: BatchSpec, shuffle: bool) -> None:
    """Raises DataError unless a run can go on from the merged data state of its processes."""
    _check_steps(data_state, units, spec, shuffle)
    _starts(range(data_state["lanes"]), data_state)


def _check_steps(data_state: dict[str, Any], units: Units, spec: BatchSpec, shuffle: bool) -> None:
    """Raises DataError unless steps of this shape can go on where the data state stands, so that no
    text is skipped or read twice.

    A lane goes on at its next token, so a step may take more or fewer rows of each, and rows of
    documents may have another length; rows of token files are fixed by it.
    """
    if data_state["version"] not in STATE_VERSIONS:
        raise DataError(
            f"data state: version {data_state['version']}, this program reads 1 to {PLAN_VERSION}. "
            "Resume with the program that wrote the checkpoint."
        )
    if not len(data_state["positions"]) or data_state["lanes"] < 1:
        raise DataError("data state: it has no lanes. Take another checkpoint.")
    fixed = {"seed": spec.seed, "shuffle": shuffle}
    if units.whole_rows:
        fixed["block_size"] = spec.block_size
    for key, value in fixed.items():
        if data_state[key] != value:
            raise DataError(
                f"data state: the checkpoint has {key} {data_state[key]}, this run {value}; the "
                f"text already seen could not be told from the rest. Set it back, or {_NEW_RUN}"
            )
    if spec.sequences_per_step % data_state["lanes"]:
        raise DataError(
            f"data state: the checkpoint reads {data_state['lanes']} places of the text side by "
            f"side, and {spec.sequences_per_step} sequences per step cannot take as many from "
            "each. Make training.batch_size * gradient_accumulation_steps * processes a multiple "
            f"of {data_state['lanes']}, or {_NEW_RUN}"
        )


def _starts(lanes: range, data_state: dict[str, Any] | None) -> list[Address]:
    """Where each lane begins."""
    if data_state is None:
        return [(0, 0, 0)] * len(lanes)
    first = data_state["first_lane"]
    known = range(first, first + len(data_state["positions"]))
    if lanes.start < known.start or lanes.stop > known.stop:
        raise DataError(
            f"data state: holds lanes {known.start} to {known.stop - 1}, this process reads "
            f"{lanes.start} to {lanes.stop - 1}. Merge the data states of all processes."
        )
    positions = [data_state["positions"][lane - first] for lane in lanes]
    return [(epoch, place, offset) for epoch, place, offset in positions]


def merge_data_states(data_states: list[dict[str, Any]]) -> dict[str, Any]:
    """The data state of all lanes from those of all processes, for any number of processes."""
    positions: dict[int, list[int]] = {}
    for data_state in data_states:
        positions.update(enumerate(data_state["positions"], data_state["first_lane"]))
    lanes = range(min(positions), max(positions) + 1)
    assert len(positions) == len(lanes), "data states of neighbouring lanes"
    return {
        **data_states[0],
        "first_lane": lanes.start,
        "positions": [positions[lane] for lane in lanes],
    }


def evaluation_rows(dataset: Dataset, split: str, block_size: int, rows: int) -> Tensor:
    """Rows spread evenly over the "train" or "test" text, the same on every machine and for any
    seed.

    (n, block_size + 1) uint8 or int32 with n <= `rows`: fewer where the text is short. Of a long
    text of documents only the first units of a fixed order are read: as many as the rows need, and
    at least 16. Raises DataError where there is not one row.
    """
    assert rows > 0
    units = dataset.source.units(block_size)
    chosen = split_of(units, split)
    empty = np.zeros((0, block_size + 1), dtype=row_dtype(dataset.vocab_size))
    sample = (_even_rows if units.whole_rows else _first_rows)(units, chosen, empty, rows)
    if not len(sample):
        raise dataset.too_short(split, block_size)
    return torch.from_numpy(sample)


def _even_rows(units: Units, chosen: Integers, empty: Tokens, rows: int) -> Tokens:
    """At most `rows` rows, evenly spread over those of units that are whole rows.

    `empty` is (0, T + 1), of the type of the result.
    """
    width = empty.shape[1]
    ends = np.cumsum((units.sizes[chosen] - 1) // (width - 1))
    total = int(ends[-1]) if len(ends) else 0
    count = min(rows, total)
    sample = np.empty((count, width), dtype=empty.dtype)
    reader = units.reader()
    for row, number in zip(sample, np.arange(count) * total // max(1, count), strict=True):
        place = int(np.searchsorted(ends, number, side="right"))
        tokens = reader.tokens(int(chosen[place]), _EVALUATION_SEED, 0, shuffle=False)
        row[:] = tokens[len(tokens) - 1 - int(ends[place] - number) * (width - 1) :][:width]
    reader.close()
    return sample


def _first_rows(units: Units, chosen: Integers, empty: Tokens, rows: int) -> Tokens:
    """The same for units that are joined in a fixed order, of which the first ones are read."""
    chosen = Plan(units.block, chosen, 1, _EVALUATION_SEED, shuffle=True).lane_units(0, 0)
    size = np.cumsum(units.sizes[chosen])
    enough = 1 + int(np.searchsorted(size, 2 * rows * (empty.shape[1] - 1)))
    chosen = chosen[: max(_EVALUATION_UNITS, enough)]
    reader = units.reader()
    pieces = (reader.tokens(int(unit), _EVALUATION_SEED, 0, True) for unit in chosen)
    sample = _spread_rows(pieces, empty, rows)
    reader.close()
    return sample


def _spread_rows(pieces: Iterator[Tokens], kept: Tokens, rows: int) -> Tokens:
    """At most `rows` rows, evenly spread over those of a text that comes in pieces.

    `kept` is (0, T + 1), of the type of the result. How many rows there are is known only at the
    end, so every `stride`-th one is kept, and every other one of them dropped, and the stride
    doubled, whenever there are more than needed.
    """
    block_size = kept.shape[1] - 1
    rest = np.zeros(0, dtype=kept.dtype)
    seen, stride = 0, 1
    for piece in pieces:
        rest = np.concatenate((rest, piece), dtype=kept.dtype, casting="unsafe")
        if len(rest) <= block_size:
            continue
        complete = windows(rest, block_size)
        kept = np.concatenate((kept, complete[-seen % stride :: stride]))
        while len(kept) >= 2 * rows:
            kept, stride = kept[::2], 2 * stride
        seen += len(complete)
        rest = rest[len(complete) * block_size :].copy()  # lets the piece go
    count = min(rows, len(kept))
    return kept[np.arange(count) * len(kept) // max(1, count)]
