"""A run that `train.py --reproduce` repeats: from its directory, or from a report page alone.

A page is text of others: its elements are read by html.parser and its values by json, the config
goes through the checks of any config, and nothing in it is run. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from compare.differences import data_fingerprint
from compare.reading.json_values import as_count, as_dict, as_str
from compare.reading.run import path_of, read_run
from config import Config, ConfigError, DataError, schema
from engine.run_directory.fork import PARENT
from engine.run_directory.manifest import MAX_BYTES, steps_in
from engine.run_directory.saved_config import config_of_step
from files.regular import read_regular
from settings.entries import nested_options
from settings.terminal import printable

_PAGES = (".html", ".htm")


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
    step = _step_of(path) if checkpoint else _step_of_fork(run.environment)
    try:
        config = config_of_step(folder, step + 1)
    except OSError as error:
        raise DataError(f"{folder}: its config cannot be read: {error.strerror}.") from error
    return Original(
        run.name,
        config,
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


def _step_of_fork(environment: Mapping[str, Any]) -> int:
    """Returns the step at which a fork begins; 0 for another run."""
    return as_count(as_dict(environment.get(PARENT)).get("step")) or 0


# ---- a report page


class _DataElement(HTMLParser):
    """Collects the text of the page's `<script type="application/json" id="data">`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script" and ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts.append(data)


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
        step=_step_of_fork(environment),
    )


def _runs_of_page(page: Path) -> list[Mapping[str, Any]]:
    """Returns what the page holds of each run to repeat it."""
    element = _DataElement()
    try:
        element.feed(read_regular(page, MAX_BYTES).decode("utf-8", "replace"))
        content = json.loads("".join(element.texts))
    except OSError as error:
        raise DataError(f"{page}: cannot be read: {os.strerror(error.errno or 0)}.") from error
    # html.parser asserts that a declaration is one it knows.
    except (ValueError, RecursionError, AssertionError):
        content = None
    runs = as_dict(content).get("runs")
    found = (
        [as_dict(as_dict(run).get("reproduce")) for run in runs] if isinstance(runs, list) else []
    )
    found = [run for run in found if run.get("config")]
    if not found:
        raise DataError(f"{page} is not a page of `runs.py report` that holds runs to repeat.")
    return found


def _config(page: Path, flat: Mapping[str, Any]) -> Config:
    lists = [key for key, option in schema().options.items() if option.entry_options]
    try:
        return Config.from_dict(nested_options(flat, lists), str(page))
    except ConfigError as error:
        raise ConfigError(printable(str(error))) from None
