"""Where runs differ: options, machine and software, data. A value that a run lacks is `MISSING`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compare.reading.json_values import as_dict, as_str
from compare.reading.run import Run
from config import CheckpointError, schema
from engine.run_directory.experiment import is_text_path, own_options
from engine.run_directory.manifest import data_path, read_manifest, steps_in
from settings.schema import Effect

MISSING = "\u2013"
"""Stands for a value that a run did not write, or an option that it does not have. An en dash."""
# Keys of environment.json that are of the run or of one session, not of machine or software.
_NOT_MACHINE = {
    "time",
    "command",
    "resumed",
    "run",
    "config",
    "data",
    "parent",
    "ended",
    "step",
    "folder",
    "slurm_job",
}


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns option -> its value in each run, for options that differ and can change the result.

    Runs whose config cannot be read differ in nothing.
    """
    rows = _all_differing_options(runs)
    return {key: row for key, row in rows.items() if not has_effect(key, "none")}


def differing_without_effect(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns option -> its value in each run, for options that differ and only say where files go
    or what is shown."""
    rows = _all_differing_options(runs)
    return {key: row for key, row in rows.items() if has_effect(key, "none")}


def has_effect(key: str, *effects: Effect) -> bool:
    """Returns whether an option of this version has one of these effects on results."""
    option = schema().find(key)
    return option is not None and option.effect in effects


def equal_options(runs: Sequence[Run]) -> int:
    """Returns how many options have one value in all runs that have a config."""
    every = {key for run in runs for key in run.config}
    return len(every) - len(_all_differing_options(runs))


def differing_environment(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns versions, git revision, machine and processes of each run's newest session."""
    sessions = [_newest_session(run) for run in runs]
    return _differing_rows(sessions, (key for session in sessions for key in session))


def differing_data(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns under `fingerprint` that of each run's data, and under `ledger` the lines about the
    data that a run printed at its start, without lines that all runs printed."""
    data = [as_dict(run.environment.get("data")) for run in runs]
    fingerprints = [data_fingerprint(run) for run in runs]
    known = [{"fingerprint": each} if each else {} for each in fingerprints]
    lines = [_lines(each) for each in data]
    # A run without lines is of an older version: it does not make the lines of others different.
    shared = set.intersection(*(set(each) for each in lines if each)) if any(lines) else set()
    rest = [[line for line in each if line not in shared] for each in lines]
    return _differing_rows(known, ["fingerprint"]) | ({"ledger": rest} if any(rest) else {})


def texts_differ(runs: Sequence[Run]) -> bool:
    """Returns whether runs were evaluated on different text: by their options or, if they share a
    tokenizer, by the fingerprints of their data, which are taken of tokens."""
    rows = {k: row for k, row in _all_differing_options(runs).items() if has_effect(k, "text")}
    # A source may have its column or its held-out part from section dataset: only paths count.
    options = [key for key, row in rows.items() if is_text_path(key) or _differ(row)]
    tokenizers = {run.config.get("tokenizer.name") for run in runs if run.config}
    fingerprints = {data_fingerprint(run) for run in runs} - {""}
    return bool(options) or (len(tokenizers) == 1 and len(fingerprints) > 1)


def _all_differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    known = schema().options
    configs = [own_options(run.config) for run in runs]
    others = {key for config in configs for key in config} - known.keys()
    rows = dict[str, list[Any]]()
    for key in (*known, *sorted(others)):
        row = [config.get(key, MISSING) for config in configs]
        # An option of another version, a source and a path of text count as a difference from each
        # run that does not have them, unless that run's config cannot be read.
        having = {key in config for config in configs if config}
        lacking = len(having) > 1 and (key in others or is_text_path(key))
        if lacking or _differ(row):
            rows[key] = row
    return rows


def _differing_rows(
    columns: Sequence[Mapping[str, Any]], keys: Iterable[str]
) -> dict[str, list[Any]]:
    """Returns key -> its value in each column, where the columns that have it differ."""
    rows = {key: [column.get(key, MISSING) for column in columns] for key in keys}
    return {key: row for key, row in rows.items() if _differ(row)}


def _differ(row: Sequence[Any]) -> bool:
    known = [value for value in row if value is not MISSING]
    return any(value != known[0] for value in known)


def _newest_session(run: Run) -> dict[str, Any]:
    resumed = run.environment.get("resumed")
    newest = as_dict(resumed[-1]) if isinstance(resumed, list) and resumed else {}
    session = {k: v for k, v in {**run.environment, **newest}.items() if k not in _NOT_MACHINE}
    if as_str(session.get("git")):  # versions wrote it in full or shortened by git
        revision, *dirty = as_str(session["git"]).split("-")
        session["git"] = "-".join([revision[:12], *dirty])
    processes = run.size.get("processes")
    return ({} if processes is None else {"processes": processes}) | session


def data_fingerprint(run: Run) -> str:
    """Returns the fingerprint of a run's text: as the run wrote it, else of its newest readable
    checkpoint, else ''."""
    data = as_dict(run.environment.get("data"))
    if as_str(data.get("fingerprint")):
        return as_str(data["fingerprint"])
    for step in reversed(steps_in(run.path)):
        try:
            return as_str(read_manifest(data_path(run.path, step)).fingerprint)
        except CheckpointError:
            continue
    return ""


def _lines(data: Mapping[str, Any]) -> list[str]:
    lines = data.get("lines")
    return [as_str(line) for line in lines if as_str(line)] if isinstance(lines, list) else []
