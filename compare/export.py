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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare.labels import names
from compare.output import check_folder, write_by
from compare.reading.json_values import as_count, as_float, finite
from compare.reading.records import read_records
from compare.reading.run import Run, find_runs, path_of, read_run
from compare.report.text import utf8_text
from config import ConfigError, schema
from files.atomic import HashedFile

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".parquet", ".jsonl")
_STAMP = ("step", "time", "tokens")
_OF_ROW = {
    "step": "int64",
    "time": "float64",
    "tokens": "int64",
    "metric": "string",
    "value": "float64",
    "text": "string",
}
"""Columns whose value is another one in each row, and their types; the others are of a run."""
_BATCH_ROWS = 1 << 16


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

    columns = _columns(runs)
    return pa.Table.from_batches(_batches(runs, columns, metrics, []), columns)


def export(
    runs: Sequence[Run], output: Path, problems: list[str], metrics: Sequence[str] = ()
) -> int:
    """Writes the table of runs as CSV, parquet or lines of JSON, by the file's suffix; returns how
    many rows it has. Raises WriteError, and ConfigError for an unknown suffix or metric.

    problems: gets a line for what could not be read of a run's records.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: a table ends in .csv, .parquet or .jsonl.")
    check_folder(output)
    columns, rows = _columns(runs), 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in _batches(runs, columns, metrics, problems):
            rows += batch.num_rows
            yield batch

    def fill(file: HashedFile) -> None:
        if output.suffix == ".jsonl":
            _write_lines(file, counted())
        else:
            _write_columns(_Sink(file), output.suffix, columns, counted())

    write_by(output, fill)
    return rows


class _Sink(io.RawIOBase):
    """The file as pyarrow wants one."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(memoryview(data))


def _write_columns(
    sink: _Sink, suffix: str, columns: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    with (
        csv.CSVWriter(sink, columns)
        if suffix == ".csv"
        else parquet.ParquetWriter(sink, columns, compression="zstd")
    ) as writer:
        # Each piece is a row group of a parquet file: of a thousand short runs they would be tiny.
        held = list[pa.RecordBatch]()
        for batch in batches:
            held.append(batch)
            if sum(each.num_rows for each in held) >= _BATCH_ROWS:
                writer.write(pa.Table.from_batches(held))
                held = []
        if held:
            writer.write(pa.Table.from_batches(held))


def _write_lines(file: HashedFile, batches: Iterator[pa.RecordBatch]) -> None:
    for batch in batches:
        # What is of the run is the same in all rows of a batch, and most of a line.
        (of_run,) = batch.slice(0, 1).drop_columns(list(_OF_ROW)).to_pylist()
        end = json.dumps(finite(of_run))[1:]
        rows = (json.dumps(row)[:-1] for row in batch.select(list(_OF_ROW)).to_pylist())
        while lines := "".join(f"{row}, {end}\n" for row in islice(rows, 1000)):
            file.write(lines.encode())


def _columns(runs: Sequence[Run]) -> pa.Schema:
    """Returns the names and types of all columns."""
    import pyarrow as pa

    options = [(f"config.{key}", _option_type(key, runs)) for key in _options(runs)]
    return pa.schema([("run", pa.string()), ("path", pa.string()), *_OF_ROW.items(), *options])


def _batches(
    runs: Sequence[Run], columns: pa.Schema, metrics: Sequence[str], problems: list[str]
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one run after the other, in batches, so that the records of one run alone
    are in memory. Raises ConfigError at the end for a metric that no run has."""
    import pyarrow as pa

    missing = dict.fromkeys(metrics)
    for run, name in zip(runs, names(runs), strict=True):
        records, lost = read_records(run.path)  # `run.records` would stay in memory
        problems += [f"{name}: {line}" for line in lost if line not in run.problems]
        of_run = {"run": utf8_text(name), "path": utf8_text(str(run.path))}
        of_run |= {f"config.{key}": value for key, value in run.config.items()}
        rows = _rows(records, metrics)
        while part := list(islice(rows, _BATCH_ROWS)):
            for row in part if missing else ():
                missing.pop(row["metric"], None)
            arrays = [
                pa.array([row[column.name] for row in part], column.type)
                if column.name in _OF_ROW
                else pa.repeat(_scalar(of_run.get(column.name), column.type), len(part))
                for column in columns
            ]
            yield pa.record_batch(arrays, schema=columns)
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no run has this metric.")


def _rows(records: Sequence[dict[str, Any]], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields a dict per metric of each record."""
    for record in records:
        stamp = {
            "step": record["step"],
            "time": as_float(record.get("time")),
            "tokens": as_count(record.get("tokens")),
        }
        for metric in metrics or record:
            if metric in record and metric not in _STAMP:
                value = _number(record[metric])
                text = None if value is not None else _text(record[metric])
                yield stamp | {"metric": utf8_text(metric), "value": value, "text": text}


def _number(value: Any) -> float | None:
    number = as_float(value)
    return None if number is None else float(number)  # pyarrow makes no float of an int over 2^53


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


def _option_type(key: str, runs: Sequence[Run]) -> pa.DataType:
    """Returns the type of an option's column: that which this version declares or, if a run has
    something else, such as `auto`, that of text."""
    import pyarrow as pa

    option, values = schema().find(key), [run.config.get(key) for run in runs]
    known = {type(value) for value in values if value is not None}
    kind = option.kind if option else None
    if kind is bool and known <= {bool}:
        return pa.bool_()
    if kind is int and known <= {int} and all(abs(value or 0) < 2**63 for value in values):
        return pa.int64()
    return pa.float64() if kind is float and known <= {float, int} else pa.string()


def _scalar(value: Any, kind: pa.DataType) -> pa.Scalar:
    """Returns a value of a whole run in the type of its column."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        return pa.scalar(_text(value), kind)
    return pa.scalar(_number(value) if pa.types.is_floating(kind) else value, kind)
