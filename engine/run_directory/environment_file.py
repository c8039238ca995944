"""environment.json: what a run is, its sessions, and how the last one ended. Imports no torch.

The file carries a sha256 of its other keys. It tells how long metrics.jsonl was when it was last
written, and holds a copy of the config, since config.yaml is the user's to copy and edit. Files of
earlier versions have none of this and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import Config
from engine.run_directory.manifest import ENVIRONMENT, MAX_BYTES
from files.atomic import atomic_write_text
from files.regular import read_regular

METRICS_BYTES = "metrics_bytes"
"""Key: the length of metrics.jsonl at the newest save, resume or end."""


class EnvironmentFile:
    """What the present session writes to environment.json.

    Args:
        config: as saved in config.yaml.
        facts: `device`, `threads` and versions of `cuda` of this session; `run` and `data` in
            numbers.
    """

    def __init__(self, config: Config, facts: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = {}
        self._config = config
        self._facts = facts

    def begin(self, config_text: str) -> None:
        """Describes the first session of a run."""
        self.values = {**self._session(), "resumed": [], **self._run(config_text, None)}

    def resume(
        self, earlier: dict[str, Any], step: int, config_text: str, replaced: str | None
    ) -> None:
        """Adds this session, which goes on from `step`, to what earlier sessions wrote.

        replaced: the sha256 of the config.yaml that this session replaces.
        """
        sessions = earlier.get("resumed")
        sessions = sessions if isinstance(sessions, list) else []
        resumed = [*sessions, {"step": step, **self._session()}]
        kept = {key: value for key, value in earlier.items() if key != "ended"}
        self.values = kept | {"resumed": resumed} | self._run(config_text, replaced)

    def save(self, folder: Path, metrics_bytes: int) -> None:
        """Writes the file; raises OSError."""
        self.values[METRICS_BYTES] = metrics_bytes
        atomic_write_text(folder / ENVIRONMENT, environment_text(self.values))

    def _session(self) -> dict[str, Any]:
        # Imported here because only a run that starts needs it: platform and importlib.metadata
        # would make `runs.py`, which only reads this file, a tenth slower to start.
        from engine.run_directory.environment import describe_session

        processes = self._facts.get("run", {}).get("processes", 1)
        session = describe_session(str(self._facts.get("device", ""))) | {"processes": processes}
        session["threads"] = self._facts.get("threads")
        cuda = self._facts.get("cuda")
        return session | {"cuda": cuda} if cuda else session

    def _run(self, config_text: str, replaced: str | None) -> dict[str, Any]:
        of_session = ("device", "cuda", "threads")
        facts = {key: value for key, value in self._facts.items() if key not in of_session}
        return facts | {"config": config_copy(self._config, config_text, replaced)}


def environment_text(values: Mapping[str, Any]) -> str:
    """Returns environment.json with its checksum."""
    return json.dumps({**values, "checksum": _digest(values)}, indent=2) + "\n"


def read_environment(folder: Path) -> dict[str, Any]:
    """Returns environment.json without its checksum; raises OSError, and ValueError for damage."""
    try:
        values = json.loads(read_regular(folder / ENVIRONMENT, MAX_BYTES))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError("damaged, not a JSON object")
    checksum = values.pop("checksum", None)
    if checksum not in (None, _digest(values)):
        raise ValueError("damaged, its checksum does not match")
    return values


def sessions_of(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what each session of a run wrote, the first one first."""
    resumed = environment.get("resumed")
    found = [environment, *(resumed if isinstance(resumed, list) else [])]
    return [session for session in found if isinstance(session, dict)]


def session_of_step(environment: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns what the session wrote that trained a step, counted from 1: the last one that began
    before it."""
    began = [session for session in sessions_of(environment) if _begin_of(session) < step]
    return began[-1] if began else {}


def _begin_of(session: Mapping[str, Any]) -> int:
    step = session.get("step")
    return step if isinstance(step, int) else 0


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def config_copy(config: Config, text: str, replaced: str | None) -> dict[str, Any]:
    """Returns what environment.json holds of the config that is saved as `text`.

    replaced: the sha256 of the config.yaml that it replaces. environment.json is written first, so
    a crash in between leaves the older config.yaml, which is not damaged.
    """
    saved = hashlib.sha256(text.encode()).hexdigest()
    return {"sha256": saved, "replaces": replaced, "values": config.to_dict()}
