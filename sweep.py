"""Trains a model for every cell of a sweep: lists of values, draws from ranges, several seeds.

    python sweep.py sweep.yaml
    python sweep.py sweep.yaml --dry-run        # cells, predicted time and memory
    python sweep.py sweep.yaml --jobs 4         # four runs at once

sweeps/sweep_file.py describes the file; configs/sweeps/learning-rate.yaml is one. Each cell
is an ordinary run of train.py. The same command again continues interrupted runs, repeats failed
ones and leaves finished ones, also those that were started by hand: what is done is read from the
run directories below `training.checkpoint_dir`. Ctrl-C stops all runs after they have saved.

Exit code: 0 if all cells are finished, 1 if some failed, 2 if the file or a cell's config is wrong,
130 or 143 after a signal.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from compare.groups import Spread, group_runs
from compare.reading.run import Run
from compare.report.page import write_report
from compare.table import aligned
from config import STOP_EXIT_CODES, UserError
from settings.cli import exit_on_signals, number_type, run_command
from settings.formatting import format_plural
from settings.terminal import printable
from sweeps.cells import Cell, make_cells
from sweeps.display import Display
from sweeps.processes import LOGS, Start, shares, start_process, visible_gpus
from sweeps.scheduler import Scheduler, StopSignals
from sweeps.state import RunIndex, State
from sweeps.sweep_file import SEED, Sweep, read_sweep


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; exits with 2 if it is wrong, with 0 after help."""
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep, in YAML")
    parser.add_argument("--dry-run", action="store_true", help="train nothing, create nothing")
    jobs = number_type(int, 1, 1024)
    text = "runs at once; default: one per GPU, else one"
    parser.add_argument("--jobs", type=jobs, metavar="N", help=text)
    return parser.parse_args(words)


def sweep(path: Path, jobs: int | None, start: Start = start_process) -> int:
    """Runs a sweep to its end; returns the exit code. start: starts a process of train.py."""
    file = read_sweep(path)
    cells = make_cells(file)
    slots = places(cells, jobs)
    with Display() as display, StopSignals() as stop:
        scheduler = Scheduler(cells, file.stop, slots, display, start)
        display.say(plan_line(scheduler, file, len(slots)))
        scheduler.run(stop)
    if stop.signal is not None:
        command = shlex.join(["python", os.path.relpath(sys.argv[0]), str(path)])
        print(printable(f"Stopped by {stop.signal.name}. To go on: {command}"))
        return STOP_EXIT_CODES[stop.signal]
    return tell_results(scheduler, path)


def places(cells: Sequence[Cell], jobs: int | None) -> list[dict[str, str]]:
    """Returns the environment variables of each of several runs at once."""
    on_cpu = all(cell.config.system.device == "cpu" for cell in cells)
    return shares(jobs, [] if on_cpu else visible_gpus())


def folder_of(cells: Sequence[Cell]) -> Path:
    """Returns the folder of all run directories: no sweep varies it."""
    return Path(cells[0].config.training.checkpoint_dir)


def plan_line(scheduler: Scheduler, file: Sweep, jobs: int) -> str:
    """Returns how many cells there are and what is left to do."""
    cells = scheduler.cells
    states = [scheduler.state_of(cell) for cell in cells]
    done = sum(map(scheduler.is_settled, cells))
    parts = [f"{done} done", f"{states.count(State.INTERRUPTED)} to go on with"]
    parts += [f"{states.count(State.MISSING)} to start"]
    if count := states.count(State.RUNNING):
        parts.append(f"{count} running elsewhere")
    folder = folder_of(cells)
    what = format_plural(len(cells), "cell")
    if done == len(cells):
        return printable(f"{file.path}: all {what} in {folder} are done: nothing to do")
    return printable(f"{file.path}: {what} in {folder}: {', '.join(parts)}; {jobs} at once")


def tell_results(scheduler: Scheduler, path: Path) -> int:
    """Prints the results by setting and writes the report; returns the exit code."""
    cells, index = scheduler.cells, scheduler.index
    runs = {cell.number: index.state_of(cell)[1] for cell in cells}
    found = [run for run in runs.values() if run is not None]
    names = {run.path: cell.group_name for cell in cells if (run := runs[cell.number])}
    for line in result_lines(found, names):
        print(line)
    page = folder_of(cells) / LOGS / f"{path.stem}.html"
    if found and (scheduler.started or not page.exists()):
        try:
            page.parent.mkdir(exist_ok=True)
            write_report(found, page)
        except (UserError, OSError) as error:  # the runs are there all the same
            print(error, file=sys.stderr)
    if page.exists():
        print(printable(f"Report: {page}"))
    if scheduler.failed:
        print(f"Failed: {format_plural(len(scheduler.failed), 'cell')}; run the command again")
    return 1 if scheduler.failed else 0


def result_lines(runs: Sequence[Run], names: dict[Path, str]) -> list[str]:
    """Returns a table of the best held-out loss of each setting, over its seeds, best first."""
    rows = list[tuple[float, list[str]]]()
    for group in group_runs(runs, [SEED]):
        losses = [run.best_loss for run in group.runs if run.best_loss is not None]
        states = sorted({run.state for run in group.runs} - {"done"})
        spread = Spread.of(losses)
        if spread is not None:
            mean, deviation = f"{spread.mean:.4f}", f"{spread.deviation:.4f}"
            deviation = "" if spread.count == 1 else deviation
            row = [names[group.runs[0].path], str(spread.count), mean, deviation, ", ".join(states)]
            rows.append((spread.mean, row))
    rows.sort(key=lambda row: row[0])
    heading = ["settings", "n", "best loss", "sd", ""]
    lines = aligned([heading, *(row for _, row in rows)], [True, False, False, False, True])
    return lines if rows else []


def dry_run(path: Path, jobs: int | None) -> int:
    """Prints the cells of a sweep with their costs; trains nothing, creates nothing."""
    from sweeps.costs import cost_lines  # imports torch, which builds the models

    file = read_sweep(path)
    cells = make_cells(file)
    index = RunIndex(folder_of(cells), cells)
    index.refresh()
    states = [index.state_of(cell)[0].value for cell in cells]
    for line in cost_lines(cells, states, len(places(cells, jobs))):
        print(line, flush=True)
    return 0


def main(words: Sequence[str]) -> int:
    """Runs `python sweep.py WORDS`; returns its exit code."""
    arguments = read_arguments(words)
    command = dry_run if arguments.dry_run else sweep
    codes = list[int]()
    return run_command(lambda: codes.append(command(arguments.file, arguments.jobs))) or codes[0]


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
