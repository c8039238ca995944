"""Where runs differ: settings, machine and software, data. What a run does not say is `MISSING`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compare.records import mapping, text
from compare.run import Run
from config import CheckpointError, schema
from engine.run_directory.manifest import data_path, read_manifest, steps_in
from settings.schema import Effect

MISSING = "?"
"""The value of what a run does not tell, or does not know."""
_NOT_OF_THE_MACHINE = {
    "time",
    "command",
    "resumed",
    "run",
    "config",
    "data",
    "ended",
    "step",
    "folder",
}


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Option -> its value in each run, where two runs differ in it and it can change the result.

    Runs whose config cannot be read differ in nothing.
    """
    harmless = options_with_effect("none")
    return {k: v for k, v in _all_differing(runs).items() if k not in harmless}


def differing_without_effect(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The same for options that only say where files go or who is told."""
    harmless = options_with_effect("none")
    return {k: v for k, v in _all_differing(runs).items() if k in harmless}


def options_with_effect(*effects: Effect) -> set[str]:
    """Returns the options with one of these effects on results."""
    return {key for key, option in schema().options.items() if option.effect in effects}


def equal_options(runs: Sequence[Run]) -> int:
    """How many options have one value in all runs that have a config."""
    every = {key for run in runs for key in run.config}
    return len(every) - len(_all_differing(runs))


def differing_environment(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Versions, revision, machine and number of processes, of the newest session of each run."""
    sessions = [_newest_session(run) for run in runs]
    return _known(sessions, (key for session in sessions for key in session))


def differing_data(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fingerprint of the text, and lines of the data ledger that not all runs say."""
    told = [mapping(run.environment.get("data")) for run in runs]
    prints = [
        {"fingerprint": _fingerprint(run, data)} for run, data in zip(runs, told, strict=True)
    ]
    known = [{k: v for k, v in one.items() if v} for one in prints]
    lines = [_lines(data) for data in told]
    said = [set(of_run) for of_run in lines if of_run]
    shared = set.intersection(*said) if said else set()
    rest = [[line for line in of_run if line not in shared] for of_run in lines]
    return _known(known, ["fingerprint"]) | ({"ledger": rest} if any(rest) else {})


def texts_differ(runs: Sequence[Run]) -> bool:
    """Whether runs were held against other text: their options say so, or, with one tokenizer, what
    identifies their data."""
    keys = options_with_effect("text")
    said = {tuple(run.config.get(key) for key in keys) for run in runs if run.config}
    tokenizers = {run.config.get("tokenizer.name") for run in runs if run.config}
    prints = {_fingerprint(run, mapping(run.environment.get("data"))) for run in runs} - {""}
    return len(said) > 1 or (len(tokenizers) == 1 and len(prints) > 1)


def _all_differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    unknown = sorted({key for run in runs for key in run.config} - set(schema().options))
    columns = [_of_its_model(run.config) for run in runs]
    absent = {key: [column.get(key, MISSING) for column in columns] for key in unknown}
    # An option of another version is a difference from the runs that do not have it.
    readable = [number for number, column in enumerate(columns) if column]
    apart = {k: row for k, row in absent.items() if any(row[n] is MISSING for n in readable)}
    return _known(columns, schema().options) | _known(columns, unknown) | apart


def _of_its_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the options of other models, which keep their defaults in every run."""
    own = config.get("model.name")
    others = {
        k for k, option in schema().options.items() if option.models and own not in option.models
    }
    return {key: value for key, value in config.items() if own is None or key not in others}


def _known(columns: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, list[Any]]:
    """Key -> a value per column, where columns that say something of it differ."""
    rows = {key: [column.get(key, MISSING) for column in columns] for key in keys}
    told = {key: [value for value in row if value is not MISSING] for key, row in rows.items()}
    return {key: row for key, row in rows.items() if any(v != told[key][0] for v in told[key])}


def _newest_session(run: Run) -> dict[str, Any]:
    resumed = run.environment.get("resumed")
    newest = mapping(resumed[-1]) if isinstance(resumed, list) and resumed else {}
    told = {**run.environment, **newest}
    session = {key: value for key, value in told.items() if key not in _NOT_OF_THE_MACHINE}
    if text(session.get("git")):  # as git itself shortens it
        revision, *dirty = text(session["git"]).split("-")
        session["git"] = "-".join([revision[:12], *dirty])
    processes = run.facts.get("processes")
    return ({} if processes is None else {"processes": processes}) | session


def _fingerprint(run: Run, data: Mapping[str, Any]) -> str:
    """As the run says, or its newest checkpoint that can be read; empty if unknown."""
    if text(data.get("fingerprint")):
        return text(data["fingerprint"])
    for step in reversed(steps_in(run.path)):
        try:
            return text(read_manifest(data_path(run.path, step)).fingerprint)
        except CheckpointError:
            continue
    return ""


def _lines(data: Mapping[str, Any]) -> list[str]:
    lines = data.get("lines")
    return [text(line) for line in lines if text(line)] if isinstance(lines, list) else []
