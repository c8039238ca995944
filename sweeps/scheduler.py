"""Starts the runs of a sweep, some at once, looks after them, and stops them.

A cell is settled once its run is finished, was stopped for good, or failed twice. Whatever else
happens, a kill of this process included, the next start finds its state in the run directories.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from compare.reading.run import STOPPED_EARLY, Run
from config import STOP_EXIT_CODES
from files.atomic import atomic_write_text
from files.write_errors import as_write_error
from settings.formatting import format_duration, format_plural
from settings.terminal import printable
from sweeps.cells import Cell
from sweeps.display import Display, Row
from sweeps.processes import LOGS, Job, Start, last_lines, send, start_job
from sweeps.state import RunIndex, State
from sweeps.stopping import CurveReader, Member, hopeless
from sweeps.sweep_file import StopRule

ATTEMPTS = 2
POLL_S = 0.1
_LOOK_S = 0.5
_LOOK_SHARE = 20
"""Run directories are looked at again after `_LOOK_S`, or after so many times as long as that took:
of thousands, less often."""
_LINES = 6  # of the log of a failed run
_NOT_FINITE = 4  # exit code of train.py
_SETTLED = (State.FINISHED, State.STOPPED_EARLY, State.NOT_FINITE)


class StopSignals:
    """Context that notes signals that end a sweep; the second Ctrl-C sets `at_once`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at_once = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_EXIT_CODES:
            if signal.getsignal(number) != signal.SIG_IGN:  # of nohup
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.at_once = self.signal is not None and number == signal.SIGINT
        self.signal = signal.Signals(number)


