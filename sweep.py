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
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from compare.groups import Spread
from compare.report.page import write_report
from compare.tables.table import aligned
from config import UserError
from engine.signals import StopRequest
from settings.cli import exit_on_signals, number_type, run_command
from settings.formatting import format_plural
from settings.terminal import printable
from sweeps.cells import Cell, make_cells
from sweeps.display import Display
from sweeps.processes import LOGS, Start, shares, start_process, visible_gpus
from sweeps.scheduler import Scheduler
from sweeps.state import OPEN, RunIndex, State
from sweeps.sweep_file import read_sweep

_MOST_ROWS = 20  # of the results


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
    index = RunIndex(folder_of(cells), cells, file.stop is not None)
    slots = places(cells, jobs)
    print(printable(plan_line(cells, index, path, len(slots))), flush=True)
    display = Display()
    scheduler = Scheduler(cells, index, file.stop, slots, display, start)
    with StopRequest("stopping all runs", "the runs still save and end") as stop:
        stop.training_started = True  # a signal is noted, and nothing ends at once
        scheduler.run(stop)
    display.clear()
    if stop:
        command = shlex.join(["python", os.path.relpath(sys.argv[0]), str(path)])
        command += "" if jobs is None else f" --jobs {jobs}"
        print(printable(f"Stopped by {stop.name}. To go on: {command}"))
        return stop.exit_code
    for line in result_lines(cells, index):
        print(printable(line))
    report(cells, index, path, bool(scheduler.started))
    if scheduler.failed:
        print(f"Failed: {format_plural(len(scheduler.failed), 'cell')}; run the command again")
    return 1 if scheduler.failed else 0


def places(cells: Sequence[Cell], jobs: int | None) -> list[dict[str, str]]:
    """Returns the environment variables of each of several runs at once."""
    on_cpu = all(cell.config.system.device == "cpu" for cell in cells)
    return shares(jobs, [] if on_cpu else visible_gpus())


def folder_of(cells: Sequence[Cell]) -> Path:
    """Returns the folder of all run directories: no sweep varies it."""
    return Path(cells[0].config.training.checkpoint_dir)


def plan_line(cells: Sequence[Cell], index: RunIndex, path: Path, jobs: int) -> str:
    """Returns how many cells there are and what is left to do."""
    counts = Counter(map(index.state_of, cells))
    what = f"{path}: {format_plural(len(cells), 'cell')} in {folder_of(cells)}"
    done = ", ".join(f"{n} {state.value}" for state, n in counts.items() if state not in OPEN)
    if not any(counts[state] for state in OPEN):
        return f"{what}: {done}; nothing to do"
    todo = f"{counts[State.INTERRUPTED]} to go on with, {counts[State.WAITING]} to start"
    parts = [done or "none finished", todo]
    parts += [f"{counts[State.RUNNING]} running elsewhere"] if counts[State.RUNNING] else []
    return f"{what}: {', '.join(parts)}; {jobs} at once"


def result_lines(cells: Sequence[Cell], index: RunIndex) -> list[str]:
    """Returns a table of the best held-out loss of each setting, over its seeds, best first."""
    groups = defaultdict[str, list[Cell]](list)
    for cell in cells:
        groups[cell.group_name].append(cell)
    rows = list[tuple[float, list[str]]]()
    for name, own in groups.items():
        runs = [run for cell in own if (run := index.run_of(cell)) is not None]
        spread = Spread.of([run.best_loss for run in runs if run.best_loss is not None])
        if spread is not None:
            states = {index.state_of(cell) for cell in own} - {State.FINISHED}
            deviation = "" if spread.count == 1 else f"{spread.deviation:.4f}"
            unfinished = ", ".join(sorted(state.value for state in states))
            row = [name, str(spread.count), f"{spread.mean:.4f}", deviation, unfinished]
            rows.append((spread.mean, row))
    if not rows:
        return []
    rows.sort(key=lambda row: row[0])
    heading = ["settings", "n", "best loss", "sd", ""]
    shown = [heading, *(row for _, row in rows[:_MOST_ROWS])]
    more = [f"... and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []
    return aligned(shown, [True, False, False, False, True]) + more


def report(cells: Sequence[Cell], index: RunIndex, path: Path, changed: bool) -> None:
    """Writes the report on the runs if they changed or there is none, and says where it is."""
    runs = [run for cell in cells if (run := index.run_of(cell)) is not None]
    page = folder_of(cells) / LOGS / f"{path.stem}.html"
    if runs and (changed or not page.exists()):
        try:
            page.parent.mkdir(exist_ok=True)
            write_report(runs, page)
        except (UserError, OSError) as error:  # the runs are there all the same
            print(printable(str(error)), file=sys.stderr)
            return
    if page.exists():
        print(printable(f"Report: {page}"))


def dry_run(path: Path, jobs: int | None) -> int:
    """Prints the cells of a sweep with their costs; trains nothing, creates nothing."""
    from sweeps.costs import cost_lines  # imports torch, which builds the models

    file = read_sweep(path)
    cells = make_cells(file)
    index = RunIndex(folder_of(cells), cells, file.stop is not None)
    for line in cost_lines(cells, [*map(index.state_of, cells)], len(places(cells, jobs))):
        print(printable(line), flush=True)
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
