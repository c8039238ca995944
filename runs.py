"""Lists runs, compares them, plots their curves and writes a page about them.

    python runs.py list
    python runs.py list --sort best_loss --filter 'training.learning_rate>1e-4'
    python runs.py diff 143022 150101
    python runs.py plot checkpoints --metric eval/val_loss -o losses.png
    python runs.py plot checkpoints --over seed
    python runs.py report 143022 150101 -o report.html
    python runs.py test 143022 150101
    python runs.py tree
    python runs.py batch 143022 1700 --worst 3
    python runs.py seen 143022 "to be or not to be"
    python runs.py bisect 143022 150101
    python runs.py export checkpoints -o runs.parquet

RUN is a run directory, a checkpoint in one, a folder of them, or enough of the name of one to tell
it from the others, in `checkpoints`, else in a folder beside it. A run that is still training, has
crashed, was written by another version or is damaged is shown as far as it can be read; standard
error says what could not be read. Nothing is written into a run directory.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare.groups import find_group, group_labels, group_runs, list_of, option_keys
from compare.labels import names
from compare.plot.curves import AXES
from compare.reading.json_values import finite
from compare.reading.run import Run, find_runs, path_of, read_run
from compare.tables.select import filter_runs, sort_groups, sort_runs
from compare.tables.table import group_lines, group_summary, list_lines, summary
from compare.tables.tree import family, parent_path, tree_lines, tree_values, trees
from config import ConfigError, DataError
from engine.run_directory.find_runs import FOLDER, shown_names
from settings.cli import exit_on_signals, run_command
from settings.terminal import printable

# What one command alone needs is imported in its show_ function: `list` answers in 0.1 s.
_SORT = "--sort"
_NONE = "No run meets the conditions."
_FILTER: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "KEY=VALUE",
    "help": "also != < <= > >=",
}
_OVER: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "KEY",
    "help": "runs that differ in this option alone, such as seed, become one",
}


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; exits with 2 if it is wrong, with 0 after help."""
    parser = argparse.ArgumentParser(
        prog="runs.py",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_comparisons(commands)
    _add_single_runs(commands)
    arguments = parser.parse_args(_joined(words))
    if arguments.command is None:
        parser.print_help()
        raise SystemExit(0)
    return arguments


def _add_comparisons(commands: Any) -> None:
    """Adds the commands that set runs side by side."""
    add = _add_command(commands, "list", show_list, "one line per run")
    add("runs", nargs="*", metavar="RUN", help=f"default: all in {FOLDER}")
    add(_SORT, metavar="KEY", help="a column, option or metric; -KEY: descending")
    add("--filter", **_FILTER)
    add("--over", **_OVER)
    add = _add_command(
        commands, "diff", show_differences, "settings, results, machine and data that differ"
    )
    add("runs", nargs="+", metavar="RUN", help="all with the first; a fork alone: with its parent")
    add("--over", **_OVER)
    add = _add_command(commands, "plot", show_plot, "curves as a picture")
    add("runs", nargs="+", metavar="RUN")
    add("--metric", action="append", default=[], metavar="KEY", help="default: the losses")
    add("--x", choices=tuple(AXES), default="step", help="default: step")
    add("--over", **_OVER)
    add("-o", "--output", type=Path, default=Path("runs.png"), metavar="FILE", help=".png or .svg")
    add = _add_command(
        commands, "report", show_report, "one page with curves, settings and results"
    )
    add("runs", nargs="+", metavar="RUN")
    add("--over", **_OVER | {"help": "what runs of a group differ in; default: seed"})
    add("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE")
    add = _add_command(
        commands, "test", show_test, "whether B is better than A, for other seeds or other text"
    )
    what = "A and B: each a run, which stands for its repeats beside it, or a folder of repeats"
    add("runs", nargs="+", metavar="RUN", help=what)
    add("--over", **_OVER | {"help": "what repeats differ in; default: seed"})
    add("--metric", metavar="KEY", help="default: eval/val_loss; eval/best_loss: the best so far")
    add("--filter", **_FILTER)
    add("--goal", metavar="EXPR", help="'eval/val_loss<=1.30': the first step that reaches it")
    add("-p", type=_probability, metavar="P", help="with which --goal is tested; default: 0.01")


def _add_single_runs(commands: Any) -> None:
    """Adds the commands about where runs come from and what is in them."""
    add = _add_command(commands, "tree", show_tree, "forks below the runs they go on from")
    add("runs", nargs="*", metavar="RUN", help=f"whose families; default: all in {FOLDER}")
    add = _add_command(commands, "batch", show_batch, "the documents that a step was trained on")
    add("word", metavar="RUN")
    add("step", type=int, metavar="STEP", help="counted from 1")
    add("--no-loss", action="store_true", help="without each sequence's loss, which needs a replay")
    add("--worst", type=int, metavar="N", help="only the N sequences of the highest loss")
    add("--full", action="store_true", help="whole texts")
    add = _add_command(commands, "seen", show_seen, "at which steps a run read a text")
    add("word", metavar="RUN")
    add("text", metavar="TEXT")
    add("--full", action="store_true", help="every time, not only the first ones")
    add = _add_command(
        commands, "bisect", show_bisect, "where two runs that should agree part, and why"
    )
    add("runs", nargs=2, metavar="RUN", help="exit code 1 if they part, 0 if they agree")
    add("--steps", type=int, default=500, metavar="N", help="replayed at most; default: 500")
    add = _add_command(
        commands, "export", show_export, "all records with their configs, as a table"
    )
    add("runs", nargs="+", metavar="RUN")
    what = ".csv, .parquet or .jsonl"
    add("-o", "--output", type=Path, default=Path("runs.csv"), metavar="FILE", help=what)
    add("--metric", action="append", default=[], metavar="KEY", help="default: all")


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str
) -> Any:
    """Adds a command that calls `run`; returns the function that adds an argument to it."""
    command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="plain values, with all their digits")
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


