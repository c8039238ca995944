"""What one process reads in each step, decided before anything is read; and where a resume begins.

The batch of a step is a fixed list of rows, lane after lane. A process takes its slice of it,
so neither the number of processes nor an interruption changes a batch.

BatchSpec is what the config says of a batch. With a LanePlan (lanes.py: the segments of every lane)
it makes the LoadPlan of one process: its rows, its lanes, and the position where each begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from config import DataError
from data.loading.lanes import LanePlan
from data.loading.order import (
    PLAN_VERSION,
    Integers,
    Keys,
    count_distinct,
    lane_count,
    rank_lanes,
    rank_rows,
)
from data.loading.packing import START, Position
from data.sources.dataset import Dataset, Segments, segments_of_split
from data.tokenizers.base import row_dtype

DataState: TypeAlias = dict[str, Any]
"""How far the training text has been read, as plain values: the positions of some lanes and what
they depend on. `LoadPlan.data_state` lists the keys. Checkpoints keep it as `cursor`."""

CHUNK_BYTES = 1 << 18
"""About how much a worker sends at once: a message costs more than the bytes of a small batch."""
_NEW_RUN = "start a new run with its weights: training.init_from=RUN in place of the resume."


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpec:
    """The batch of a step and the part that one process has in it."""

    block_size: int
    """T: rows have T + 1 tokens."""
    sequences_per_step: int
    """The rows of all processes in one step."""
    micro_batches: int
    """Equal tensors that this process gets its rows in."""
    seed: int
    rank: int = 0
    world_size: int = 1
    lanes: int | None = None
    """None: as many as fit."""
    pin: bool = False
    """Whether batches go to a GPU, so that dataloader.pin_memory applies."""


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """The rows of each step that one process reads, and where it begins."""

    spec: BatchSpec
    segments: Segments
    lane_plan: LanePlan
    version: int
    """The PLAN_VERSION that the run began with."""
    rows: range
    """Of the batch: those of this process."""
    lanes: range
    """The lanes that hold them."""
    start: tuple[Position, ...]
    """The first token of each of these lanes."""
    dtype: np.dtype[Any]

    @property
    def rows_per_lane(self) -> int:
        """The rows of one lane in a batch."""
        return self.spec.sequences_per_step // self.lane_plan.lanes

    @property
    def lane_step_tokens(self) -> int:
        """The tokens by which a lane moves on in a step."""
        return self.rows_per_lane * self.spec.block_size

    @property
    def chunk_steps(self) -> int:
        """The steps in one chunk."""
        step_tokens = len(self.lanes) * self.rows_per_lane * (self.spec.block_size + 1)
        return max(1, CHUNK_BYTES // (step_tokens * self.dtype.itemsize))

    def own_rows(self, lane: int) -> range:
        """Returns which of the rows that a step takes from a lane this process gets.

        All of them, unless there are fewer lanes than processes.
        """
        first = lane * self.rows_per_lane  # the number of the lane's first row in the batch
        return range(
            max(self.rows.start - first, 0), min(self.rows.stop - first, self.rows_per_lane)
        )

    def data_state(self, positions: Sequence[Position]) -> DataState:
        """Returns the data state of this process, whose lanes stand at these positions."""
        return {
            "version": self.version,
            "lanes": self.lane_plan.lanes,
            "epoch_tokens": self.lane_plan.epoch_tokens,
            "sequences_per_step": self.spec.sequences_per_step,
            "block_size": self.spec.block_size,
            "seed": self.spec.seed,
            "shuffle": self.lane_plan.shuffle,
            "first_lane": self.lanes.start,
            "positions": [list(position) for position in positions],
        }


def plan_loading(
    dataset: Dataset, spec: BatchSpec, shuffle: bool, data_state: DataState | None = None
) -> LoadPlan:
    """Plans the rows of one process, from the start of the data or from a data state on.

    Raises DataError for too little text, and for a data state that does not fit.
    """
    segments = dataset.segments(spec.block_size)
    training = segments_of_split(segments, "train")
    if not len(training):
        raise dataset.too_short("train", spec.block_size)
    total = spec.sequences_per_step
    assert total % (spec.world_size * spec.micro_batches) == 0
    if data_state is not None:
        _check_continuable(data_state, segments, spec, shuffle)
    # A run keeps the rule it began with: another one would repeat and skip text from here on.
    version = PLAN_VERSION if data_state is None else data_state["version"]
    # Without `tokens` the plan deals segments in turn, which is the rule of version 1.
    tokens = segments.tokens if version > 1 else None
    keys = segments.shuffle_keys
    wanted = spec.lanes if data_state is None else data_state["lanes"]
    lanes = _lane_count(keys[training], total, wanted, None if tokens is None else tokens[training])
    plan = LanePlan(keys, training, lanes=lanes, seed=spec.seed, shuffle=shuffle, tokens=tokens)
    if data_state is not None:
        _check_epoch_tokens(data_state, plan)
    rows = rank_rows(total, spec.world_size, spec.rank)
    own_lanes = rank_lanes(rows, total, lanes)
    return LoadPlan(
        spec=spec,
        segments=segments,
        lane_plan=plan,
        version=version,
        rows=rows,
        lanes=own_lanes,
        start=_lane_positions(data_state, own_lanes),
        dtype=row_dtype(dataset.vocab_size),
    )


def _lane_count(keys: Keys, sequences: int, wanted: int | None, tokens: Integers | None) -> int:
    """Returns `wanted` lanes, or as many as the shuffle keys and tokens of the segments allow."""
    available = count_distinct(keys)
    # A lane needs a row group of its own, and a token of every epoch.
    most = available if tokens is None else min(available, int(tokens.sum()))
    lanes = wanted or lane_count(sequences, most)
    if sequences % lanes or lanes > available:
        raise DataError(
            f"{lanes} lanes do not fit {sequences} sequences per step and {available} row groups "
            "of text: lanes must divide the sequences and not exceed the row groups."
        )
    return lanes


def check_data_state(
    data_state: DataState, segments: Segments, spec: BatchSpec, shuffle: bool
) -> None:
    """Raises DataError unless a run can continue from the merged data state of its processes."""
    _check_continuable(data_state, segments, spec, shuffle)
    _lane_positions(data_state, range(data_state["lanes"]))


def _check_continuable(
    data_state: DataState, segments: Segments, spec: BatchSpec, shuffle: bool
) -> None:
    """Raises DataError unless such batches can continue the data state without skipping text or
    reading it twice.

    A lane continues at its next token, so a step may take more or fewer rows of each lane, and
    packed rows may have another length. Rows of token files are cut by their length.
    """
    version, lanes = data_state["version"], data_state["lanes"]
    if not 1 <= version <= PLAN_VERSION:
        raise DataError(
            f"data state: version {version}, this program reads 1 to {PLAN_VERSION}. "
            "Resume with the program that wrote the checkpoint."
        )
    if not len(data_state["positions"]) or lanes < 1:
        raise DataError("data state: it has no lanes. Take another checkpoint.")
    # Each of these changes which text the positions stand for.
    fixed = {"seed": spec.seed, "shuffle": shuffle}
    if segments.whole_rows:
        fixed["block_size"] = spec.block_size
    for key, value in fixed.items():
        if data_state[key] != value:
            raise DataError(
                f"data state: the checkpoint has {key} {data_state[key]}, this run {value}, so the "
                "loader cannot tell which text was already read. Restore the old value, or "
                f"{_NEW_RUN}"
            )
    if spec.sequences_per_step % lanes:
        raise DataError(
            f"data state: the checkpoint reads {lanes} places of the text side by side, and "
            f"{spec.sequences_per_step} sequences per step cannot take as many from each. Make "
            "training.batch_size * gradient_accumulation_steps * processes a multiple of "
            f"{lanes}, or {_NEW_RUN}"
        )


def _check_epoch_tokens(data_state: DataState, plan: LanePlan) -> None:
    """Raises DataError if lanes were balanced by another count of tokens: shares then differ."""
    then = data_state.get("epoch_tokens")  # version 1 has none
    if then != plan.epoch_tokens:
        raise DataError(
            f"data state: the checkpoint counted {then} tokens of training text, this program "
            f"{plan.epoch_tokens}, so its order differs. Restore the data and the tokenizer, or "
            f"{_NEW_RUN}"
        )


def _lane_positions(data_state: DataState | None, lanes: range) -> tuple[Position, ...]:
    """Returns where each of these lanes begins."""
    if data_state is None:
        return (START,) * len(lanes)
    first, positions = data_state["first_lane"], data_state["positions"]
    known = range(first, first + len(positions))
    if lanes.start < known.start or lanes.stop > known.stop:
        raise DataError(
            f"data state: holds lanes {known.start} to {known.stop - 1}, this process reads "
            f"{lanes.start} to {lanes.stop - 1}. Merge the data states of all processes."
        )
    return tuple(Position(*positions[lane - first]) for lane in lanes)


def merge_data_states(data_states: list[DataState]) -> DataState:
    """Returns one data state with the lanes of all processes, for any number of processes."""
    positions: dict[int, list[int]] = {}
    for state in data_states:
        positions.update(enumerate(state["positions"], state["first_lane"]))
    # With fewer lanes than processes, several processes state the same lane, at the same position.
    lanes = range(min(positions), max(positions) + 1)
    assert len(positions) == len(lanes), "data states of neighbouring lanes"
    return {
        **data_states[0],
        "first_lane": lanes.start,
        "positions": [positions[lane] for lane in lanes],
    }
