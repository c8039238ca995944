"""Brings a run directory back to the checkpoint that a run goes on from. Imports no torch.

A run directory shows one course of a run, up to its newest checkpoint. So when a run goes on from
step s, what lies after s leaves first: finished checkpoints move to `abandoned_after_<s>`, itself a
run directory, and later metrics are removed. `auto` can never resume from them again. A crash on
the way leaves the old course, only shorter, and the same resume can be repeated.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, ConfigError
from engine.run_directory.environment_file import METRICS_BYTES, read_environment
from engine.run_directory.manifest import (
    CONFIG,
    ENVIRONMENT,
    MAX_BYTES,
    METRICS,
    Manifest,
    data_path,
    manifest_path,
    steps_in,
)
from engine.run_directory.metrics_file import missing_bytes, protected, read_lines
from files.atomic import atomic_write, durable_remove, sync_folder
from files.regular import read_regular


class Rewound(NamedTuple):
    """A file before and after a rewind, and notes for the user."""

    before: bytes
    after: bytes
    notes: list[str]


def remove_unfinished(folder: Path) -> list[str]:
    """Removes data without manifest, which a crash left while saving or removing; returns notes."""
    unfinished = sorted({*steps_in(folder, "pt")} - {*steps_in(folder)})
    for step in unfinished:
        durable_remove(data_path(folder, step))
    return [f"removed checkpoint_{step}.pt, which was not completed" for step in unfinished]


def set_aside_later(folder: Path, step: int) -> list[str]:
    """Moves checkpoints after `step` away, with copies of config and metrics; returns notes."""
    _complete_moves(folder)
    later = [late for late in steps_in(folder) if late > step]
    if not later:
        return []
    names = [data_path(folder, late).name for late in later]
    target = free_name(folder, f"abandoned_after_{step}")
    os.mkdir(target)
    for name in (CONFIG, METRICS):
        if (folder / name).exists():
            copy_file(folder / name, target / name)
    # Newest first: after a crash the folder still holds one course without gaps. Data before its
    # manifest, with an fsync after each: data alone in `folder` would count as unfinished and be
    # removed, while a manifest alone is sent after its data by `_complete_moves`.
    for late in reversed(later):
        data = data_path(folder, late)
        for path in (data, manifest_path(data)):
            if path.exists():
                os.replace(path, target / path.name)
                sync_folder(target)
                sync_folder(folder)
    return [f"moved {', '.join(names)} to {target}: this run goes on from step {step}"]


def _complete_moves(folder: Path) -> None:
    for step in steps_in(folder):
        data = data_path(folder, step)
        moved = [] if data.exists() else sorted(folder.glob(f"abandoned_after_*/{data.name}"))
        for target in map(manifest_path, moved):
            if not target.exists():
                os.replace(manifest_path(data), target)
                sync_folder(target.parent)
                break


def rewind_metrics(folder: Path, manifest: Manifest, environment: Mapping[str, Any]) -> Rewound:
    """Returns metrics.jsonl as it is, and as the checkpoint knows it.

    Later records, an evaluation made after the checkpoint, the `final/` record and damaged lines
    are left out. Lines of an earlier version get their checksums.
    """
    content = b""
    with contextlib.suppress(FileNotFoundError):
        content = read_regular(folder / METRICS, MAX_BYTES)
    lines, damage = read_lines(content)
    lost = missing_bytes(environment.get(METRICS_BYTES), len(content))
    notes = [f"{METRICS}: {problem}" for problem in (damage, lost) if problem]
    kept = [line.text for line in lines if line.record and _belongs(line.record, manifest)]
    return Rewound(content, b"".join(map(protected, kept)), notes)


def _belongs(record: Mapping[str, Any], manifest: Manifest) -> bool:
    prefixes = {key.split("/")[0] for key in record}
    # The resumed run evaluates again if the checkpoint was saved before the evaluation of its step.
    repeated = record["step"] == manifest.step and manifest.val_loss is None and "eval" in prefixes
    return record["step"] <= manifest.step and not repeated and "final" not in prefixes


def rewind_config(folder: Path, config: Config, text: str, step: int) -> Rewound:
    """Returns config.yaml as it is and as it is to be; a copy of one that differs is kept.

    text: `config` as it would be saved.
    """
    path = folder / CONFIG
    try:
        before = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        return Rewound(b"", text.encode(), [])
    # A config of another version, or a damaged one, is kept for the record all the same.
    with contextlib.suppress(ConfigError):
        if Config.from_yaml(path) == config:
            return Rewound(before, before, [])
    aside = free_name(folder, f"config.before_{step}", ".yaml")
    copy_file(path, aside)
    note = f"the config differs from before; the old one is {aside.name}"
    return Rewound(before, text.encode(), [note])


def read_earlier_sessions(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what earlier sessions wrote to environment.json, and notes.

    A file that cannot be read is renamed, since a run is worth more than its description.
    """
    path = folder / ENVIRONMENT
    try:
        return read_environment(folder), []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        aside = free_name(folder, "environment.damaged", ".json")
        os.replace(path, aside)
        return {}, [f"{path.name}: {reason}; a new one is begun, it is {aside.name} now"]


def free_name(folder: Path, stem: str, suffix: str = "") -> Path:
    """Returns a path that does not exist: stem, stem_01, stem_02, ..."""
    number, path = 0, folder / f"{stem}{suffix}"
    while path.exists():
        number += 1
        path = folder / f"{stem}_{number:02d}{suffix}"
    return path


def copy_file(source: Path, target: Path) -> None:
    """Copies a text file of a run, durably."""
    content = read_regular(source, MAX_BYTES)
    atomic_write(target, lambda out: out.write(content))
