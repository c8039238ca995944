"""What `runs.py tree` prints: forks below the runs that they go on from, with what each changed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.labels import names
from compare.reading.json_values import as_count, as_dict, as_path
from compare.reading.run import Run, read_run
from compare.tables.table import COLUMN_BY_NAME, aligned, cell, summary, value_text
from config import DataError
from engine.run_directory.find_runs import is_run, runs_in

_HEADINGS = ["run", "state", "steps", "loss", "changed"]
_CHANGES_SHOWN = 4
_GONE = "gone"


@dataclass(frozen=True)
class Node:
    """A run in a tree of forks, or a parent that is no longer there."""

    name: str
    path: Path
    run: Run | None
    """None: it is gone."""
    branch: str
    """What is drawn before its name, three characters for each run that it descends from."""


def parent_path(run: Run) -> Path | None:
    """Returns where the parent of a fork is, or was; None for other runs, and for a fork that now
    stands in its parent's place.

    A folder of runs that was moved as a whole still has the parent beside the fork.
    """
    recorded, name = as_path(run.parent.get("path")), os.path.basename(_parent_name(run))
    if not recorded or not name:
        return None
    own, parent = run.path.resolve(), Path(os.path.realpath(recorded))
    beside = own.parent / name
    if not is_run(parent) and is_run(beside) and beside != own:
        return beside
    return parent if parent != own else None


def _parent_name(run: Run) -> str:
    return as_path(run.parent.get("run"))


def family(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs, their parents, and all runs beside any of them, by path."""
    known = {run.path.resolve(): run for run in runs}
    found, folders = dict[Path, Run](), set[Path]()
    waiting = list(known)
    while waiting:
        path = waiting.pop().resolve()
        if path in found or not is_run(path):
            continue
        try:
            run = found[path] = known.get(path) or read_run(path)
        except DataError:  # removed since it was listed
            continue
        parent = parent_path(run)
        waiting += [] if parent is None else [parent]
        if path.parent not in folders:
            folders.add(path.parent)
            waiting += runs_in(path.parent, depth=1)
    return [found[path] for path in sorted(found)]


def trees(runs: Sequence[Run], named: Sequence[Run] = ()) -> list[Node]:
    """Returns the runs that are no forks and the parents that are gone, each followed by its forks.

    named: only the trees that hold one of these.
    """
    known = {run.path.resolve(): run for run in runs}
    labels = dict(zip(known, names(runs), strict=True))
    forks, roots = defaultdict[Path, list[Path]](list), list[Path]()
    for path, run in known.items():
        parent = parent_path(run)
        if parent is None:
            roots.append(path)
            continue
        if parent not in labels:
            labels[parent] = _parent_name(run)
            roots.append(parent)
        forks[parent].append(path)
    wanted, drawn, found = {run.path.resolve() for run in named}, set[Path](), list[Node]()
    for root in (*roots, *known):  # runs in a circle, each a fork of the next, have no root
        tree = list(_walk(root, forks, drawn))
        if not wanted or wanted & {path for path, _ in tree}:
            found += [Node(labels[path], path, known.get(path), branch) for path, branch in tree]
    return found


def _walk(
    root: Path, forks: Mapping[Path, Sequence[Path]], drawn: set[Path]
) -> Iterator[tuple[Path, str]]:
    """Yields a run and all forks below it with their branches, but for those in `drawn`."""
    # Not by recursion: a search over settings may fork its own forks a thousand times.
    waiting = [(root, "", "")]
    while waiting:
        path, branch, below = waiting.pop()
        if path in drawn:
            continue
        drawn.add(path)
        yield path, branch
        for place, fork in enumerate(reversed(forks.get(path, []))):
            here, further = ("├─ ", "│  ") if place else ("└─ ", "   ")
            waiting.append((fork, below + here, below + further))


def tree_lines(nodes: Sequence[Node]) -> list[str]:
    """Returns a line per run: its steps, its newest held-out loss and what it changed."""
    return aligned([_HEADINGS, *map(_row, nodes)], [True, True, False, False, True])


def _row(node: Node) -> list[str]:
    run, name = node.run, node.branch + node.name
    if run is None:
        return [name, _GONE, "", "", ""]
    loss = cell(COLUMN_BY_NAME["last_loss"], run)
    begin = as_count(run.parent.get("step")) or 0
    return [name, run.state, f"{begin}-{run.step}", loss, _changes(run)]


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


def tree_values(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Returns the runs as plain values in the order of the tree; `depth` counts a run's forebears.

    Not one inside the other: readers of JSON refuse what is nested a thousand deep.
    """
    return [_values(node) | {"depth": len(node.branch) // 3} for node in nodes]


def _values(node: Node) -> dict[str, Any]:
    if node.run is None:
        return {"name": node.name, "path": str(node.path), "state": _GONE}
    # The configs, of some 100 options each, are in `runs.py list --json`.
    return summary(node.run) | {"config": None}
