"""Lists runs, compares them, plots their curves and writes a page about them.

    python runs.py list
    python runs.py list --sort best_loss --filter 'training.learning_rate>1e-4'
    python runs.py diff 143022 150101
    python runs.py plot checkpoints --metric eval/val_loss -o losses.png
    python runs.py report 143022 150101 -o report.html
    python runs.py tree

RUN is a run directory, a checkpoint in one, a folder of them, or enough of the name of one to tell
it from the others, in `checkpoints`, else in a folder beside it. A run that is still training, has
crashed, was written by another version or is damaged is shown as far as it can be read; standard
error says what could not be read. Nothing is written into a run directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compare.diff import diff_lines, diff_values
from compare.figure import draw
from compare.labels import names
from compare.reading.json_values import finite
from compare.reading.run import Run, find_runs, path_of, read_run
from compare.reading.select import filter_runs, sort_runs
from compare.report.page import write_report
from compare.table import list_lines, summary
from compare.tree import family, parent_path, tree_lines, tree_values, trees
from config import ConfigError, DataError
from engine.run_directory.find_runs import FOLDER, shown_names
from settings.cli import exit_on_signals, run_command
from settings.terminal import printable

_SORT = "--sort"


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; exits with 2 if it is wrong, with 0 after help."""
    parser = argparse.ArgumentParser(
        prog="runs.py",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = _add_command(commands, "list", show_list, "one line per run")
    add("runs", nargs="*", metavar="RUN", help=f"default: all in {FOLDER}")
    add(_SORT, metavar="KEY", help="a column, option or metric; -KEY: descending")
    add("--filter", action="append", default=[], metavar="KEY=VALUE", help="also != < <= > >=")
    add("--json", action="store_true", help="everything known of each run, as JSON")
    add = _add_command(
        commands, "diff", show_differences, "settings, results, machine and data that differ"
    )
    add("runs", nargs="+", metavar="RUN", help="all with the first; a fork alone: with its parent")
    add("--json", action="store_true", help="the same as JSON")
    add = _add_command(commands, "plot", show_plot, "curves as a picture")
    add("runs", nargs="+", metavar="RUN")
    add("--metric", action="append", default=[], metavar="KEY", help="default: the losses")
    add("--x", choices=("step", "tokens", "time"), default="step", help="default: step")
    add("-o", "--output", type=Path, default=Path("runs.png"), metavar="FILE", help=".png or .svg")
    add = _add_command(
        commands, "report", show_report, "one page with curves, settings and results"
    )
    add("runs", nargs="+", metavar="RUN")
    add("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE")
    add = _add_command(commands, "tree", show_tree, "forks below the runs they go on from")
    add("runs", nargs="*", metavar="RUN", help=f"whose families; default: all in {FOLDER}")
    add("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args(_joined(words))
    if arguments.command is None:
        parser.print_help()
        raise SystemExit(0)
    return arguments


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str
) -> Any:
    """Adds a command that calls `run`; returns the function that adds an argument to it."""
    command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    command.set_defaults(run=run)
    return command.add_argument


def _joined(words: Sequence[str]) -> list[str]:
    """Joins `--sort -loss` to one word: argparse takes `-loss` for an option of its own."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == _SORT and not word.startswith("--"):
            joined[-1] = f"{_SORT}={word}"
        else:
            joined.append(word)
    return joined


def open_runs(words: Sequence[str], with_records: bool = True) -> list[Run]:
    """Returns the runs that the words mean; prints to standard error what cannot be read of them.

    with_records: read metrics.jsonl whole, not only its end. Raises DataError for a word that means
    no run.
    """
    runs = []
    for path in find_runs([path_of(word) for word in words]):
        try:
            runs.append(read_run(path))
        except DataError as error:  # removed since `find_runs` listed it
            print(error, file=sys.stderr)
    for run, name in zip(runs, names(runs), strict=True):
        more = run.record_problems if with_records else ()
        for problem in dict.fromkeys((*run.problems, *more)):
            print(printable(f"{name}: {problem}"), file=sys.stderr)
    return runs


def show_list(arguments: argparse.Namespace) -> None:
    """Prints one line per run, or JSON."""
    runs = open_runs(arguments.runs, with_records=False)
    for condition in arguments.filter:
        runs = filter_runs(runs, condition)
    if arguments.sort:
        runs = sort_runs(runs, arguments.sort)
    if arguments.json:
        _print_json([summary(run) for run in runs])
    elif runs:
        print("\n".join(list_lines(runs, (arguments.sort or "").removeprefix("-"))))
    else:
        print("No run meets the conditions.", file=sys.stderr)


def show_differences(arguments: argparse.Namespace) -> None:
    """Prints tables of what differs and of the results, or JSON."""
    runs = open_runs(arguments.runs)
    if len(runs) == 1 and (parent := parent_path(runs[0])) is not None:
        runs = [*open_runs([str(parent)]), *runs]
    if len(runs) < 2:
        raise ConfigError(
            f"diff compares two runs or more, got {shown_names([run.path for run in runs])}."
        )
    if arguments.json:
        _print_json(diff_values(runs))
    else:
        print(printable("\n".join(diff_lines(runs))))


def show_plot(arguments: argparse.Namespace) -> None:
    """Writes a picture of curves."""
    draw(open_runs(arguments.runs), arguments.output, arguments.metric, arguments.x)
    print(printable(f"Wrote {arguments.output}"))


def show_report(arguments: argparse.Namespace) -> None:
    """Writes a page for a browser."""
    write_report(open_runs(arguments.runs), arguments.output)
    print(printable(f"Wrote {arguments.output}: open it in a browser"))


def show_tree(arguments: argparse.Namespace) -> None:
    """Prints families of runs, or JSON."""
    named = open_runs(arguments.runs, with_records=False)
    roots = trees(family(named) if arguments.runs else named, named)
    if arguments.json:
        _print_json(tree_values(roots))
    else:
        print("\n".join(tree_lines(roots)))


def _print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=2))


def main(words: Sequence[str]) -> int:
    """Runs `python runs.py WORDS`; returns its exit code."""
    arguments = read_arguments(words)
    return run_command(lambda: arguments.run(arguments))


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
