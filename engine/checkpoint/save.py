"""Writes checkpoints.

A checkpoint is a file of nested dicts of tensors and plain values with a `format` field, as
`torch.save` makes it, and a manifest written after it (engine/run_directory/manifest.py). The order
of a save, in the background thread of the main process (engine/saving.py):

1. The content goes to a temporary file, tensor by tensor (engine/checkpoint/stream.py), which is
   hashed on the way and fsynced.
2. The manifest of an earlier checkpoint of the same step, if there is one, is removed.
3. The temporary file is renamed to `checkpoint_<step>.pt`; the folder is fsynced.
4. The manifest is written in the same way: temporary file, fsync, rename, fsync of the folder.
5. Old checkpoints are removed, manifest first.

A crash between any two steps leaves either a complete checkpoint or data without a manifest, which
does not count as a checkpoint and is removed at the next resume or save.
"""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Any

from config import CheckpointError, WriteError
from engine.checkpoint.contents import check_finite, check_plain, tensor_bytes
from engine.checkpoint.retention import prune_checkpoints
from engine.checkpoint.stream import write_tree
from engine.monitor import console
from engine.run_directory.directory import RunDirectory
from engine.run_directory.manifest import (
    FORMAT,
    CheckpointMeta,
    Manifest,
    data_path,
    manifest_path,
    render,
    verify,
)
from files.atomic import atomic_write, atomic_write_text, durable_remove
from files.write_errors import as_write_error, check_space


def save_checkpoint(directory: RunDirectory, state: dict[str, Any], keep_last: int | None) -> Path:
    """Saves the state of a run, then removes old checkpoints.

    Args:
        directory: of the run; it is created if it does not exist yet.
        state: what `contents.Content` lists, without `format`.
        keep_last: how many of the newest checkpoints stay; None: all.

    Returns the path of the checkpoint. A step that is saved already is not written again, unless
    it has been evaluated since. Raises NonFiniteError for NaN in the weights, and WriteError; the
    earlier checkpoints are then still good. Failing to remove an old one is only a warning.
    """
    check_plain(state)
    meta = _meta(state)
    check_finite(state["model"], meta.step)
    folder = directory.prepare()
    path = data_path(folder, meta.step)
    earlier = directory.last_checkpoint
    if not _already_saved(path, meta):
        needed = tensor_bytes(state)
        kept = earlier.name if earlier else ""
        with as_write_error(f"write {path}", folder, needed_bytes=needed, kept=kept):
            check_space(folder, needed)
            _write(path, {"format": FORMAT, **state}, meta)
    directory.last_checkpoint = path
    if keep_last is not None:
        # Without the checkpoint it began from, a resumed run could not be repeated.
        keep = set() if directory.resumed_step is None else {directory.resumed_step}
        try:
            prune_checkpoints(folder, keep_last, keep)
        except WriteError as error:
            console.warning(f"{error} The next checkpoint will try again.")
    return path


def _meta(state: dict[str, Any]) -> CheckpointMeta:
    train = state["train"]
    measured = train["evaluated_step"] == train["step"]
    return CheckpointMeta(
        step=train["step"],
        tokens=train["tokens"],
        loss=train["train_loss"] if measured else None,
        val_loss=train["val_loss"] if measured else None,
        fingerprint=state["data"]["fingerprint"],
    )


def _already_saved(path: Path, meta: CheckpointMeta) -> bool:
    """Returns whether the step has a valid checkpoint that knows its held-out loss if `meta`
    does."""
    try:
        manifest = verify(path)
    except CheckpointError:
        return False
    return manifest.val_loss is not None or meta.val_loss is None


def _write(path: Path, content: dict[str, Any], meta: CheckpointMeta) -> None:
    def remove_old_manifest() -> None:
        # A manifest must never stand beside other data than its own. It is removed only once the
        # new data is on the disk: a full disk must not cost the step's earlier checkpoint.
        durable_remove(manifest_path(path))

    try:
        digest = atomic_write(
            path, lambda out: write_tree(content, out), before_rename=remove_old_manifest
        )
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        manifest = Manifest(**vars(meta), size=digest.size, sha256=digest.sha256, time=time)
        # Last: from the moment this name exists, the checkpoint does.
        atomic_write_text(manifest_path(path), render(manifest))
    except BaseException:  # Ctrl-C too
        # If there is a manifest, `path` is still the step's earlier checkpoint.
        if not manifest_path(path).exists():
            with contextlib.suppress(OSError):
                durable_remove(path)
        raise
