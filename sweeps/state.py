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
from engine.run_directory.manifest import steps_in
from sweeps.cells import Cell

_DEPTH = 8  # folders below checkpoint_dir in which runs are found


class State(Enum):
    """What is left to do for a cell. Of several runs of a cell, the one with the first counts."""

    FINISHED = "finished"
    RUNNING = "running"
    STOPPED_EARLY = "stopped early"
    NOT_FINITE = "not finite"
    """Its loss or gradients were: a result, which the same run would give again."""
    INTERRUPTED = "interrupted"
    WAITING = "waiting"
    LEFT_OUT = "left out"
    """Not finished, and a run that differs in the seed alone was stopped early."""


_ORDER = list(State)
OPEN = (State.RUNNING, State.INTERRUPTED, State.WAITING)


def _state_of_run(run: Run) -> State:
    if run.state == "done":
        return State.FINISHED
    if run.state == "running":
        return State.RUNNING
    if run.stopped_early:
        return State.STOPPED_EARLY
    if run.state == "crashed" and run.end_reason.startswith("NonFiniteError"):
        return State.NOT_FINITE
    return State.INTERRUPTED if steps_in(run.path) else State.WAITING


class RunIndex:
    """The runs below a folder by the cells that they are of, as of the last `refresh`.

    stops: whether the sweep stops runs early. Else a run that one stopped is an interrupted one.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell], stops: bool) -> None:
        self._folder, self._cells, self._stops = folder, cells, stops
        self._left_open = {cell.open_options for cell in cells}
        self._runs = dict[Path, tuple[State, Run, dict[tuple[str, ...], str]]]()
        self._found = dict[int, tuple[State, list[Run]]]()
        self.refresh()

    def refresh(self) -> None:
        """Looks for new runs, and reads those again that were not finished."""
        known, self._runs = self._runs, {}
        of_cells = defaultdict[tuple[tuple[str, ...], str], list[tuple[State, Run]]](list)
        for path in runs_in(self._folder, _DEPTH):
            if path not in known or known[path][0] is not State.FINISHED:
                try:
                    run = read_run(path)
                except DataError:  # removed since it was listed
                    continue
                # A cell trains in one process, and more of them take larger steps.
                left_open = self._left_open if run.config and run.step_factor == 1 else ()
                ids = {each: experiment_id(run.config, each) for each in left_open}
                known[path] = _state_of_run(run), run, ids
            state, run, ids = self._runs[path] = known[path]
            for key in ids.items():
                of_cells[key].append((state, run))
        self._found = {
            cell.number: self._choose(cell, of_cells.get((cell.open_options, cell.id), []))
            for cell in self._cells
        }
        if self._stops:
            self._leave_out()

    def _choose(self, cell: Cell, runs: list[tuple[State, Run]]) -> tuple[State, list[Run]]:
        """Returns the state of a cell, and its runs, the one that counts first."""
        if cell.config.training.fork_from_checkpoint is not None:  # forks of which parent?
            runs = [pair for pair in runs if is_run_of(cell.options, pair[1].config)]
        runs = sorted(runs, key=lambda pair: (_ORDER.index(pair[0]), -pair[1].step, pair[1].name))
        state = runs[0][0] if runs else State.WAITING
        if state is State.STOPPED_EARLY and not self._stops:
            state = State.INTERRUPTED
        return state, [run for _, run in runs]

    def _leave_out(self) -> None:
        early = {c.group for c in self._cells if self.state_of(c) is State.STOPPED_EARLY}
        for cell in self._cells:
            state, runs = self._found[cell.number]
            if cell.group in early and state in (State.INTERRUPTED, State.WAITING):
                self._found[cell.number] = State.LEFT_OUT, runs

    def state_of(self, cell: Cell) -> State:
        """Returns what is left to do for a cell."""
        return self._found[cell.number][0]

    def run_of(self, cell: Cell) -> Run | None:
        """Returns the run of a cell that says so."""
        return next(iter(self._found[cell.number][1]), None)

    def checkpoint_of(self, cell: Cell) -> Resume | None:
        """Returns the checkpoint from which a cell goes on, read and verified; None if its runs
        have no good one."""
        newest = (newest_valid(run.path)[0] for run in self._found[cell.number][1])
        return next((checkpoint for checkpoint in newest if checkpoint is not None), None)
