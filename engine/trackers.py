"""The records of metrics.jsonl sent to Weights & Biases too, where `logging.wandb_log` asks for it.

The one idea: a tracker is company, never a condition. Whatever is missing or fails (the package, a
key, the network) costs one warning line; the run goes on, and records wait on the disk where wandb
can. It never asks for input. Keys are wandb's business and are neither read nor saved here.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from statistics import fmean
from typing import Any

from config import Config
from engine.metrics import warn

CONNECT_S, FINISH_S = 30, 60  # how long a network that is gone holds up the start and the end


class Tracker:
    """A run at Weights & Biases; `run_id` names it there, and a resumed run gives it again."""

    def __init__(self, run: Any, run_id: str) -> None:
        self._run = run  # None after a failure
        self.run_id = run_id

    @staticmethod
    def start(config: Config, name: str, run_id: str | None, folder: Path | None) -> Tracker | None:
        """None where the config asks for none or where it cannot be.

        `name` is for a run without `logging.wandb_run_name`. wandb keeps its files in
        `folder`/wandb; None: where WANDB_DIR says, else here.
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
            warn("wandb is not installed; training goes on without it. Install: pip install wandb")
        except Exception as error:  # anything: it must not end the run
            warn(f"wandb: {_reason(error)}; training goes on without it.")
        else:
            return Tracker(run, run_id)
        return None

    def log(self, record: dict[str, Any]) -> None:
        """Sends a record of metrics.jsonl under the same keys, lists as their mean."""
        values = {
            key: fmean(value) if isinstance(value, list) else value
            for key, value in record.items()
            if value is not None and value != []
        }
        self._attempt("log", values)

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
            warn(f"wandb: {_reason(error)}; training goes on without it.")


def _connected(options: dict[str, Any]) -> Any:
    """A run at wandb's server, or one on the disk with a warning that tells how to send it."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=CONNECT_S, finish_timeout=FINISH_S
    )
    wanted = wandb.setup(settings=settings).settings.mode  # WANDB_MODE, or online
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
        warn(f"wandb: {reason or 'offline'}; to send the records later: wandb sync {place}")
    return run


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
