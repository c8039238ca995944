"""Which cells of a sweep have a run, and how far it is: read from the run directories alone.

A run belongs to a cell by its config, wherever it came from: an earlier start of the sweep, another
sweep, or a train.py by hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from compare.reading.run import Run, read_run
from config import DataError
from engine.run_directory.experiment import experiment_id, is_run_of
from engine.run_directory.find_checkpoint import Resume, newest_valid
from engine.run_directory.find_runs import runs_in
from engine.run_directory.manifest import complete_checkpoints, steps_in
from sweeps.cells import Cell

_DEPTH = 8  # folders below checkpoint_dir in which runs are found
_KEY = tuple[tuple[str, ...], str]  # open options, id


class State(Enum):
    """What is left to do for a cell, by its runs. The first that holds for one of them counts."""

    FINISHED = "finished"
    RUNNING = "running"
    STOPPED_EARLY = "stopped early"
    NOT_FINITE = "not finite"
    """Its loss or gradients were: a result, which the same run would give again."""
    INTERRUPTED = "interrupted"
    MISSING = "waiting"


def state_of_run(run: Run) -> State:
    """Returns how far a run is."""
    if run.state == "done" and _is_whole(run):
        return State.FINISHED
    if run.state == "running":
        return State.RUNNING
    if run.stopped_early:
        return State.STOPPED_EARLY
    if run.state == "crashed" and run.end_reason.startswith("NonFiniteError"):
        return State.NOT_FINITE
    return State.INTERRUPTED if steps_in(run.path) else State.MISSING


def _is_whole(run: Run) -> bool:
    """Returns whether the last checkpoint of a run is there. A kill can come between it and the
    final record, which stands in metrics.jsonl before."""
    ended = run.environment.get("ended")
    if isinstance(ended, dict) and ended.get("state") == "done":
        return True
    return max(complete_checkpoints(run.path), default=-1) >= run.step


class RunIndex:
    """The runs below a folder by the cells that they are of."""

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self._folder = folder
        self._left_open = {cell.open_options for cell in cells}
        self._runs = dict[Path, Run]()
        self._keys = dict[Path, list[_KEY]]()
        self._by_key = dict[_KEY, list[Path]]()

    def refresh(self) -> None:
        """Looks for new runs, and reads those again that were not finished."""
        found = dict[Path, Run]()
        for path in runs_in(self._folder, _DEPTH):
            run = self._runs.get(path)
            if run is None or state_of_run(run) is not State.FINISHED:
                try:
                    run = read_run(path)
                except DataError:  # removed since it was listed
                    continue
            found[path] = run
        for path, run in found.items():
            before = self._runs.get(path)
            if before is None or before.config != run.config:
                ids = {key: experiment_id(run.config, key) for key in self._left_open}
                self._keys[path] = list(ids.items()) if run.config else []
        self._runs = found
        by_key = defaultdict[_KEY, list[Path]](list)
        for path in found:
            for key in self._keys[path]:
                by_key[key].append(path)
        self._by_key = by_key

    def runs_of(self, cell: Cell) -> list[Run]:
        """Returns the runs of a cell, as of the last refresh, the one that counts first."""
        runs = [self._runs[path] for path in self._by_key.get((cell.open_options, cell.id), ())]
        if cell.config.training.fork_from_checkpoint is not None:  # forks of which parent?
            runs = [run for run in runs if is_run_of(cell.options, run.config)]
        order = list(State)
        return sorted(
            runs,
            key=lambda run: (order.index(state_of_run(run)), -run.step, run.name),
        )

    def state_of(self, cell: Cell) -> tuple[State, Run | None]:
        """Returns what is left to do for a cell, and the run that says so."""
        run = next(iter(self.runs_of(cell)), None)
        return (State.MISSING, None) if run is None else (state_of_run(run), run)

    def checkpoint_of(self, cell: Cell) -> Resume | None:
        """Returns the checkpoint from which a cell goes on, read and verified; None if its runs
        have no good one."""
        for run in self.runs_of(cell):
            newest, _ = newest_valid(run.path)
            if newest is not None:
                return newest
        return None
