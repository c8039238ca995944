"""Records as event files in the folder `tensorboard` of a run directory, with
`logging.tensorboard`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from config import Config
from engine.monitor import console
from engine.monitor.tracker import Tracker, warn_not_installed
from files.atomic import atomic_write


class TensorBoard(Tracker):
    """Event files of a run directory, once there is one; records wait for it.

    directory: returns the run directory, None until it is made.
    """

    name = "tensorboard"

    def __init__(
        self, config: Config, directory: Callable[[], Path | None], first_step: int
    ) -> None:
        super().__init__()
        self._config_text = config.to_yaml()
        self._directory = directory
        self._first_step = first_step
        self._waiting: list[dict[str, Any]] = []
        self._writer: Any = None

    @staticmethod
    def start(
        config: Config, directory: Callable[[], Path | None], first_step: int
    ) -> TensorBoard | None:
        """Returns None if the config does not ask for it or the package is missing.

        first_step: the first that this session makes; what a resumed run wrote of it and of later
        steps is removed.
        """
        if not config.logging.tensorboard:
            return None
        if find_spec("tensorboard") is None:
            warn_not_installed("tensorboard")
            return None
        return TensorBoard(config, directory, first_step)

    def log(self, record: dict[str, Any]) -> None:
        """Writes a record under the same keys: numbers, lists as their mean, text."""
        self._waiting.append(record)
        self._write()

    def close(self, exit_code: int = 0) -> None:
        """Writes what is left."""
        del exit_code
        self._write()
        if self._writer is not None:
            self._attempt(self._writer.close)

    def _write(self) -> None:
        folder = self._directory()
        if folder is None:
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
        # Four spaces make it a code block, in which YAML keeps its lines.
        code_block = "\n".join(f"    {line}" for line in self._config_text.splitlines())
        self._writer.add_text("config", code_block, self._first_step - 1)

    def _add(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key in console.NOT_PLOTTED or key == "step" or value is None or value == []:
                continue
            if isinstance(value, str):
                self._writer.add_text(key, value, record["step"])
            else:
                number = fmean(value) if isinstance(value, list) else value
                self._writer.add_scalar(key, number, record["step"])


def _cut_events(path: Path, first_step: int) -> None:
    """Removes events of this step and later ones, which a resumed run makes again."""
    # SummaryWriter's `purge_step` asks readers to do this, but not all do it for text.
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
