"""Starts the runs of a sweep, some at once, looks after them, and stops them.

Whatever happens, a kill of this process included, the next start finds the state of each cell in
the run directories. Only that a cell failed twice is forgotten: it is tried again.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from compare.reading.run import STOPPED_EARLY, Run
from engine.signals import StopRequest
from files.atomic import atomic_write_text
from files.write_errors import as_write_error
from settings.formatting import format_duration, format_plural
from sweeps.cells import Cell
from sweeps.display import Display
from sweeps.processes import CellJob, Start, last_lines, log_path, start_job
from sweeps.state import OPEN, RunIndex, State
from sweeps.stopping import Member, hopeless, read_curve
from sweeps.sweep_file import StopRule

ATTEMPTS = 2
POLL_S = 0.1
_LOOK_S = 0.5
_LOOK_SHARE = 20
"""Run directories are looked at again after `_LOOK_S`, or after so many times as long as that took:
of thousands, less often."""
_LINES = 6  # of the log of a failed run


class Scheduler:
    """Brings all cells to their end.

    Args:
        index: the runs that there are.
        rule: when runs are stopped early; None for never.
        shares: the environment variables of each of several runs at once.
        start: starts a process.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        index: RunIndex,
        rule: StopRule | None,
        shares: Sequence[Mapping[str, str]],
        display: Display,
        start: Start,
    ) -> None:
        self._cells, self._index, self._rule, self._display = cells, index, rule, display
        self._free, self._start = list(shares), start
        self.started = 0
        """Runs that were started here."""
        self.failed = set[int]()
        """Numbers of cells that are given up."""
        self._failures = Counter[int]()
        self._jobs = dict[int, CellJob]()
        self._elsewhere = set[int]()  # cells of which was said that they run elsewhere
        self._groups = defaultdict[str, list[Cell]](list)
        for cell in cells if rule else ():
            self._groups[cell.group].append(cell)
        self._next_look = 0.0

    def run(self, stop: StopRequest) -> None:
        """Returns once nothing is left to do, or all runs have ended after a signal."""
        told = False
        while self._jobs or self._left():
            self._end_jobs(stop)
            if stop.signal is None:
                self._look()
            elif not self._jobs:
                return
            elif not told:
                told = True
                self._display.say(f"Waiting for {format_plural(len(self._jobs), 'run')} to save.")
                for job in self._jobs.values():
                    job.send(stop.signal)
            self._display.show(self._rows)
            time.sleep(POLL_S)

    # ---- starting

    def _look(self) -> None:
        """Reads the run directories, stops hopeless runs, and starts others in their place."""
        if time.monotonic() < self._next_look:
            return
        began = time.monotonic()
        self._index.refresh()
        self._next_look = began + max(_LOOK_S, _LOOK_SHARE * (time.monotonic() - began))
        if self._rule is not None:
            self._stop_hopeless(self._rule)
        # Other seeds of a run that is being stopped are left out once it has ended.
        stopping = [job.cell.group for job in self._jobs.values() if job.why_stopped]
        for cell in self._left():
            if self._free and (not stopping or cell.group not in stopping):
                self._begin(cell)

    def _left(self) -> list[Cell]:
        taken = self.failed | self._jobs.keys()
        open_cells = (cell for cell in self._cells if self._index.state_of(cell) in OPEN)
        return [cell for cell in open_cells if cell.number not in taken]

    def _begin(self, cell: Cell) -> None:
        """Starts a cell's run or goes on with it, unless it runs elsewhere."""
        job = None
        if self._index.state_of(cell) is not State.RUNNING:
            resume = self._index.checkpoint_of(cell)
            words = [] if resume is None else [f"resume_from_checkpoint={resume.run_dir}"]
            job = start_job(cell, words, self._free[0], self._start)
        if job is not None:
            del self._free[0]
            self._jobs[cell.number] = job
            self.started += 1
            how = f"goes on from step {resume.step} of {resume.run_dir}" if resume else "started"
            self._tell(cell, f"{how}, log in {log_path(cell)}")
        elif cell.number not in self._elsewhere:
            self._elsewhere.add(cell.number)
            run = self._index.run_of(cell)
            where = f" ({run.path})" if run else ""
            self._tell(cell, f"runs already, started elsewhere{where}: waiting for its end")

    # ---- ending

    def _end_jobs(self, stop: StopRequest) -> None:
        """Says of each process that has ended how it did, and counts failures."""
        ended = [job for job in self._jobs.values() if job.process.poll() is not None]
        if not ended:
            return
        self._index.refresh()
        for job in ended:
            del self._jobs[job.cell.number]
            self._free.append(job.share)
            self._settle(job, stop.signal is not None)
        self._next_look = 0.0

    def _settle(self, job: CellJob, stopping: bool) -> None:
        cell = job.cell
        state, run = self._index.state_of(cell), self._index.run_of(cell)
        where = f" ({run.path})" if run else ""
        if state is State.FINISHED and run is not None:
            loss = "" if run.best_loss is None else f", best held-out loss {run.best_loss:.4f}"
            took = format_duration(time.monotonic() - job.began_s)
            self._tell(cell, f"finished in {took}{loss}{where}")
        elif job.why_stopped and run is not None and run.state == "stopped":
            _record_early_stop(run, job.why_stopped)
            self._index.refresh()
        elif state is State.NOT_FINITE:
            self._tell(cell, f"its loss or gradients were not finite: not repeated{where}")
        elif stopping:
            self._tell(cell, f"stopped at step {run.step}" if run else "stopped, nothing to save")
        else:
            self._count_failure(job)

    def _count_failure(self, job: CellJob) -> None:
        cell, code = job.cell, job.process.returncode
        self._failures[cell.number] += 1
        # A run that ended well, but is not that of its cell, would do so again.
        if code == 0 or self._failures[cell.number] == ATTEMPTS:
            self.failed.add(cell.number)
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        what = "given up" if cell.number in self.failed else "tries again"
        self._tell(cell, f"failed ({how}), {what}; the end of {log_path(cell)}:")
        for line in last_lines(log_path(cell))[-_LINES:]:
            self._display.say(f"    {line}")

    def _stop_hopeless(self, rule: StopRule) -> None:
        members = {name: self._members(own) for name, own in self._groups.items()}
        for name, why in hopeless(rule, members).items():
            for cell in self._groups[name]:
                job = self._jobs.get(cell.number)
                if job is None and self._index.state_of(cell) in (State.INTERRUPTED, State.WAITING):
                    self._tell(cell, "left out: its setting is stopped early with another seed")
                elif job is not None:
                    job.why_stopped = f"sweep: {why}"
                    self._tell(cell, f"stopped early, {why}")
                    job.send(signal.SIGTERM)

    def _members(self, group: Sequence[Cell]) -> list[Member]:
        found = []
        for cell in group:
            job, run = self._jobs.get(cell.number), self._index.run_of(cell)
            if run is not None:
                planned = run.planned_steps or cell.config.training.max_iters
                # One that is only starting would not note the signal, and end without saving.
                running = job is not None and run.state == "running" and not job.why_stopped
                found.append(Member(read_curve(run.path), planned, running))
        return found

    # ---- saying

    def _tell(self, cell: Cell, text: str) -> None:
        self._display.say(f"Cell {cell.number}/{len(self._cells)} ({cell.name}): {text}")

    def _rows(self) -> list[list[str]]:
        return [self._row(cell) for cell in self._cells]

    def _row(self, cell: Cell) -> list[str]:
        """Returns a line of the live table."""
        job, run = self._jobs.get(cell.number), self._index.run_of(cell)
        state, step, loss, left = self._index.state_of(cell).value, 0, "", ""
        planned = cell.config.training.max_iters
        if run is not None:
            step, planned = run.step, run.planned_steps or planned
            loss = "" if run.best_loss is None else f"{run.best_loss:.4f}"
            if job is not None and run.seconds is not None and step:
                left = format_duration((planned - step) * run.seconds / step)
        if job is not None:
            state = "stopping" if job.why_stopped else "running"
        elif cell.number in self.failed:
            state = "failed"
        return [str(cell.number), state, f"{step}/{planned}", loss, left, cell.name]


def _record_early_stop(run: Run, why: str) -> None:
    """Writes into a run that has ended that it was stopped for good."""
    path, record = run.path / STOPPED_EARLY, {"reason": why, "step": run.step}
    with as_write_error(f"write {path}", run.path):
        atomic_write_text(path, json.dumps(record) + "\n")
