"""All records of runs as one table in long form, for pandas, polars, R or DuckDB.

    from compare.export import table
    table(["checkpoints"]).to_pandas()

Each metric of each record of metrics.jsonl is a row: run, path, step, time, tokens, metric, and
`value`, or `text` for what is no number: words as they are, lists (such as the loss of each batch)
as JSON. A loss that was not finite has neither. Every option is a column `config.SECTION.NAME`,
also those at their default, so that tables of different runs can be put below each other.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare.labels import names
from compare.output import check_folder, write
from compare.reading.json_values import as_count, as_float, finite
from compare.reading.run import Run, find_runs, path_of, read_run
from compare.report.text import utf8_text
from config import ConfigError, schema

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".parquet", ".jsonl")
_STAMP = ("step", "time", "tokens")


def table(paths: Sequence[str | os.PathLike[str]] = ()) -> pa.Table:
    """Returns the records of runs, named as on the command line, as a table; raises DataError.

    paths: runs, folders of them, or parts of names; none: all in `checkpoints`.
    """
    found = find_runs([path_of(os.fspath(path)) for path in paths])
    return to_table([read_run(path) for path in found])


def to_table(runs: Sequence[Run], metrics: Sequence[str] = ()) -> pa.Table:
    """Returns the records of runs as a table.

    metrics: only these. Raises ConfigError for one that no run has.
    """
    import pyarrow as pa  # 0.2 s, which `runs.py list` does not wait for

    by_run = [list(_rows(run, metrics)) for run in runs]
    known = {row["metric"] for rows in by_run for row in rows}
    if unknown := [metric for metric in metrics if metric not in known]:
        raise ConfigError(f"{', '.join(unknown)}: no run has this metric.")
    of_row = {
        "step": pa.int64(),
        "time": pa.float64(),
        "tokens": pa.int64(),
        "metric": pa.string(),
        "value": pa.float64(),
        "text": pa.string(),
    }
    # What is of a whole run is written once for each run, and then taken for each of its rows.
    owner = pa.array([place for place, rows in enumerate(by_run) for _ in rows], pa.int32())
    columns = {"run": pa.array([*map(utf8_text, names(runs))], pa.string()).take(owner)}
    columns["path"] = pa.array([utf8_text(str(run.path)) for run in runs], pa.string()).take(owner)
    for name, kind in of_row.items():
        columns[name] = pa.array([row.get(name) for rows in by_run for row in rows], kind)
    for key in _options(runs):
        columns[f"config.{key}"] = _option_column(key, runs).take(owner)
    return pa.table(columns)


def export(runs: Sequence[Run], output: Path, metrics: Sequence[str] = ()) -> int:
    """Writes the table of runs as CSV, parquet or lines of JSON, by the file's suffix; returns how
    many rows it has. Raises WriteError, and ConfigError for an unknown suffix or metric."""
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: a table ends in .csv, .parquet or .jsonl.")
    check_folder(output)
    found = to_table(runs, metrics)
    write(output, _encoded(found, output.suffix))
    return int(found.num_rows)


def _encoded(found: pa.Table, suffix: str) -> bytes:
    if suffix == ".jsonl":
        lines = (
            json.dumps(finite(row)) for batch in found.to_batches() for row in batch.to_pylist()
        )
        return "".join(f"{line}\n" for line in lines).encode()
    file = io.BytesIO()
    if suffix == ".csv":
        from pyarrow import csv

        csv.write_csv(found, file)
    else:
        from pyarrow import parquet

        parquet.write_table(found, file, compression="zstd")
    return file.getvalue()


def _rows(run: Run, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields a dict per metric of each record."""
    for record in run.records:
        stamp = {
            "step": record["step"],
            "time": as_float(record.get("time")),
            "tokens": as_count(record.get("tokens")),
        }
        for metric in metrics or record:
            if metric in record and metric not in _STAMP:
                value = as_float(record[metric])
                text = None if value is not None else _text(record[metric])
                value = None if value is None else float(value)  # pyarrow takes no int over 2^53
                yield stamp | {"metric": utf8_text(metric), "value": value, "text": text}


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return utf8_text(value) if isinstance(value, str) else json.dumps(value)


def _options(runs: Sequence[Run]) -> list[str]:
    """Returns the options of the runs: those of this version in its order, then others."""
    every = {key for run in runs for key in run.config}
    return [
        *(key for key in schema().options if key in every),
        *sorted(every - {*schema().options}),
    ]


def _option_column(key: str, runs: Sequence[Run]) -> pa.Array:
    """Returns an option's value in each run: of the type that this version declares or, if a run
    has something else, such as `auto`, as text."""
    import pyarrow as pa

    option, values = schema().find(key), [run.config.get(key) for run in runs]
    known = {type(value) for value in values if value is not None}
    kind = option.kind if option else None
    if kind is bool and known <= {bool}:
        return pa.array(values, pa.bool_())
    if kind is int and known <= {int} and all(abs(value or 0) < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if kind is float and known <= {float, int}:
        return pa.array([as_float(value) for value in values], pa.float64())
    return pa.array([_text(value) for value in values], pa.string())
