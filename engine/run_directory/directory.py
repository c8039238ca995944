"""The directory of a run: created with the first checkpoint or after a minute, locked, continued at
resume.

    .lock              held by the process that writes the directory (lock.py)
    config.yaml        the config, as a user may run it again
    environment.json   command, versions, machine, sessions, how the last one ended
    metrics.jsonl      one record per log line (metrics_file.py)
    checkpoint_N.pt    the state after step N, and checkpoint_N.json, its manifest (manifest.py)
    abandoned_after_N  later checkpoints of a run that went on from step N again (rewind.py)

Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from config import CheckpointError, Config, NonFiniteError, WriteError
from engine.monitor import console
from engine.run_directory.environment import now
from engine.run_directory.environment_file import METRICS_BYTES, EnvironmentFile
from engine.run_directory.find_checkpoint import Resume
from engine.run_directory.fork import PARENT, Fork
from engine.run_directory.lock import DirectoryLock
from engine.run_directory.manifest import CONFIG, METRICS, Manifest, steps_in
from engine.run_directory.metrics_file import MetricsFile
from engine.run_directory.rewind import (
    read_earlier_sessions,
    remove_unfinished,
    rewind_config,
    rewind_metrics,
    set_aside_later,
)
from files.atomic import atomic_write, atomic_write_text, remove_temporaries, sync_folder
from files.write_errors import as_write_error, check_writable

KEEP_AFTER_S = 60.0
"""A run that has trained for so long keeps its directory, even if it never saved a checkpoint."""


class RunDirectory:
    """One run on disk, for the process (rank 0) that writes it; a context manager.

    `start` begins a run whose directory is made by the first `prepare` or by `count_step`;
    `reopen` continues in an existing one.
    """

    def __init__(
        self, config: Config, origin: Sequence[str], facts: Mapping[str, Any] | None = None
    ) -> None:
        self.path: Path | None = None
        self.last_checkpoint: Path | None = None
        self.resumed_step: int | None = None
        self.notes: list[str] = []
        """Lines for the user: what was removed or set aside."""
        # Without the option to resume, the saved config starts the same run again.
        training = replace(config.training, resume_from_checkpoint=None)
        self._config = replace(config, training=training)
        self._origin = origin
        self._environment = EnvironmentFile(self._config, facts or {})
        self._metrics = MetricsFile()
        self._lock: DirectoryLock | None = None
        # Held while the files are written: training adds records while a thread saves.
        self._writing = threading.RLock()
        self._started = datetime.now()
        self._progress: dict[str, Any] = {}
        self._ended: dict[str, Any] | None = None
        self._trained_long = False
        self._next_attempt_s = KEEP_AFTER_S

    @classmethod
    def start(
        cls,
        config: Config,
        origin: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        fork: Fork | None = None,
    ) -> RunDirectory:
        """Returns a run that has no directory yet; raises WriteError if none can be created.

        Args:
            origin: comment lines of the saved config: the files and overrides it came from.
            facts: for environment.json, see `EnvironmentFile`.
            fork: what a fork begins with.
        """
        check_writable(Path(config.training.checkpoint_dir))
        if fork is None:
            return cls(config, origin, facts)
        run = cls(config, origin, {**(facts or {}), PARENT: fork.parent})
        run._metrics.copy(fork.records)
        run.notes += fork.notes
        run._next_attempt_s += fork.elapsed_s
        return run

    @classmethod
    def reopen(
        cls,
        resume: Resume,
        config: Config,
        origin: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> RunDirectory:
        """Continues in the directory of `resume`, brought back to its checkpoint.

        Raises CheckpointError while another process writes the directory, and WriteError.
        """
        run = cls(config, origin, facts)
        folder = run.path = resume.run_dir
        run.last_checkpoint, run.resumed_step = resume.path, resume.step
        with ExitStack() as undo, as_write_error(f"continue in {folder}", folder):
            lock = DirectoryLock(folder)
            undo.callback(lock.release)
            # The checkpoint was chosen before the lock was ours; another process may have saved
            # newer ones meanwhile, which this run would then set aside.
            if tuple(steps_in(folder)) != resume.seen_steps:
                raise CheckpointError(
                    f"{folder} changed while it was opened: another process saved or removed "
                    "checkpoints. Run the command again."
                )
            remove_temporaries(folder)
            run.notes += [lock.warning] if lock.warning else []
            run.notes += remove_unfinished(folder)
            run.notes += set_aside_later(folder, resume.step)
            run._continue_files(folder, resume.manifest)
            run._lock = lock
            undo.pop_all()
        return run

    @property
    def name(self) -> str:
        """The folder's name; one that is not made yet gets a suffix if another run takes it."""
        return self.path.name if self.path else f"run_{self._started:%Y%m%d_%H%M%S}"

    @property
    def will_save(self) -> bool:
        """Whether this run will make a checkpoint."""
        return self._config.training.save_model and not self._config.training.eval_only

    @property
    def is_kept(self) -> bool:
        """Whether the directory stays after the end: of a run that was saved or trained long."""
        if self.path is None:
            return False
        return self._trained_long or self.last_checkpoint is not None or bool(steps_in(self.path))

    @property
    def future_path(self) -> Path:
        """Where the directory is or will be."""
        return self.path or Path(self._config.training.checkpoint_dir) / self.name

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if kind is not None:
            if isinstance(error, NonFiniteError | WriteError) and self.will_save:
                with contextlib.suppress(WriteError):  # `error` is being reported
                    self._create_and_keep()
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.end("failed", f"{kind.__name__}: {first_line}")
        try:
            self.close()
        except WriteError as failure:
            if kind is None:
                raise
            console.info(str(failure))  # raised, it would hide the first error

    def prepare(self) -> Path:
        """Returns the directory, created now if need be, with all metrics so far on the disk."""
        with self._writing:
            if self.path is None:
                self.path = self._create()
            self._metrics.write(self.path, durable=True)
            if self._environment.values.get(METRICS_BYTES) != self._metrics.size:
                # A checkpoint is worth more than this file: a failure waits for the next save.
                with contextlib.suppress(OSError):
                    self._environment.save(self.path, self._metrics.size)
            return self.path

    def count_step(self, step: int, tokens: int, elapsed_s: float) -> None:
        """Notes how far training got, for `end`, and creates the directory after `KEEP_AFTER_S`.

        A failure to create it is reported and tried again as much later.
        """
        self._progress = {"step": step, "tokens": tokens, "elapsed_s": round(elapsed_s, 3)}
        if self._trained_long or not self.will_save or elapsed_s < self._next_attempt_s:
            return
        try:
            self._create_and_keep()
        except WriteError as error:
            self._next_attempt_s = elapsed_s + KEEP_AFTER_S
            console.info(f"{error} Training goes on; metrics wait in memory.")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl, in memory until there is a directory.

        A failure is reported once and retried with the next record; `close` raises it if it stays.
        """
        with self._writing:
            self._metrics.add(record)
            if self.path is not None:
                self._metrics.write(self.path)

    def end(self, state: str, reason: str = "") -> None:
        """Notes how this session ended, for environment.json: done, stopped or failed."""
        self._ended = {"state": state, "reason": reason, **self._progress, "time": now()}

    def close(self) -> None:
        """Writes what is left and gives up the lock; raises WriteError if metrics were lost.

        The directory of a short run without a finished checkpoint is removed.
        """
        try:
            if self.path is None:
                return
            if not self.is_kept:
                shutil.rmtree(self.path, ignore_errors=True)
                return
            self._metrics.write(self.path, durable=True)
            if self._ended is not None:
                self._environment.values["ended"] = self._ended
                with contextlib.suppress(OSError):  # only a word in a list of runs
                    self._environment.save(self.path, self._metrics.size)
            if self._metrics.error is not None:
                raise self._metrics.error
        finally:
            if self._lock is not None:
                self._lock.release()

    def _create_and_keep(self) -> None:
        """Creates the directory, which then stays even if no checkpoint is ever saved in it."""
        self.prepare()
        self._trained_long = True

    def _create(self) -> Path:
        parent = Path(self._config.training.checkpoint_dir)
        expected = parent / self.name
        with ExitStack() as undo, as_write_error(f"create a run directory in {parent}", parent):
            os.makedirs(parent, exist_ok=True)
            folder = _make_folder(expected)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = DirectoryLock(folder)
            undo.callback(lock.release)
            text = self._config.to_yaml(self._origin)
            atomic_write_text(folder / CONFIG, text)
            self._environment.begin(text)
            self._environment.save(folder, 0)
            sync_folder(parent)
            undo.pop_all()
        self._lock = lock
        self.notes += [lock.warning] if lock.warning else []
        if folder != expected:
            console.info(f"Run directory: {folder}, because another run took {expected.name}")
        return folder

    def _continue_files(self, folder: Path, manifest: Manifest) -> None:
        """Brings config, metrics and environment to the state of a resumed session."""
        earlier, damage = read_earlier_sessions(folder)
        metrics = rewind_metrics(folder, manifest, earlier)
        text = self._config.to_yaml(self._origin)
        config = rewind_config(folder, self._config, text, manifest.step)
        self.notes += [*damage, *metrics.notes, *config.notes]
        replaced = hashlib.sha256(config.before).hexdigest() if config.before else None
        text = config.after.decode(errors="surrogateescape")
        self._metrics.size = len(metrics.after)
        # environment.json vouches for the two others, so it is written before them: a crash in
        # between leaves a config that it names as the one before, and metrics that are longer than
        # it says; neither is taken for damage.
        self._environment.resume(earlier, manifest.step, text, replaced)
        self._environment.save(folder, self._metrics.size)
        for name, file in ((METRICS, metrics), (CONFIG, config)):
            if file.before != file.after:
                _write(folder / name, file.after)


def _write(path: Path, content: bytes) -> None:
    atomic_write(path, lambda out: out.write(content))


def _make_folder(expected: Path) -> Path:
    """Makes a new folder; runs of the same second get _01, _02, ..."""
    for number in range(10_000):
        folder = expected.with_name(f"{expected.name}_{number:02d}") if number else expected
        try:
            os.mkdir(folder)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(errno.EEXIST, f"{expected} and 9999 others exist")


def directory_lines(directory: RunDirectory, resume: Resume | None) -> list[str]:
    """Returns lines that tell where the run is kept."""
    if resume is not None:
        return [f"Run directory: {resume.run_dir}", *directory.notes]
    if not directory.will_save:
        return ["Run directory: none (nothing will be saved)"]
    when = "made with the first checkpoint, or after a minute"
    return [f"Run directory: {directory.future_path} ({when})", *directory.notes]
