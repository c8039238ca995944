"""A run that `train.py --reproduce` repeats: from its directory, or from a report page alone.

A page is text of others: its values are read by json, the config goes through the checks of any
config, and nothing in it is run. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.differences import data_fingerprint
from compare.reading.json_values import as_count, as_dict, as_str
from compare.reading.run import path_of, read_run
from config import Config, ConfigError, DataError
from engine.run_directory.fork import parent_step
from engine.run_directory.manifest import MAX_BYTES, steps_in
from engine.run_directory.saved_config import config_of_step
from files.regular import read_regular
from settings.terminal import printable

_PAGES = (".html", ".htm")
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script', re.DOTALL)


@dataclass(frozen=True)
class Original:
    """What a run recorded of itself, and where its repetition begins."""

    name: str
    config: Config
    """As it was at the first step that is repeated."""
    environment: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    path: Path | None
    """The run directory; None where only a page is there."""
    fingerprint: str
    """Of its data; empty where it is unknown."""
    checkpoint: Path | None = None
    """Where the repetition begins; None: where the run did."""
    step: int = 0
    """The steps that are done there."""


def find_original(word: str) -> Original:
    """Returns the run meant by a run directory, a checkpoint or config.yaml in one, or a report
    page, `report.html#NAME`; raises DataError, and ConfigError for a config that cannot be used."""
    page, _, name = (
        word.rpartition("#") if "#" in word and not Path(word).exists() else (word, "", "")
    )
    if Path(page).suffix.lower() in _PAGES:
        return _from_page(Path(page), name)
    path = path_of(word)
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix not in (".pt", ".yaml"):
        raise DataError(f"{path}: neither a run, a checkpoint, its config.yaml nor a report page.")
    run = read_run(folder)
    checkpoint = path if path.suffix == ".pt" else None
    step = _step_of(path) if checkpoint else parent_step(run.environment)
    return Original(
        run.name,
        config_of_step(folder, step + 1),
        run.environment,
        run.records,
        folder,
        data_fingerprint(run),
        checkpoint=checkpoint,
        step=step,
    )


def _step_of(path: Path) -> int:
    for step in steps_in(path.parent):
        if path.name == f"checkpoint_{step}.pt":
            return step
    raise DataError(f"{path} is not a checkpoint of a run: it has no manifest.")


# ---- a report page


def _from_page(page: Path, name: str) -> Original:
    runs = {as_str(each.get("name")): each for each in _runs_of_page(page)}
    known = printable(", ".join(runs))
    if name and name not in runs:
        raise DataError(f"{page} holds no run {printable(name)}: {known}.")
    if not name and len(runs) > 1:
        raise DataError(f"{page} holds {len(runs)} runs: {known}. Name one: {page}#NAME.")
    found = runs[name] if name else next(iter(runs.values()))
    records, environment = found.get("records"), as_dict(found.get("environment"))
    return Original(
        name=as_str(found.get("name")),
        config=_config(page, as_dict(found.get("config"))),
        environment=environment,
        records=[
            record
            for record in (records if isinstance(records, list) else [])
            if isinstance(record, dict) and as_count(record.get("step")) is not None
        ],
        path=None,
        fingerprint=as_str(as_dict(environment.get("data")).get("fingerprint")),
        step=parent_step(environment),
    )


def _runs_of_page(page: Path) -> list[Mapping[str, Any]]:
    """Returns what the page holds of each run to repeat it."""
    try:
        found = _DATA.search(read_regular(page, MAX_BYTES).decode("utf-8", "replace"))
        content = json.loads(found[1]) if found else None
    except OSError as error:
        raise DataError(f"{page}: cannot be read: {os.strerror(error.errno or 0)}.") from error
    except (ValueError, RecursionError):
        content = None
    runs = as_dict(content).get("runs")
    runs = runs if isinstance(runs, list) else []
    originals = [as_dict(as_dict(run).get("reproduce")) for run in runs]
    originals = [run for run in originals if run.get("config")]
    if not originals:
        raise DataError(f"{page} is not a page of `runs.py report` that holds runs to repeat.")
    return originals


def _config(page: Path, flat: Mapping[str, Any]) -> Config:
    try:
        return Config.from_flat(flat, str(page))
    except ConfigError as error:
        raise ConfigError(printable(str(error))) from None
