"""The directory of a run: created with the first checkpoint or after a minute, locked, continued at
resume.

The one idea: the directory always shows one course of the run up to its newest checkpoint. So
when a run goes on from step s, what lies after s (checkpoints, metrics) leaves first, newest
first: finished checkpoints move to `abandoned_after_<s>`, itself a run directory; an `auto` can
never pick them up again. A crash in between leaves the old course, only shorter, and the same
resume can be repeated.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from config import CheckpointError, Config, ConfigError, NonFiniteError, WriteError
from engine.monitor import console
from engine.run_directory.environment import describe_session, now
from engine.run_directory.find_checkpoint import Resume
from engine.run_directory.manifest import (
    CONFIG,
    ENVIRONMENT,
    LOCK,
    MAX_BYTES,
    METRICS,
    Manifest,
    data_path,
    manifest_path,
    steps_in,
)
from engine.run_directory.run_files import (
    METRICS_BYTES,
    config_copy,
    environment_text,
    metrics_line,
    missing_bytes,
    protected,
    read_environment,
    read_lines,
)
from files.atomic import (
    atomic_write,
    atomic_write_text,
    durable_remove,
    remove_temporaries,
    sync_folder,
    write_all,
)
from files.regular import open_regular, read_regular
from files.write_errors import as_write_error, check_writable

LASTING_S = 60.0
"""A run that has trained for so long leaves its directory, whether or not it saved a checkpoint."""


class RunDirectory:
    """One run on disk, for the process (rank 0) that writes it; a context manager.

    `start` promises a new directory, made by the first `prepare` or by `count_step`; `reopen`
    continues one.
    """

    def __init__(
        self, config: Config, origin: Sequence[str], facts: Mapping[str, Any] | None = None
    ) -> None:
        self.path: Path | None = None
        self.last_checkpoint: Path | None = None
        self.resumed_step: int | None = None
        self.notes: list[str] = []
        """Lines for the user: what was removed or set aside."""
        training = replace(config.training, resume_from_checkpoint=None)
        self._config = replace(config, training=training)
        self._origin = origin
        self._facts = dict(facts or {})
        self._ended: dict[str, Any] | None = None
        self._progress: dict[str, Any] = {}
        self._started = datetime.now()
        self._held = ExitStack()
        self._environment: dict[str, Any] = {}
        self._unwritten: list[bytes] = []
        self._metrics_bytes = 0
        self._metrics_error: WriteError | None = None
        self._lasting = False
        self._next_attempt_s = LASTING_S

    @classmethod
    def start(
        cls,
        config: Config,
        origin: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> RunDirectory:
        """A run that has no directory yet; raises WriteError where none can be created.

        `origin` are the comment lines of the saved config: the files and overrides it came from.
        `facts` are for environment.json: `device` of this session, `run` and `data` in numbers.
        """
        check_writable(Path(config.training.checkpoint_dir))
        return cls(config, origin, facts)

    @classmethod
    def reopen(
        cls,
        resume: Resume,
        config: Config,
        origin: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> RunDirectory:
        """Continues in the directory of `resume`; raises CheckpointError while another process
        does, and WriteError."""
        run = cls(config, origin, facts)
        folder = run.path = resume.run_dir
        run.last_checkpoint, run.resumed_step = resume.path, resume.step
        with ExitStack() as undo, as_write_error(f"continue in {folder}", folder):
            undo.callback(run._held.close)
            run._take_lock(folder)
            if tuple(steps_in(folder)) != resume.seen_steps:
                raise CheckpointError(
                    f"{folder} changed while it was opened: another process saved or removed "
                    "checkpoints. Run the command again."
                )
            remove_temporaries(folder)
            run.notes += _remove_unfinished(folder)
            run.notes += _set_aside(folder, resume.step)
            run._continue_files(folder, resume.manifest)
            undo.pop_all()
        return run

    @property
    def name(self) -> str:
        """The folder's name; one that is not made yet gets a suffix if another run takes it."""
        return self.path.name if self.path else f"run_{self._started:%Y%m%d_%H%M%S}"

    @property
    def saves(self) -> bool:
        """Whether this run will make a checkpoint."""
        training = self._config.training
        return training.save_model and not training.eval_only

    @property
    def stays(self) -> bool:
        """Whether a directory is left at the end: of a run that was saved or trained for long."""
        if self.path is None:
            return False
        return self._lasting or self.last_checkpoint is not None or bool(steps_in(self.path))

    @property
    def promise(self) -> Path:
        """Where the directory is or will be."""
        return self.path or Path(self._config.training.checkpoint_dir) / self.name

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if kind is not None:
            if isinstance(error, NonFiniteError | WriteError) and self.saves:
                with contextlib.suppress(WriteError):  # that error is being reported
                    self._make_lasting()
            first = (str(error).strip().splitlines() or [""])[0]
            self.end("failed", f"{kind.__name__}: {first}")
        try:
            self.close()
        except WriteError as error:
            if kind is None:
                raise
            console.info(str(error))  # the first error tells more

    def prepare(self) -> Path:
        """The directory, created now if it was not yet, with all metrics so far on the disk."""
        if self.path is None:
            self.path = self._create()
        self._write_metrics(durable=True)
        if self._environment.get(METRICS_BYTES) != self._metrics_bytes:
            with contextlib.suppress(OSError):  # a checkpoint is worth more; the next save tries
                self._save_environment()
        return self.path

    def count_step(self, step: int, tokens: int, elapsed_s: float) -> None:
        """Notes how far training got, for `end`, and creates the directory once it has taken
        `LASTING_S`, checkpoint or not.

        A failure is told and tried again as much later.
        """
        self._progress = {"step": step, "tokens": tokens, "elapsed_s": round(elapsed_s, 3)}
        if self._lasting or not self.saves or elapsed_s < self._next_attempt_s:
            return
        try:
            self._make_lasting()
        except WriteError as error:
            self._next_attempt_s = elapsed_s + LASTING_S
            console.info(f"{error} Training goes on; metrics wait in memory.")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl, in memory until there is a directory.

        NaN and infinity become null. A failure is told once and retried with the next record;
        `close` raises it if it stays.
        """
        self._unwritten.append(metrics_line(_finite(record)))
        self._write_metrics()

    def end(self, state: str, reason: str = "") -> None:
        """Notes how this session ended and at which step, for environment.json: done, stopped or
        failed."""
        self._ended = {"state": state, "reason": reason, **self._progress, "time": now()}

    def close(self) -> None:
        """Writes what is left, gives up the lock; raises WriteError if metrics were lost.

        The directory of a short run without any finished checkpoint is removed.
        """
        with self._held:
            if self.path is None:
                return
            if not self.stays:
                shutil.rmtree(self.path, ignore_errors=True)
                return
            self._write_metrics(durable=True)
            if self._ended is not None:
                with contextlib.suppress(OSError, WriteError):  # only a word in a list of runs
                    self._environment["ended"] = self._ended
                    self._save_environment()
            if self._metrics_error is not None:
                raise self._metrics_error

    def _make_lasting(self) -> None:
        self.prepare()
        self._lasting = True

    def _create(self) -> Path:
        parent = Path(self._config.training.checkpoint_dir)
        with ExitStack() as undo, as_write_error(f"create a run directory in {parent}", parent):
            os.makedirs(parent, exist_ok=True)
            promised = parent / self.name
            folder = _make_folder(parent, self.name)
            undo.callback(self._held.close)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            self._take_lock(folder)
            text = self._config.to_yaml(self._origin)
            atomic_write_text(folder / CONFIG, text)
            self._environment = {**self._session(), "resumed": [], **self._known(text, None)}
            atomic_write_text(folder / ENVIRONMENT, environment_text(self._environment))
            sync_folder(parent)
            undo.pop_all()
        if folder != promised:
            console.info(f"Run directory: {folder}, because another run took {promised.name}")
        return folder

    def _take_lock(self, folder: Path) -> None:
        """Held until `close` or the death of this process.

        A POSIX lock, because a forked data worker does not inherit it: one that outlives a killed
        run for a moment would keep a flock held.
        """
        descriptor = open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT)
        self._held.callback(os.close, descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self.notes.append(
                    f"{folder} cannot be locked ({error.strerror}): make sure that no other "
                    "process continues this run"
                )
                return
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            self._held.close()
            raise CheckpointError(
                f"{folder.name} is in use by {holder or 'another process'}. Stop that process, "
                "or start a new run."
            ) from None
        os.ftruncate(descriptor, 0)
        owner = f"host {socket.gethostname()} pid {os.getpid()} since {datetime.now():%H:%M}"
        os.pwrite(descriptor, f"{owner} ({datetime.now():%Y-%m-%d})\n".encode(), 0)

    def _continue_files(self, folder: Path, manifest: Manifest) -> None:
        """Brings config, metrics and environment to the state of a resumed session.

        environment.json is written before the two that it vouches for: a crash in between leaves a
        config that it names as the one before, and metrics that are longer than it says.
        """
        known = self._old_environment(folder)
        before, after = self._kept_metrics(folder, manifest, known)
        config_before, config_after = self._kept_config(folder)
        known.pop("ended", None)
        earlier = known.get("resumed")
        sessions = earlier if isinstance(earlier, list) else []
        known["resumed"] = [*sessions, {"step": self.resumed_step, **self._session()}]
        replaced = hashlib.sha256(config_before).hexdigest() if config_before else None
        self._metrics_bytes = len(after)
        self._environment = known | self._known(config_after, replaced)
        self._save_environment(folder)
        if before != after:
            atomic_write(folder / METRICS, lambda out: out.write(after))
        if config_before != config_after.encode():
            atomic_write_text(folder / CONFIG, config_after)

    def _old_environment(self, folder: Path) -> dict[str, Any]:
        """What earlier sessions wrote; a file that cannot be read is put aside."""
        place = folder / ENVIRONMENT
        try:
            return read_environment(folder)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            aside = _free_name(folder, "environment.damaged", ".json")
            os.replace(place, aside)
            self.notes.append(f"{place.name}: {reason}; a new one is begun, it is {aside.name} now")
        return {}

    def _kept_config(self, folder: Path) -> tuple[bytes, str]:
        """The config that is there, and the one to be; where they differ, the old one is kept as
        config.before_<step>."""
        place = folder / CONFIG
        try:
            before = read_regular(place, MAX_BYTES)
        except FileNotFoundError:
            return b"", self._config.to_yaml(self._origin)
        try:
            if Config.from_yaml(place) == self._config:
                return before, before.decode(errors="surrogateescape")
        except ConfigError:
            pass  # of another version, or damaged: kept for the record all the same
        aside = _free_name(folder, f"config.before_{self.resumed_step}", ".yaml")
        _copy(place, aside)
        self.notes.append(f"the config differs from before; the old one is {aside.name}")
        return before, self._config.to_yaml(self._origin)

    def _kept_metrics(
        self, folder: Path, manifest: Manifest, environment: Mapping[str, Any]
    ) -> tuple[bytes, bytes]:
        """metrics.jsonl as it is, and as the checkpoint knows it: without later records, an
        evaluation made after it, the `final/` ones, and damaged lines. Lines of an earlier version
        get their checksums.
        """
        content = b""
        with contextlib.suppress(FileNotFoundError):
            content = read_regular(folder / METRICS, MAX_BYTES)
        lines, damage = read_lines(content)
        lost = missing_bytes(environment.get(METRICS_BYTES), len(content))
        self.notes += [f"{METRICS}: {problem}" for problem in (damage, lost) if problem]
        kept = [line.text for line in lines if line.record and _belongs(line.record, manifest)]
        return content, b"".join(map(protected, kept))

    def _session(self) -> dict[str, Any]:
        processes = self._facts.get("run", {}).get("processes", 1)
        return describe_session(str(self._facts.get("device", ""))) | {"processes": processes}

    def _known(self, text: str, replaced: str | None) -> dict[str, Any]:
        """What of a run a list of runs wants to know, so that it need not work it out."""
        facts = {key: value for key, value in self._facts.items() if key != "device"}
        return facts | {"config": config_copy(self._config, text, replaced)}

    def _save_environment(self, folder: Path | None = None) -> None:
        place = folder or self.path
        assert place is not None
        self._environment[METRICS_BYTES] = self._metrics_bytes
        atomic_write_text(place / ENVIRONMENT, environment_text(self._environment))

    def _write_metrics(self, durable: bool = False) -> None:
        if self.path is None or not (self._unwritten or durable):
            return
        data = b"".join(self._unwritten)
        try:
            with as_write_error(f"append to {self.path / METRICS}", self.path):
                _append(self.path / METRICS, data, durable)
        except WriteError as error:
            if self._metrics_error is None:
                console.info(f"{error} Metrics wait in memory; every log line tries again.")
            self._metrics_error = error
            return
        self._metrics_bytes += len(data)
        self._unwritten.clear()
        self._metrics_error = None


def _make_folder(parent: Path, name: str) -> Path:
    """A new folder; runs of the same second get _01, _02, ..."""
    for number in range(10_000):
        folder = parent / (f"{name}_{number:02d}" if number else name)
        try:
            os.mkdir(folder)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(errno.EEXIST, f"{parent / name} and 9999 others exist")


def _free_name(folder: Path, stem: str, suffix: str = "") -> Path:
    number, path = 0, folder / f"{stem}{suffix}"
    while path.exists():
        number += 1
        path = folder / f"{stem}_{number:02d}{suffix}"
    return path


def _copy(source: Path, target: Path) -> None:
    content = read_regular(source, MAX_BYTES)
    atomic_write(target, lambda out: out.write(content))


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def _append(path: Path, data: bytes, durable: bool) -> None:
    """Appends whole lines; on an error the file is as long as before."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _remove_unfinished(folder: Path) -> list[str]:
    """Removes data without manifest: a crash left it while saving, or while removing it."""
    unfinished = sorted({*steps_in(folder, "pt")} - {*steps_in(folder)})
    for step in unfinished:
        durable_remove(data_path(folder, step))
    return [f"removed checkpoint_{step}.pt, which was not completed" for step in unfinished]


