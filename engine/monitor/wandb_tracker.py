"""Records for Weights & Biases, with `logging.wandb_log`.

Without a key or a network the records wait on the disk, and a warning tells how to send them. It
never asks for input. Keys are wandb's business: they are neither read nor saved here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from config import Config
from engine.monitor import console
from engine.monitor.tracker import Tracker, reason_of, warn_not_installed, warn_of_failure

CONNECT_S, FINISH_S = 30, 60  # how long a network that is gone delays the start and the end


class Wandb(Tracker):
    """A run at Weights & Biases; `run_id` names it there, and a resumed run keeps it."""

    name = "wandb"

    def __init__(self, run: Any, run_id: str) -> None:
        super().__init__()
        self.run_id = run_id
        self._run = run
        self._files = Path(run.settings.sync_dir)
        self._closed = False

    @staticmethod
    def start(config: Config, name: str, run_id: str | None, folder: Path | None) -> Wandb | None:
        """Returns None if the config does not ask for it or it cannot be started.

        Args:
            name: of a run without `logging.wandb_run_name`.
            run_id: of a resumed run.
            folder: wandb keeps its files in `folder`/wandb, or where WANDB_DIR says.
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
            run = _connect(options)
            # wandb's own step cannot go back, as that of a resumed run does.
            run.define_metric("*", step_metric="step")
        except ImportError:
            warn_not_installed("wandb")
        except Exception as error:  # of the network or the server: anything, and never fatal
            warn_of_failure("wandb", error)
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
        self._attempt(partial(self._run.log, values))

    def close(self, exit_code: int = 0) -> None:
        """Sends what is left; wandb shows another exit code than 0 as a failed run."""
        if not self._closed:
            self._attempt(partial(self._run.finish, exit_code))
            self._closed = True

    def report_files(self, unless: Callable[[], bool]) -> None:
        """Prints where wandb keeps the files of a run, unless a run directory stays."""
        if not unless() and self._files.is_dir():
            console.info(
                f"No checkpoint was saved; wandb keeps its files of this run in {self._files}"
            )


def _connect(options: dict[str, Any]) -> Any:
    """Returns a run at wandb's server, or one on the disk with a warning that tells how to send
    it."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=CONNECT_S, finish_timeout=FINISH_S
    )
    environment = wandb.setup(settings=settings).settings
    if Path(getattr(environment, "root_dir", Path.cwd())).resolve() != Path.cwd():  # WANDB_DIR
        options = options | {"dir": None}
    run, reason = None, ""
    try:
        # `mode` is WANDB_MODE, or online. Without a key, init would ask for one.
        if environment.mode != "online" or wandb.login(prompt=False, verify=False):
            run = wandb.init(**options, settings=settings)
        else:
            reason = "no API key found"
    except Exception as error:  # no network, a wrong key, ...: the disk is left
        reason = reason_of(error)
        wandb.teardown()  # otherwise the id counts as in use
    if run is None:
        run = wandb.init(**options, settings=settings, mode="offline")
    if run.offline:
        folder = run.settings.sync_dir
        reason = reason or "offline"
        console.warning(f"wandb: {reason}; to send the records later: wandb sync {folder}")
    return run
