"""Which checkpoints of a run stay on the disk. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from engine.run_directory.manifest import (
    best_step,
    complete_checkpoints,
    data_path,
    manifest_path,
    steps_in,
)
from files.atomic import durable_remove
from files.write_errors import as_write_error


def prune_checkpoints(folder: Path, keep_last: int, keep: set[int]) -> list[int]:
    """Removes complete checkpoints, except the newest `keep_last`, the best one and `keep`.

    The best one has the lowest held-out loss. Damaged checkpoints do not count among the newest.
    Returns the steps removed; raises WriteError.
    """
    complete = complete_checkpoints(folder)
    old = set(list(complete)[:-keep_last]) - {best_step(complete)} - keep
    # Data without a manifest is left from a removal that failed half-way.
    without_manifest = {*steps_in(folder, "pt")} - {*steps_in(folder)}
    for step in sorted(old | without_manifest):
        path = data_path(folder, step)
        with as_write_error(f"remove old checkpoint {path}", folder):
            # The manifest first, durably: a crash in between leaves data that nobody resumes from,
            # while a manifest without data would name a checkpoint that does not exist.
            durable_remove(manifest_path(path))
            durable_remove(path)
    return sorted(old | without_manifest)