def _set_aside(folder: Path, step: int) -> list[str]:
    """Moves finished checkpoints after `step` away, with a copy of config and metrics.

    Newest first, and each manifest after its data, so that a crash in between never leaves data
    alone in `folder`, where it would count as unfinished.
    """
    _complete_moves(folder)
    later = [late for late in steps_in(folder) if late > step]
    if not later:
        return []
    names = [data_path(folder, late).name for late in later]
    place = _free_name(folder, f"abandoned_after_{step}")
    os.mkdir(place)
    for name in (CONFIG, METRICS):
        if (folder / name).exists():
            _copy(folder / name, place / name)
    for late in reversed(later):
        data = data_path(folder, late)
        for path in (data, manifest_path(data)):
            if path.exists():
                os.replace(path, place / path.name)
                sync_folder(place)
                sync_folder(folder)
    return [f"moved {', '.join(names)} to {place}: this run goes on from step {step}"]


def _complete_moves(folder: Path) -> None:
    """Sends a manifest after its data where a crash separated them."""
    for step in steps_in(folder):
        data = data_path(folder, step)
        moved = [] if data.exists() else sorted(folder.glob(f"abandoned_after_*/{data.name}"))
        for target in map(manifest_path, moved):
            if not target.exists():
                os.replace(manifest_path(data), target)
                sync_folder(target.parent)
                break


def _belongs(record: Mapping[str, Any], manifest: Manifest) -> bool:
    kinds = {key.split("/")[0] for key in record}
    unknown = record["step"] == manifest.step and manifest.val_loss is None and "eval" in kinds
    return record["step"] <= manifest.step and not unknown and "final" not in kinds


def directory_lines(directory: RunDirectory, resume: Resume | None) -> list[str]:
    """Where the run is kept."""
    if resume is not None:
        return [f"Run directory: {resume.run_dir}", *directory.notes]
    if not directory.saves:
        return ["Run directory: none (nothing will be saved)"]
    when = "made with the first checkpoint, or after a minute"
    return [f"Run directory: {directory.promise} ({when})"]