def _probability(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {word!r}")
    return value


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
    _print_problems(runs, with_records)
    return runs


def _print_problems(runs: Sequence[Run], with_records: bool = True) -> None:
    for run, name in zip(runs, names(runs), strict=True):
        more = run.record_problems if with_records else ()
        for problem in dict.fromkeys((*run.problems, *more)):
            print(printable(f"{name}: {problem}"), file=sys.stderr)


def open_one(word: str) -> Run:
    """Returns the one run that the word means; raises ConfigError where it means several."""
    runs = open_runs([word])
    if len(runs) != 1:
        raise ConfigError(f"{word}: one run is meant, and it holds {len(runs)}.")
    return runs[0]


def show_list(arguments: argparse.Namespace) -> None:
    """Prints one line per run or group, or JSON."""
    runs = open_runs(arguments.runs, with_records=False)
    for condition in arguments.filter:
        runs = filter_runs(runs, condition)
    sorted_by = (arguments.sort or "").removeprefix("-")
    if not runs:
        _print(arguments, list, list)
        print(_NONE, file=sys.stderr)
    elif arguments.over:
        groups = group_runs(runs, option_keys(arguments.over))
        groups = sort_groups(groups, arguments.sort) if arguments.sort else groups
        labelled = list(zip(groups, group_labels(groups), strict=True))
        values = [group_summary(*each) for each in labelled] if arguments.json else []
        _print(arguments, lambda: values, lambda: group_lines(groups, sorted_by))
    else:
        runs = sort_runs(runs, arguments.sort) if arguments.sort else runs
        _print(arguments, lambda: [*map(summary, runs)], lambda: list_lines(runs, sorted_by))


def show_differences(arguments: argparse.Namespace) -> None:
    """Prints tables of what differs and of the results, or JSON."""
    from compare.tables.diff import diff_lines, diff_values, group_diff_lines, group_diff_values

    runs = open_runs(arguments.runs)
    if len(runs) == 1 and (parent := parent_path(runs[0])) is not None:
        runs = [*open_runs([str(parent)]), *runs]
    if len(runs) < 2:
        raise ConfigError(
            f"diff compares two runs or more, got {shown_names([run.path for run in runs])}."
        )
    if not arguments.over:
        _print(arguments, lambda: diff_values(runs), lambda: diff_lines(runs))
        return
    groups = group_runs(runs, option_keys(arguments.over))
    if len(groups) == 1:
        raise ConfigError(
            f"diff compares two groups or more; all these runs differ in "
            f"{list_of(groups[0].over)} alone."
        )
    _print(arguments, lambda: group_diff_values(groups), lambda: group_diff_lines(groups))


def show_plot(arguments: argparse.Namespace) -> None:
    """Writes a picture of curves."""
    from compare.plot.figure import draw

    runs, output = open_runs(arguments.runs), arguments.output
    groups = group_runs(runs, option_keys(arguments.over)) if arguments.over else []
    curves = draw(runs, output, arguments.metric, arguments.x, groups)
    values = {"output": str(output), "x": arguments.x, "curves": curves}
    _print(arguments, lambda: values, lambda: [f"Wrote {output}"])


def show_report(arguments: argparse.Namespace) -> None:
    """Writes a page for a browser, or prints what it would hold."""
    from compare.report.content import report
    from compare.report.page import write_report

    over, runs = option_keys(arguments.over), open_runs(arguments.runs)
    if not arguments.json:
        write_report(runs, arguments.output, over)
    wrote = f"Wrote {arguments.output}: open it in a browser"
    _print(arguments, lambda: report(runs, over), lambda: [wrote])


def show_test(arguments: argparse.Namespace) -> None:
    """Prints whether one experiment is better than another, or when one has reached a goal."""
    from compare.statistics.answer import answer_lines, answer_values
    from compare.statistics.comparison import METRIC
    from compare.statistics.goal import goal_lines, goal_values, parse_goal

    words, over = arguments.runs, option_keys(arguments.over or ["seed"])
    if arguments.goal is None and (len(words) != 2 or arguments.p is not None):
        raise ConfigError("test takes two runs, A and B; or with --goal, runs and -p.")
    if arguments.goal is not None and arguments.metric is not None:
        raise ConfigError("--goal names its metric: leave out --metric.")
    groups = [find_group(path_of(word), over) for word in words]
    for condition in arguments.filter:
        groups = [replace(own, runs=tuple(filter_runs(own.runs, condition))) for own in groups]
    if not all(group.runs for group in groups):
        raise ConfigError(f"--filter {' '.join(arguments.filter)}: leaves no run of a side.")
    for group in groups:
        _print_problems(group.runs)
    if arguments.goal is not None:
        asked = groups, parse_goal(arguments.goal), arguments.p or 0.01
        _print(arguments, lambda: goal_values(*asked), lambda: goal_lines(*asked))
    else:
        (a, b), metric = groups, arguments.metric or METRIC
        _print(arguments, lambda: answer_values(a, b, metric), lambda: answer_lines(a, b, metric))


def show_tree(arguments: argparse.Namespace) -> None:
    """Prints families of runs, or JSON."""
    named = open_runs(arguments.runs, with_records=False)
    nodes = trees(family(named), named)
    _print(arguments, lambda: tree_values(nodes), lambda: tree_lines(nodes))


def show_batch(arguments: argparse.Namespace) -> None:
    """Prints the documents of a step, with losses unless they are not asked for; or JSON."""
    run = open_one(arguments.word)
    if not 1 <= arguments.step <= run.step:
        raise ConfigError(f"{run.name} has steps 1 to {run.step}, not {arguments.step}.")
    if arguments.no_loss and arguments.worst is not None:
        raise ConfigError("--worst orders sequences by their loss, and --no-loss leaves it out.")
    if arguments.worst is not None and arguments.worst < 1:
        raise ConfigError(f"--worst {arguments.worst}: give the number of sequences to show.")
    # Imported after the checks: torch takes seconds.
    from engine.replay.batch import batch_of, with_losses
    from train import train

    report = batch_of(run.path, arguments.step, run.records)
    if not arguments.no_loss:
        report = with_losses(report, run.path, train)
    if arguments.worst is not None:
        report = report.worst(arguments.worst)
    _print(arguments, report.to_json, lambda: report.lines(arguments.full))


def show_seen(arguments: argparse.Namespace) -> None:
    """Prints at which steps a run read a text, or JSON."""
    run = open_one(arguments.word)
    from engine.replay.seen import seen

    found = seen(run.path, arguments.text, run.step)
    _print(arguments, found.to_json, lambda: found.lines(arguments.full))


def show_bisect(arguments: argparse.Namespace) -> None:
    """Prints where two runs part and why, or JSON; leaves with 1 if they do, as diff does."""
    runs = [run for word in arguments.runs for run in open_runs([word])]
    if len(runs) != 2:
        raise ConfigError(f"bisect compares two runs, got {shown_names([r.path for r in runs])}.")
    from engine.replay.bisect import bisect
    from train import train

    found = bisect(runs[0], runs[1], arguments.steps, train)
    _print(arguments, found.values, lambda: [*found.evidence, found.conclusion])
    if not found.agree:
        raise SystemExit(1)


def show_export(arguments: argparse.Namespace) -> None:
    """Writes the records of runs as a table."""
    from compare.export import export

    runs, output = open_runs(arguments.runs, with_records=False), arguments.output
    problems = list[str]()
    rows = export(runs, output, problems, arguments.metric)
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    values = {"output": str(output), "rows": rows, "runs": [str(run.path) for run in runs]}
    _print(
        arguments, lambda: values, lambda: [f"Wrote {output}: {rows:,} rows of {len(runs)} runs"]
    )


def _print(
    arguments: argparse.Namespace, values: Callable[[], Any], lines: Callable[[], Sequence[str]]
) -> None:
    """Prints an answer as JSON or as lines, whichever is asked for; the other is not computed."""
    if arguments.json:
        print(json.dumps(finite(values()), indent=2))
    else:
        for line in lines():
            print(printable(line))


def main(words: Sequence[str]) -> int:
    """Runs `python runs.py WORDS`; returns its exit code."""
    arguments = read_arguments(words)
    return run_command(lambda: arguments.run(arguments))


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