class Scheduler:
    """Brings all cells to their end.

    Args:
        rule: when runs are stopped early; None for never.
        slots: the environment variables of each of several runs at once.
        start: starts a process.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        rule: StopRule | None,
        slots: Sequence[Mapping[str, str]],
        display: Display,
        start: Start,
    ) -> None:
        self.cells = cells
        self.index = RunIndex(Path(cells[0].config.training.checkpoint_dir), cells)
        self.index.refresh()
        self.started = 0
        """Runs that were started here."""
        self.failed = set[int]()
        """Numbers of cells that are given up."""
        self._left_out = set[int]()  # their group was stopped before they had a run
        self._rule, self._slots, self._display, self._start = rule, slots, display, start
        self._jobs = dict[int, Job]()
        self._failures = Counter[int]()
        self._elsewhere = set[int]()
        self._curves = CurveReader(rule.metric if rule else "")
        self._next_look = 0.0
        self._stopping = False

    def state_of(self, cell: Cell) -> State:
        """Returns the state of a cell, as of the last look. Without a rule in the file, a run that
        one stopped early goes on."""
        state = self.index.state_of(cell)[0]
        return State.INTERRUPTED if state is State.STOPPED_EARLY and not self._rule else state

    def is_settled(self, cell: Cell) -> bool:
        """Returns whether nothing more is done for a cell."""
        given_up = cell.number in self.failed or cell.number in self._left_out
        return given_up or self.state_of(cell) in _SETTLED

    def run(self, stop: StopSignals) -> None:
        """Returns once all cells are settled, or all runs have ended after a signal."""
        told: signal.Signals | None = None
        while True:
            self._reap()
            if stop.signal is None:
                self._look()
                if not self._jobs and all(map(self.is_settled, self.cells)):
                    return
            elif not self._jobs:
                return
            elif told is None or stop.at_once:
                told = stop.signal
                self._pass_on(signal.SIGKILL if stop.at_once else told)
            self._display.show(self._rows)
            time.sleep(POLL_S)

    def _pass_on(self, number: signal.Signals) -> None:
        self._stopping = True
        count = format_plural(len(self._jobs), "run")
        if number == signal.SIGKILL:
            self._say(f"Ended {count} at once, without saving.")
        else:
            self._say(
                f"{number.name}: waiting for {count} to save; Ctrl-C again ends them at once."
            )
        for job in self._jobs.values():
            send(job, number)

    # ---- starting

    def _look(self) -> None:
        """Reads the run directories, stops hopeless runs, and starts others in free slots."""
        if time.monotonic() < self._next_look:
            return
        began = time.monotonic()
        self.index.refresh()
        self._next_look = began + max(_LOOK_S, _LOOK_SHARE * (time.monotonic() - began))
        self._judge()
        for cell in self.cells:
            if len(self._jobs) == len(self._slots):
                break
            if cell.number not in self._jobs and not self.is_settled(cell):
                self._begin(cell)

    def _begin(self, cell: Cell) -> None:
        """Starts a cell's run or goes on with it, unless it runs elsewhere."""
        taken = {job.slot for job in self._jobs.values()}
        slot = next(number for number in range(len(self._slots)) if number not in taken)
        if self.state_of(cell) is State.RUNNING:
            self._tell_elsewhere(cell)
            return
        resume = self.index.checkpoint_of(cell)
        words = [] if resume is None else [f"resume_from_checkpoint={resume.run_dir}"]
        job = start_job(cell, words, log_path(cell), (slot, self._slots[slot]), self._start)
        if job is None:
            self._tell_elsewhere(cell)
            return
        self._elsewhere.discard(cell.number)
        self._jobs[cell.number] = job
        self.started += 1
        how = f"goes on from step {resume.step} of {resume.run_dir}" if resume else "started"
        self._tell(cell, f"{how}, log in {job.log}")

    def _tell_elsewhere(self, cell: Cell) -> None:
        if cell.number not in self._elsewhere:
            self._elsewhere.add(cell.number)
            run = self.index.state_of(cell)[1]
            where = f" ({run.path})" if run else ""
            self._tell(cell, f"runs already, started elsewhere{where}: waiting for its end")

    # ---- ending

    def _reap(self) -> None:
        """Settles the cells whose processes have ended."""
        ended = {n: job for n, job in self._jobs.items() if job.process.poll() is not None}
        if not ended:
            return
        for number in ended:
            del self._jobs[number]
        self.index.refresh()
        for job in ended.values():
            self._settle(job)
        self._next_look = 0.0

    def _settle(self, job: Job) -> None:
        """Says how a run ended, records an early stop, counts a failure."""
        cell, code = job.cell, job.process.returncode
        state, run = self.index.state_of(cell)
        took = format_duration(time.monotonic() - job.began_s)
        if state is State.FINISHED and run is not None:
            loss = "" if run.best_loss is None else f", best held-out loss {run.best_loss:.4f}"
            self._tell(cell, f"finished in {took}{loss} ({run.path})")
        elif job.why_stopped and run is not None and run.state == "stopped":
            record_early_stop(run, job.why_stopped)
            self.index.refresh()
        elif state is State.NOT_FINITE or code == _NOT_FINITE:
            where = f" ({run.path})" if run else ""
            self._tell(cell, f"its loss or gradients were not finite: not repeated{where}")
            self._left_out.add(cell.number)
        elif self._stopping:
            self._tell(cell, f"stopped at step {run.step}" if run else "stopped, nothing to save")
        elif code == 0:  # repeated, it would end in the same way
            self.failed.add(cell.number)
            why = "its run saved other options, decided by training.init_from"
            self._tell(cell, f"ended, but {why}; give them in the base")
        else:
            self._count_failure(job)

    def _count_failure(self, job: Job) -> None:
        self._failures[job.cell.number] += 1
        again = self._failures[job.cell.number] < ATTEMPTS
        if not again:
            self.failed.add(job.cell.number)
        code = job.process.returncode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        what = "tries again" if again else "given up"
        self._tell(job.cell, f"failed ({how}), {what}; the end of {job.log}:")
        for line in last_lines(job.log, job.began_at)[-_LINES:]:
            self._say(f"    {line}")

    # ---- early stopping

    def _judge(self) -> None:
        """Stops runs that the rule calls hopeless, and leaves out what else their groups have."""
        if self._rule is None:
            return
        cells = defaultdict[str, list[Cell]](list)
        for cell in self.cells:
            cells[cell.group].append(cell)
        groups = {name: [m for c in own for m in self._member(c)] for name, own in cells.items()}
        why = hopeless(self._rule, groups)
        for name, own in cells.items():
            early = any(self.state_of(cell) is State.STOPPED_EARLY for cell in own)
            for cell in own:
                job = self._jobs.get(cell.number)
                if job is not None and name in why and not job.why_stopped:
                    job.why_stopped = f"sweep: {why[name]}"
                    self._tell(cell, f"stopped early, {why[name]}")
                    send(job, signal.SIGTERM)
                elif job is None and early and not self.is_settled(cell):
                    self._left_out.add(cell.number)
                    self._tell(cell, "left out: its setting was stopped early with another seed")

    def _member(self, cell: Cell) -> list[Member]:
        run = self.index.state_of(cell)[1]
        if run is None:
            return []
        job = self._jobs.get(cell.number)
        planned = run.planned_steps or cell.config.training.max_iters
        running = job is not None and not job.why_stopped
        return [Member(self._curves.curve(run.path), planned, running)]

    # ---- saying

    def _say(self, line: str) -> None:
        self._display.say(printable(line))

    def _tell(self, cell: Cell, text: str) -> None:
        self._say(f"Cell {cell.number}/{len(self.cells)} ({cell.name}): {text}")

    def _rows(self) -> list[Row]:
        return [self._row(cell) for cell in self.cells]

    def _row(self, cell: Cell) -> Row:
        """Returns a line of the live table."""
        job, (state, run) = self._jobs.get(cell.number), self.index.state_of(cell)
        planned = cell.config.training.max_iters
        if job is not None and (progress := job.progress()) is not None:
            step, loss, left = progress.step, progress.loss, progress.left
        else:
            step, left = (run.step if run else 0), ""
            loss = "" if run is None or run.best_loss is None else f"{run.best_loss:.4f}"
        shown = state.value
        if job is not None:
            shown = "stopping" if job.why_stopped else "running"
        elif cell.number in self.failed:
            shown = "failed"
        elif cell.number in self._left_out and state is not State.NOT_FINITE:
            shown = "left out"
        return Row(cell.number, cell.name, shown, f"{step}/{planned}", loss, left)


def log_path(cell: Cell) -> Path:
    """Returns where the output of a cell's runs is kept; of equal cells of two sweeps, one file."""
    return Path(cell.config.training.checkpoint_dir) / LOGS / f"{cell.id}.log"


def record_early_stop(run: Run, why: str) -> None:
    """Writes into a run that has ended that it was stopped for good."""
    path, record = run.path / STOPPED_EARLY, {"reason": why, "step": run.step}
    with as_write_error(f"write {path}", run.path):
        atomic_write_text(path, json.dumps(record) + "\n")
