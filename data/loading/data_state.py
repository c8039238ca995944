"""The data state: how far the training text has been read; whether a run can continue from it.

It does not know how many processes there were: the states of all are merged into one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from config import DataError
from data.loading.batch_spec import BatchSpec
from data.loading.order import PLAN_VERSION
from data.loading.packing import START, Position
from data.loading.shares import Shares
from data.sources.dataset import Dataset

DataState: TypeAlias = dict[str, Any]
"""Plain values: the positions of some lanes and what they depend on, of a mixture for each source.
`LoadPlan.data_state` (load_plan.py) lists the keys. Checkpoints keep it as `cursor`."""

NEW_RUN = "start a new run with its weights: training.init_from=RUN in place of the resume."


def source_states(data_state: DataState) -> list[DataState]:
    """Returns the data state of each source, with what it has in common with the others."""
    return [{**data_state, **state} for state in data_state.get("sources", [{}])]


def _has_shares(saved: Sequence[DataState]) -> bool:
    """Returns whether the sources of a mixture have given rows as their weights say."""
    weights = [state["weight"] for state in saved]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        return False
    rows = [state["rows_at_weight"] for state in saved]
    more = all(state["rows"] >= state["rows_at_weight"] for state in saved)
    return more and Shares(weights).can_follow(rows)


def rows_at_weights(shares: Shares, saved: Sequence[DataState | None]) -> tuple[int, ...]:
    """Returns the rows that each source has given at these weights.

    None, if `saved` has other weights: the rule begins anew with the next step.
    """
    named = [state for state in saved if state is not None and "name" in state]
    if named and Shares([state["weight"] for state in named]).weights == shares.weights:
        return tuple(state["rows_at_weight"] for state in named)
    return (0,) * len(saved)


def check_data_state(
    data_state: DataState, dataset: Dataset, spec: BatchSpec, shuffle: bool
) -> None:
    """Raises DataError unless a run can continue from the merged data state of its processes."""
    check_continuable(data_state, dataset, spec, shuffle)
    for state in source_states(data_state):
        lane_positions(state, range(state["lanes"]))


def check_continuable(
    data_state: DataState, dataset: Dataset, spec: BatchSpec, shuffle: bool
) -> None:
    """Raises DataError unless such batches can continue the data state without skipping text or
    reading it twice.

    A lane continues at its next token, so a step may take more or fewer rows of each lane, and
    packed rows may have another length. Rows of token files are cut by their length.
    """
    version, saved = data_state["version"], source_states(data_state)
    if not 1 <= version <= PLAN_VERSION:
        raise DataError(
            f"data state: version {version}, this program reads 1 to {PLAN_VERSION}. "
            "Resume with the program that wrote the checkpoint."
        )
    names = [source.name for source in dataset.sources]
    then = [state.get("name", "") for state in saved]
    if then != names:
        raise DataError(
            f"data state: it has the sources {then}, this run {names}. Set dataset.mixture back "
            f"(weights may change), or {NEW_RUN}"
        )
    for state in saved:
        if not len(state["positions"]) or state["lanes"] < 1:
            raise DataError("data state: it has no lanes. Take another checkpoint.")
    if names != [""] and not _has_shares(saved):
        raise DataError(
            "data state: the rows of its sources do not follow from their weights. "
            "Take another checkpoint."
        )
    # Each of these changes which text the positions stand for.
    fixed = {"seed": spec.seed, "shuffle": shuffle}
    if any(source.dataset.segments(spec.block_size).whole_rows for source in dataset.sources):
        fixed["block_size"] = spec.block_size
    for key, value in fixed.items():
        if data_state[key] != value:
            raise DataError(
                f"data state: the checkpoint has {key} {data_state[key]}, this run {value}, so the "
                "loader cannot tell which text was already read. Restore the old value, or "
                f"{NEW_RUN}"
            )
    if "lanes" in data_state and spec.sequences_per_step % data_state["lanes"]:
        raise DataError(
            f"data state: the checkpoint reads {data_state['lanes']} places of the text side by "
            f"side, and {spec.sequences_per_step} sequences per step cannot take as many from "
            "each. Make training.batch_size * gradient_accumulation_steps * processes a multiple "
            f"of {data_state['lanes']}, or {NEW_RUN}"
        )


def lane_positions(data_state: DataState | None, lanes: range) -> tuple[Position, ...]:
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
    first = data_states[0]
    if "sources" not in first:
        return _merge_lanes(data_states)
    each = zip(*(state["sources"] for state in data_states), strict=True)
    return {**first, "sources": [_merge_lanes(list(states)) for states in each]}


def _merge_lanes(states: list[DataState]) -> DataState:
    positions: dict[int, list[int]] = {}
    for state in states:
        positions.update(enumerate(state["positions"], state["first_lane"]))
    # Neighbouring processes may state the same lane, at the same position.
    lanes = range(min(positions), max(positions) + 1)
    assert len(positions) == len(lanes), "data states of neighbouring lanes"
    return {
        **states[0],
        "first_lane": lanes.start,
        "positions": [positions[lane] for lane in lanes],
    }
