"""What `runs.py tree` prints: forks below the runs that they go on from, with what each changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare.labels import names
from compare.reading.json_values import as_count, as_dict, as_str
from compare.reading.run import Run, read_run
from compare.tables.table import COLUMN_BY_NAME, aligned, cell, summary, value_text
from config import DataError
from engine.run_directory.find_runs import is_run, runs_in

_HEADINGS = ["run", "state", "steps", "loss", "changed"]
_CHANGES_SHOWN = 4
_GONE = "gone"


@dataclass(frozen=True)
class Node:
    """A run with its forks; `run` is None for a parent that is no longer there."""

    name: str
    path: Path
    run: Run | None
    forks: list[Node] = field(default_factory=list)


def parent_path(run: Run) -> Path | None:
    """Returns where the parent of a fork is, or was; None for other runs.

    A folder of runs that was moved as a whole still has the parent beside the fork.
    """
    recorded, name = as_str(run.parent.get("path")), as_str(run.parent.get("run"))
    if not recorded or not name:
        return None
    beside = run.path.resolve().with_name(os.path.basename(name))
    return beside if not is_run(Path(recorded)) and is_run(beside) else Path(recorded)


def family(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs, their parents, and all runs beside any of them, by path."""
    found, folders = dict[Path, Run](), set[Path]()
    waiting = [run.path for run in runs]
    while waiting:
        path = waiting.pop().resolve()
        if path in found or not is_run(path):
            continue
        try:
            run = found[path] = read_run(path)
        except DataError:  # removed since it was listed
            continue
        parent = parent_path(run)
        waiting += [] if parent is None else [parent]
        if path.parent not in folders:
            folders.add(path.parent)
            waiting += runs_in(path.parent, depth=1)
    return [found[path] for path in sorted(found)]


def trees(runs: Sequence[Run], named: Sequence[Run] = ()) -> list[Node]:
    """Returns the runs that are no forks and the parents that are gone, with all forks below them.

    named: only the trees that hold one of these.
    """
    known, roots = zip(names(runs), runs, strict=True), list[Node]()
    nodes = {run.path.resolve(): Node(name, run.path, run) for name, run in known}
    for run in runs:
        own, path = nodes[run.path.resolve()], parent_path(run)
        if path is None:
            roots.append(own)
            continue
        if path.resolve() not in nodes:
            nodes[path.resolve()] = Node(as_str(run.parent.get("run")), path, None)
            roots.append(nodes[path.resolve()])
        nodes[path.resolve()].forks.append(own)
    wanted = {run.path.resolve() for run in named}
    return [root for root in roots if not wanted or wanted & set(_paths(root))]


def _paths(node: Node) -> Iterator[Path]:
    yield node.path.resolve()
    for fork in node.forks:
        yield from _paths(fork)


def tree_lines(roots: Sequence[Node]) -> list[str]:
    """Returns a line per run: its steps, its newest held-out loss and what it changed."""
    rows = [row for root in roots for row in _rows(root, "", "")]
    return aligned([_HEADINGS, *rows], [True, True, False, False, True])


def _rows(node: Node, first: str, rest: str) -> Iterator[list[str]]:
    """Yields the rows of a node and its forks. first, rest: what stands before its name, and before
    those of its forks."""
    run = node.run
    if run is None:
        yield [first + node.name, _GONE, "", "", ""]
    else:
        loss = cell(COLUMN_BY_NAME["last_loss"], run)
        begin = as_count(run.parent.get("step")) or 0
        yield [first + node.name, run.state, f"{begin}-{run.step}", loss, _changes(run)]
    for place, fork in enumerate(node.forks, 1):
        last = place == len(node.forks)
        yield from _rows(fork, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _changes(run: Run) -> str:
    changed = changed_options(run)
    shown = [
        f"{key.partition('.')[2] or key} {value_text(then)} -> {value_text(now)}"
        for key, (then, now) in list(changed.items())[:_CHANGES_SHOWN]
    ]
    more = len(changed) - len(shown)
    return ", ".join(shown + ([f"and {more} more"] if more else []))


def changed_options(run: Run) -> dict[str, list[Any]]:
    """Returns option -> [then, now] of the options by which a fork differs from its parent and that
    affect results."""
    pairs = as_dict(run.parent.get("changed"))
    return {k: pair for k, pair in pairs.items() if isinstance(pair, list) and len(pair) == 2}


def tree_values(roots: Sequence[Node]) -> list[dict[str, Any]]:
    """Returns the trees as plain values."""
    return [_values(root) for root in roots]


def _values(node: Node) -> dict[str, Any]:
    own: Mapping[str, Any] = {"name": node.name, "path": str(node.path), "state": _GONE}
    if node.run is not None:
        # The configs, of some 100 options each, are in `runs.py list --json`.
        own = summary(node.run) | {"config": None}
    return {**own, "forks": tree_values(node.forks)}
