"""Records of runs as a table: `runs.py export` and `compare.export.table`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

import runs
from compare.export import table
from compare.reading.run import read_run
from tests.compare.run_directories import append, change_environment, make_run, stamp
from tests.compare.test_runs import Captured, output, refused

CONFIG = "config.training.learning_rate"


def rows(found: Any, **wanted: Any) -> list[dict[str, Any]]:
    """Returns the rows that have these values."""
    every: list[dict[str, Any]] = found.to_pylist()
    return [row for row in every if wanted.items() <= row.items()]


def test_each_metric_of_each_record_is_a_row_beside_its_config() -> None:
    make_run("run_a", "learning_rate=3e-4", losses=(4.0, None), sample='egg, "hatched"\n')
    make_run("run_b", "batch_size=4", losses=(4.0,))
    found = table(["checkpoints"])
    records = [read_run(Path("checkpoints") / name).records for name in ("run_a", "run_b")]
    metrics = [record.keys() - {"step", "time", "tokens"} for own in records for record in own]
    assert found.num_rows == sum(map(len, metrics))
    (loss,) = rows(found, run="run_a", metric="eval/val_loss", step=100)
    assert (loss["value"], loss["text"], loss[CONFIG]) == (4.0, None, 3e-4)
    assert (loss["time"], loss["tokens"], loss["path"]) == (5.0, 409600, "checkpoints/run_a")
    (lost,) = rows(found, run="run_a", metric="eval/val_loss", step=200)
    assert (lost["value"], lost["text"]) == (None, None)
    (sample,) = rows(found, metric="eval/sample", step=100)
    assert sample["text"] == 'egg, "hatched"\n at step 100'
    (losses,) = rows(found, run="run_b", metric="eval/val_losses")
    assert json.loads(losses["text"]) == records[1][-2]["eval/val_losses"]
    assert rows(found, run="run_b")[0]["config.training.batch_size"] == 4


def test_columns_have_the_types_of_their_options_whatever_runs_hold() -> None:
    path = make_run("run_a", "learning_rate=1", losses=(4.0,))
    types = dict(zip(table().schema.names, table().schema.types, strict=True))
    assert types[CONFIG] == pa.float64()
    assert types["config.training.batch_size"] == types["config.training.epochs"] == pa.int64()
    assert types["config.system.device"] == types["text"] == pa.string()
    # A copy of a config that another version, or nobody, wrote.
    copy = json.loads((path / "environment.json").read_text())["config"]
    copy["values"]["training"] |= {"learning_rate": "fast", "epochs": 2**70, "batch_size": "auto"}
    copy["values"]["later"] = {"warp": 9}
    change_environment(path, config=copy)
    (row, *_) = table().to_pylist()
    assert (row[CONFIG], row["config.training.epochs"]) == ("fast", str(2**70))
    assert (row["config.training.batch_size"], row["config.later.warp"]) == ("auto", "9")


def test_the_three_forms_of_file_hold_the_table(capsys: Captured) -> None:
    make_run("run_a", losses=(4.0, None), sample='egg, "hatched"\n')
    make_run("run_b", "n_layer=2", losses=(4.0,))
    for name in ("runs.csv", "runs.parquet", "runs.jsonl"):
        text = output(capsys, "export", "checkpoints", "-o", name)
        assert text == f"Wrote {name}: {table().num_rows} rows of 2 runs\n"
    found = table()
    assert pa.parquet.read_table("runs.parquet").equals(found)
    lines = [json.loads(line) for line in Path("runs.jsonl").read_text().splitlines()]
    assert lines == found.to_pylist()
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    convert = pa.csv.ConvertOptions(
        column_types=found.schema, strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    read = pa.csv.read_csv("runs.csv", parse_options=parse, convert_options=convert)
    assert read.to_pylist() == found.to_pylist()


@pytest.mark.parametrize("name", ["runs.csv", "runs.parquet", "runs.jsonl"])
def test_a_table_is_written_in_pieces_of_any_size(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    paths = [make_run(f"run_{n}", losses=losses) for n, losses in enumerate([(4.0,), (), (3.0,)])]
    output(capsys, "export", "checkpoints", "-o", name)
    whole = Path(name).read_bytes()
    monkeypatch.setattr("compare.export._BATCH_ROWS", 7)
    output(capsys, "export", "checkpoints", "-o", name)
    pieces = Path(name).read_bytes()
    if name == "runs.parquet":
        assert pa.parquet.ParquetFile(name).num_row_groups > 1
        assert pa.parquet.read_table(name).equals(table())
    else:
        assert pieces == whole
    # Lost records are told, and a metric that no run has leaves the file as it was.
    lines = (paths[0] / "metrics.jsonl").read_bytes()
    (paths[0] / "metrics.jsonl").write_bytes(lines.replace(b'"step"', b'"stop"', 1))
    assert runs.main(("export", "checkpoints", "-o", name)) == 0
    assert "run_0: metrics.jsonl: " in capsys.readouterr().err
    before = Path(name).read_bytes()
    assert runs.main(("export", "checkpoints", "-o", name, "--metric", "no")) == 2
    assert Path(name).read_bytes() == before


def test_metrics_can_be_chosen(capsys: Captured) -> None:
    make_run("run_a")
    words = ("export", "run_a", "--metric", "eval/val_loss", "--metric", "train/loss", "--json")
    found = json.loads(output(capsys, *words, "-o", "a.parquet"))
    assert found == {"output": "a.parquet", "rows": 15, "runs": ["checkpoints/run_a"]}
    assert set(pa.parquet.read_table("a.parquet")["metric"].to_pylist()) == {
        "eval/val_loss",
        "train/loss",
    }
    message = refused(capsys, "export", "run_a", "--metric", "loss")
    assert message == "loss: no run has this metric."


def test_names_that_are_no_text_and_values_that_json_has_not_are_written(capsys: Captured) -> None:
    path = make_run("run_\udcff", losses=(4.0,))
    append(path, stamp(100) | {"odd\nkey": 2**60 + 1, "deep": {"a": [None]}, "flag": True})
    copy = json.loads((path / "environment.json").read_text())["config"]
    copy["values"]["training"]["learning_rate"] = math.inf
    change_environment(path, config=copy)
    output(capsys, "export", "checkpoints", "-o", "runs.jsonl")
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in Path("runs.jsonl").read_text().splitlines()
    ]
    by_metric = {line["metric"]: line for line in lines}
    assert by_metric["odd\nkey"]["run"] == "run_?"
    assert by_metric["odd\nkey"]["value"] == float(2**60 + 1)
    assert (by_metric["deep"]["text"], by_metric["flag"]["text"]) == ('{"a": [null]}', "true")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("runs.xlsx", 2, "runs.xlsx: a table ends in .csv, .parquet or .jsonl."),
        ("no/runs.csv", 5, "there is no folder no"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    capsys: Captured, name: str, code: int, message: str
) -> None:
    make_run("run_a")
    assert message in refused(capsys, "export", "run_a", "-o", name, code=code)
