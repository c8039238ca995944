"""Lists runs, sets them side by side, draws their curves and writes a page of them.

    python runs.py list
    python runs.py list --sort best_loss --filter 'training.learning_rate>1e-4'
    python runs.py diff 143022 150101
    python runs.py plot checkpoints --metric eval/val_loss -o losses.png
    python runs.py report 143022 150101 -o report.html

RUN is a run directory, a checkpoint in one, a folder of them, or enough of the name of one to tell
it from the others, in `checkpoints`, else in a folder beside it. A run that goes on, has crashed,
is of another version or is damaged is shown as far as it can be read; standard error says what
could not. Nothing is written into a run directory.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare.differences import (
    MISSING,
    differing,
    differing_data,
    differing_environment,
    differing_without_effect,
    equal_options,
)
from compare.figure import draw
from compare.labels import labels, names, shared_start, short_names
from compare.page import write_report
from compare.paired import At, Paired, compare
from compare.run import (
    Run,
    find_runs,
    read_run,
)
from compare.table import (
    COLUMNS,
    aligned,
    cell,
    filter_runs,
    list_lines,
    shown,
    sort_runs,
    summary,
    width,
)
from config import ConfigError, DataError, UserError
from engine.run_directory.find_runs import FOLDER, find_by_name, runs_in, shown_names
from settings.formatting import format_duration
from settings.terminal import printable

_WIDEST = 40  # a value in the table of differences; --json has all of it
_SORT = "--sort"


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line; leaves with exit code 2 and one line when it is wrong, 0 after help."""
    parser = argparse.ArgumentParser(
        prog="runs.py",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = _command(commands, "list", "one line per run")
    add("runs", nargs="*", metavar="RUN", help=f"default: all in {FOLDER}")
    add(_SORT, metavar="KEY", help="a column, option or metric; -KEY: descending")
    add("--filter", action="append", default=[], metavar="KEY=VALUE", help="also != < <= > >=")
    add("--json", action="store_true", help="everything known of each run, as JSON")
    add = _command(commands, "diff", "settings, results, machine and data that differ")
    add("runs", nargs="+", metavar="RUN", help="two or more; all are compared with the first")
    add("--json", action="store_true", help="the same as JSON")
    add = _command(commands, "plot", "curves as a picture")
    add("runs", nargs="+", metavar="RUN")
    add("--metric", action="append", default=[], metavar="KEY", help="default: the losses")
    add("--x", choices=("step", "tokens", "time"), default="step", help="default: step")
    add("-o", "--output", type=Path, default=Path("runs.png"), metavar="FILE", help=".png or .svg")
    add = _command(commands, "report", "one page with curves, settings and results")
    add("runs", nargs="+", metavar="RUN")
    add("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE")
    arguments = parser.parse_args(_joined(words))
    if arguments.command is None:
        parser.print_help()
        raise SystemExit(0)
    return arguments


def _command(commands: Any, name: str, what: str) -> Any:
    return commands.add_parser(name, help=what, description=what, allow_abbrev=False).add_argument


def _joined(words: Sequence[str]) -> list[str]:
    """`--sort -loss` as one word, else the second looks like an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == _SORT and not word.startswith("--"):
            joined[-1] = f"{_SORT}={word}"
        else:
            joined.append(word)
    return joined


def open_runs(words: Sequence[str], with_records: bool = True) -> list[Run]:
    """The runs that the words mean, and a line on standard error for what cannot be read of them.

    with_records: read metrics.jsonl whole, not only its end. Raises DataError for a word that means
    none.
    """
    runs = []
    for path in find_runs([_path(word) for word in words]):
        try:
            runs.append(read_run(path))
        except DataError as error:  # removed in this moment
            print(error, file=sys.stderr)
    for run, name in zip(runs, names(runs), strict=True):
        more = run.problems_of_records if with_records else ()
        for problem in dict.fromkeys((*run.problems, *more)):
            print(printable(f"{name}: {problem}"), file=sys.stderr)
    return runs


def _path(word: str) -> Path:
    """The word as a path, or the run that it names."""
    path = find_by_name(word)
    if path.exists():
        return path
    runs = runs_in(FOLDER)
    there = f"{FOLDER} holds {shown_names(runs)}" if runs else f"{FOLDER.resolve()} holds no runs"
    raise DataError(f"{word}: no such run, checkpoint or folder; {there}.")


def show_list(arguments: argparse.Namespace) -> None:
    """One line per run, or JSON."""
    runs = open_runs(arguments.runs, with_records=False)
    for condition in arguments.filter:
        runs = filter_runs(runs, condition)
    if arguments.sort:
        runs = sort_runs(runs, arguments.sort)
    if arguments.json:
        _print_json([summary(run) for run in runs])
    elif runs:
        print("\n".join(list_lines(runs)))
    else:
        print("No run meets the conditions.", file=sys.stderr)


def show_differences(arguments: argparse.Namespace) -> None:
    """Tables of what differs and of the results, and each run against the first; or JSON."""
    runs = open_runs(arguments.runs)
    if len(runs) < 2:
        raise ConfigError(
            f"diff compares two runs or more, got {shown_names([run.path for run in runs])}."
        )
    if arguments.json:
        _print_json(_differences(runs))
        return
    apart = ", ".join(differing_without_effect(runs))
    lines = [
        *_shared_name(runs),
        *_section(runs, "Settings that differ", differing(runs)),
        f"({equal_options(runs)} other options are equal)",
        *([f"(without effect on the result, they differ in {apart})"] if apart else []),
        *_section(runs, "Results", _results(runs)),
        *_section(runs, "Machine and software", differing_environment(runs)),
        *_data_lines(runs),
        *_pair_lines(runs),
    ]
    print(printable("\n".join(lines)))


def _results(runs: Sequence[Run]) -> dict[str, list[str]]:
    rows = {"run": short_names(runs)}
    rows |= {column.name: [cell(column, run) for run in runs] for column in COLUMNS[1:]}
    rows["time"] = ["-" if run.seconds is None else format_duration(run.seconds) for run in runs]
    ends = [run.reason for run in runs]
    return rows | ({"reason": [end or "-" for end in ends]} if any(ends) else {})


def _section(runs: Sequence[Run], title: str, rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """A titled table of a column per run, in parts that fit the width; nothing without rows."""
    if not rows:
        return []
    heads = labels(runs)
    columns = [[_cut(value) for value in column] for column in zip(*rows.values(), strict=True)]
    widths = [
        2 + max(map(len, (name, *column))) for name, column in zip(heads, columns, strict=True)
    ]
    left, lines, first = max(map(len, (title, *rows))), list[str](), 0
    while first < len(runs):
        last = first + 1
        while last < len(runs) and left + sum(widths[first : last + 1]) <= width():
            last += 1
        body = [list(row) for row in zip(rows, *columns[first:last], strict=True)]
        table = [[title, *heads[first:last]], *body]
        lines += ["", *aligned(table, [True] * (last - first + 1))]
        first = last
    return lines


def _shared_name(runs: Sequence[Run]) -> list[str]:
    """What the columns are short for."""
    shared, short = shared_start(names(runs)), ", ".join(short_names(runs))
    return textwrap.wrap(f"Runs {shared}...: {short}", width()) if shared else []


def _cut(value: Any) -> str:
    """A value in one cell: its end tells more than its middle."""
    text = value if isinstance(value, str) and value.isprintable() else shown(value)
    half = _WIDEST // 2 - 2
    return text if len(text) <= _WIDEST else f"{text[:half]}...{text[-half:]}"


def _data_lines(runs: Sequence[Run]) -> list[str]:
    data = differing_data(runs)
    ledger = data.pop("ledger", [])
    lines = _section(runs, "Data", data)
    if ledger:
        lines += ["", "Data, as said at the start"]
    for label, told in zip(labels(runs), ledger, strict=bool(ledger)):
        lines += [f"  {label}: {line}" for line in told]
    return lines


def _pair_lines(runs: Sequence[Run]) -> list[str]:
    """Each run against the first, where both were evaluated on the same text."""
    heads = labels(runs)
    rows, reasons = list[list[str]](), list[str]()
    for run, label in zip(runs[1:], heads[1:], strict=True):
        for where, pair in _pairs(runs[0], run):
            if isinstance(pair, Paired):
                rows.append([f"  {label}", *_pair_cells(pair, where)])
            else:
                reasons.append(f"  {label} is not compared: {pair}.")
    title = f"Held-out loss less that of {heads[0]}, nats per token, with its 95 % interval:"
    return [
        *["", title],
        *(aligned(rows, [True] * len(rows[0])) if rows else []),
        *(
            ["(batch by batch of the same held-out text; it says nothing of other seeds)"]
            if rows
            else []
        ),
        *reasons,
    ]


def _pairs(first: Run, run: Run) -> list[tuple[str, Paired | str]]:
    """The newest evaluations; where those are of other steps, at a shared step and at the best."""
    newest = compare(first, run)
    if isinstance(newest, str) or newest.step_a == newest.step_b:
        return [("newest", newest)]
    others: tuple[tuple[str, At], ...] = (("same step", "same"), ("best", "best"))
    pairs = [(where, compare(first, run, at)) for where, at in others]
    told = [(where, pair) for where, pair in pairs if isinstance(pair, Paired) and pair != newest]
    return [("newest", newest), *told]


def _pair_cells(pair: Paired, where: str) -> list[str]:
    steps = f"{pair.step_b:,}" + (f" vs {pair.step_a:,}" if pair.step_a != pair.step_b else "")
    interval = f"{pair.low:+.4f} to {pair.high:+.4f}"
    return [
        f"{pair.difference:+.4f}",
        interval,
        pair.verdict,
        f"({where}: step {steps}, {pair.batches} batches)",
    ]


def _differences(runs: Sequence[Run]) -> dict[str, Any]:
    """The same as plain values; what a run does not tell is left out."""

    def by_run(rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        numbers = range(len(runs))
        return [{k: v[n] for k, v in rows.items() if v[n] is not MISSING} for n in numbers]

    pairs = [compare(runs[0], run) for run in runs[1:]]
    return {
        "runs": [summary(run) | {"config": None} for run in runs],
        "settings": by_run(differing(runs)),
        "without_effect": by_run(differing_without_effect(runs)),
        "equal_options": equal_options(runs),
        "environment": by_run(differing_environment(runs)),
        "data": by_run(differing_data(runs)),
        "against_first": [
            {"not_compared": pair}
            if isinstance(pair, str)
            else asdict(pair) | {"verdict": pair.verdict}
            for pair in pairs
        ],
    }


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    """Infinity, which a damaged file may hold, is null in JSON."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_plot(arguments: argparse.Namespace) -> None:
    """A picture of curves."""
    draw(open_runs(arguments.runs), arguments.output, arguments.metric, arguments.x)
    print(printable(f"Wrote {arguments.output}"))


def show_report(arguments: argparse.Namespace) -> None:
    """A page for a browser."""
    write_report(open_runs(arguments.runs), arguments.output)
    print(printable(f"Wrote {arguments.output}: open it in a browser"))


_COMMANDS = {
    "list": show_list,
    "diff": show_differences,
    "plot": show_plot,
    "report": show_report,
}


def main(words: Sequence[str]) -> int:
    """The exit code of `python runs.py WORDS`."""
    arguments = read_arguments(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows '?'
            stream.reconfigure(errors="replace")
    try:
        _COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):  # ends quietly where `| head` has read enough
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
