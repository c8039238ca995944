"""Finding run directories, and the run meant by a part of its name. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from config import DataError
from engine.run_directory.manifest import CONFIG, ENVIRONMENT, LOCK, METRICS

FOLDER = Path("checkpoints")
"""Where runs are looked for by name first."""
_SHOWN = 6  # names in a message
_CHECKPOINT = re.compile(r"checkpoint_\d+\.(pt|json)")


def runs_in(folder: Path, depth: int = 2) -> list[Path]:
    """Returns the folder itself if it is a run, else those in it and in its folders, by name."""
    names = _listed(folder)
    if is_run(folder, names):
        return [folder]
    inside = sorted(name for name in names if not name.startswith("."))
    return [run for name in inside if depth for run in runs_in(folder / name, depth - 1)]


def is_run(folder: Path, names: Iterable[str] | None = None) -> bool:
    """Returns whether a folder, which holds `names`, is a run directory.

    A config.yaml alone makes a run only of a folder that is called like one.
    """
    known = {METRICS, ENVIRONMENT, LOCK} | ({CONFIG} if folder.name.startswith("run_") else set())
    names = _listed(folder) if names is None else names
    return any(name in known or _CHECKPOINT.fullmatch(name) for name in names)


def find_by_name(word: str | Path, folder: Path = FOLDER) -> Path:
    """Returns the path that a word means: itself if it exists, else the run it names.

    `145754` and `run_20251108_145754` are looked for in `folder`, then in all folders beside it
    that hold runs; `out/145754` in `out`; `145754/checkpoint_500.pt` is a file in such a run. A
    word that names no run comes back as it is. Raises DataError if several runs match.
    """
    path = Path(word)
    if os.path.exists(path) or not path.name:  # Path.exists raises OSError for a name too long
        return path
    if path.suffix in (".pt", ".json"):
        return find_by_name(path.parent, folder) / path.name if path.parent.name else path
    if len(path.parts) > 1:
        return _named(path.name, runs_in(path.parent), word) or path
    here = sorted(Path(name) for name in _listed(Path()) if not name.startswith("."))
    beside = (run for place in here if place != folder for run in runs_in(place, depth=1))
    return _named(path.name, runs_in(folder), word) or _named(path.name, list(beside), word) or path


def shown_names(runs: Sequence[Path]) -> str:
    """Returns the names of the last runs for a message."""
    names = ", ".join(run.name for run in runs[-_SHOWN:])
    return names + (f" and {len(runs) - _SHOWN} more" if len(runs) > _SHOWN else "")


def _named(name: str, runs: Sequence[Path], word: str | Path) -> Path | None:
    found = [run for run in runs if run.name == name] or [run for run in runs if name in run.name]
    if len(found) > 1:
        raise DataError(f"{word}: could be {shown_names(found)}. Write more of its name.")
    return found[0] if found else None


def _listed(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()
