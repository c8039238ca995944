"""The records of metrics.jsonl for Weights & Biases and TensorBoard, where `logging` asks for it.

The one idea: a tracker is company, never a condition. Whatever is missing or fails (the package, a
key, the network, the disk) costs one warning line; the run goes on, and records wait on the disk
where wandb can. It never asks for input. Keys are wandb's business, neither read nor saved here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from config import Config
from engine.monitor import console
from files.atomic import atomic_write

CONNECT_S, FINISH_S = 30, 60  # how long a network that is gone holds up the start and the end


class Wandb:
    """A run at Weights & Biases; `run_id` names it there, and a resumed run gives it again."""

    def __init__(self, run: Any, run_id: str) -> None:
        self._run = run  # None after a failure
        self.run_id = run_id
        self._files = Path(run.settings.sync_dir)

    @staticmethod
    def start(config: Config, name: str, run_id: str | None, folder: Path | None) -> Wandb | None:
        """None where the config asks for none or where it cannot be.

        `name` is for a run without `logging.wandb_run_name`. wandb keeps its files in
        `folder`/wandb, or where WANDB_DIR says.
        """
        if not config.logging.wandb_log:
            return None
        run_id = run_id or uuid.uuid4().hex[:12]
        options = {
            "project": config.logging.wandb_project,
            "name": config.logging.wandb_run_name or name,
            "id": run_id,
            "resume": "allow",
            "config": config.to_dict(),
            "dir": folder,
        }
        try:
            run = _connected(options)
            # Records have a step of their own; that of wandb cannot go back, as resumed runs do.
            run.define_metric("*", step_metric="step")
        except ImportError:
            console.warning(
                "wandb is not installed; training goes on without it. Install: pip install wandb"
            )
        except Exception as error:  # anything: it must not end the run
            console.warning(f"wandb: {_reason(error)}; training goes on without it.")
        else:
            return Wandb(run, run_id)
        return None

    def log(self, record: dict[str, Any]) -> None:
        """Sends a record of metrics.jsonl under the same keys, lists as their mean."""
        values = {
            key: fmean(value) if isinstance(value, list) else value
            for key, value in record.items()
            if value is not None and value != [] and key not in console.NOT_PLOTTED
        }
        self._attempt("log", values)

    def tell_files(self, unless: Callable[[], bool]) -> None:
        """Says where wandb keeps the files of a run, unless more of it stays."""
        if not unless() and self._files.is_dir():
            console.info(
                f"No checkpoint was saved; wandb keeps its files of this run in {self._files}"
            )

    def close(self, exit_code: int = 0) -> None:
        """Sends what is left; wandb shows another exit code than 0 as a failed run."""
        self._attempt("finish", exit_code)
        self._run = None

    def _attempt(self, verb: str, argument: object) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, verb)(argument)
        except Exception as error:  # anything: it must not end the run
            self._run = None
            console.warning(f"wandb: {_reason(error)}; training goes on without it.")


class TensorBoard:
    """Event files in the folder `tensorboard` of a run directory, once there is one.

    place: tells the run directory, None until it is made; records wait for it.
    """

    def __init__(self, config: Config, place: Callable[[], Path | None], first_step: int) -> None:
        self._text = config.to_yaml()
        self._place = place
        self._first_step = first_step
        self._waiting: list[dict[str, Any]] = []
        self._writer: Any = None
        self._failed = False

    @staticmethod
    def start(
        config: Config, place: Callable[[], Path | None], first_step: int
    ) -> TensorBoard | None:
        """None where the config asks for none or the package is missing.

        first_step: the first that this session will make; what a resumed run wrote of it and of
        later ones is removed.
        """
        if not config.logging.tensorboard:
            return None
        if find_spec("tensorboard") is None:
            console.warning(
                "tensorboard is not installed; training goes on without it. "
                "Install: pip install tensorboard"
            )
            return None
        return TensorBoard(config, place, first_step)

    def log(self, record: dict[str, Any]) -> None:
        """Writes a record under the same keys: numbers, lists as their mean, text."""
        self._waiting.append(record)
        self._write()

    def close(self, _exit_code: int = 0) -> None:
        """Writes what is left."""
        self._write()
        if self._writer is not None:
            self._attempt(self._writer.close)

    def _write(self) -> None:
        folder = self._place()
        if folder is None or self._failed:
            return
        if self._writer is None:
            self._attempt(partial(self._open, folder))
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            self._attempt(partial(self._add, record))

    def _open(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._first_step > 1:
            for path in (folder / "tensorboard").glob("*tfevents*"):
                _cut_events(path, self._first_step)
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        fenced = "\n".join(f"    {line}" for line in self._text.splitlines())
        self._writer.add_text("config", fenced, self._first_step - 1)

    def _add(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key in console.NOT_PLOTTED or key == "step" or value is None or value == []:
                continue
            if isinstance(value, str):
                self._writer.add_text(key, value, record["step"])
            else:
                number = fmean(value) if isinstance(value, list) else value
                self._writer.add_scalar(key, number, record["step"])

    def _attempt(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # anything: it must not end the run
            self._failed = True
            console.warning(f"tensorboard: {_reason(error)}; training goes on without it.")


def _cut_events(path: Path, first_step: int) -> None:
    """Removes events of this step and later ones, which a resumed run makes again. Readers of
    TensorBoard's files do not all do that for text, as `purge_step` asks them to."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    events = [(raw, Event.FromString(raw)) for raw in RawEventFileLoader(str(path)).Load()]
    kept = [raw for raw, event in events if not event.summary.value or event.step < first_step]
    if len(kept) == len(events):
        return

    def write_events(out: Any) -> None:
        writer = RecordWriter(out)
        for raw in kept:
            writer.write(raw)

    atomic_write(path, write_events)


def _connected(options: dict[str, Any]) -> Any:
    """A run at wandb's server, or one on the disk with a warning that tells how to send it."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=CONNECT_S, finish_timeout=FINISH_S
    )
    known = wandb.setup(settings=settings).settings
    wanted = known.mode  # WANDB_MODE, or online
    if Path(getattr(known, "root_dir", Path.cwd())).resolve() != Path.cwd():  # WANDB_DIR
        options = options | {"dir": None}
    run, reason = None, ""
    try:
        if wanted != "online" or wandb.login(prompt=False, verify=False):
            run = wandb.init(**options, settings=settings)
        else:
            reason = "no API key found"
    except Exception as error:  # no network, a wrong key, ...: the disk is left
        reason = _reason(error)
        wandb.teardown()  # else the id counts as in use
    if run is None:
        run = wandb.init(**options, settings=settings, mode="offline")
    if run.offline:
        place = run.settings.sync_dir
        console.warning(
            f"wandb: {reason or 'offline'}; to send the records later: wandb sync {place}"
        )
    return run


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
