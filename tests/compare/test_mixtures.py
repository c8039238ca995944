"""Runs on several sources of text: where they differ, and their curves of each source."""

from __future__ import annotations

from dataclasses import replace

import pytest

import runs
from compare.differences import MISSING, differing_options, texts_differ
from compare.labels import descriptions
from compare.plot.curves import described, metrics_of
from compare.reading.run import Run, read_run
from compare.report.content import report
from compare.statistics.paired import compare_runs
from compare.tables.diff import diff_lines, diff_values
from config import Config, SourceConfig
from tests.compare.run_directories import (
    append,
    change_environment,
    evaluation,
    make,
    make_run,
    stamp,
)


def make_mixed(name: str, web: float, folder: str = "w") -> Run:
    sources = (
        SourceConfig(name="web", weight=web, parquet_dir=folder),
        SourceConfig(name="code", weight=0.3, train_data_path="c.bin"),
    )
    config = Config()
    config = replace(config, dataset=replace(config.dataset, mixture=sources))
    path = make_run(name, state=None)
    (path / "config.yaml").write_text(config.to_yaml())
    change_environment(path, config={})
    append(path, stamp(400) | {"eval/val_loss": 2.0, "eval/val_loss/web": 2.2, "eval/rows": "r"})
    return read_run(path)


def test_mixtures_differ_by_the_options_of_their_sources() -> None:
    mixed = [make_mixed("run_a", 0.7), make_mixed("run_b", 0.5)]
    assert differing_options(mixed) == {"dataset.mixture.web.weight": [0.7, 0.5]}
    assert descriptions(mixed) == ["web.weight 0.7", "web.weight 0.5"]
    assert not texts_differ(mixed)  # the same rows are evaluated whatever the weights are
    assert texts_differ([mixed[0], make_mixed("run_c", 0.7, "other")])
    assert "dataset.mixture.web.weight" in differing_options([mixed[0], make("run_d")])
    assert not any(run.problems for run in mixed)


def test_a_run_has_no_difference_in_a_text_that_it_does_not_read() -> None:
    mixed, text = make_mixed("run_a", 0.7), make("run_b", "parquet_dir=text")
    tokens = make("run_c", "train_data_path=t.bin", "tokenizer.name=char")
    rows = differing_options([mixed, tokens])
    assert {key: row for key, row in rows.items() if key.startswith("dataset.")} == {
        "dataset.train_data_path": [MISSING, "t.bin"],
        "dataset.mixture.web.parquet_dir": ["w", MISSING],
        "dataset.mixture.web.weight": [0.7, MISSING],
        "dataset.mixture.code.train_data_path": ["c.bin", MISSING],
        "dataset.mixture.code.weight": [0.3, MISSING],
    }
    assert differing_options([mixed, text])["dataset.parquet_dir"] == [MISSING, "text"]
    assert "code.weight 0.3" in descriptions([mixed, text])[0]
    assert texts_differ([mixed, tokens])  # of other tokenizers, so fingerprints do not tell
    append(tokens.path, evaluation(500, [2.0] * 8, "other"))
    append(mixed.path, evaluation(500, [2.0] * 8))
    reason = compare_runs(mixed, tokens)
    assert "differ in dataset.train_data_path, tokenizer.name, dataset.mixture" in str(reason)


def add_evaluation(run: Run, web: list[float], code: list[float]) -> None:
    sources = {"eval/val_loss/web": 2.0, "eval/val_loss/code": 2.0}
    append(run.path, evaluation(500, web + code) | sources | {"eval/val_loss": 1.9})


def test_runs_are_compared_on_each_source() -> None:
    first, second = make_mixed("run_a", 0.7), make_mixed("run_b", 0.5)
    mixed = [first, second]
    add_evaluation(first, [3.0] * 5, [2.0] * 5)
    add_evaluation(second, [3.1, 3.2, 3.1, 3.2, 3.1], [1.9, 1.8, 1.9, 1.8, 1.9])
    pair = compare_runs(first, second)
    assert not isinstance(pair, str) and pair.verdict == "no difference shown"
    assert [own.verdict for own in pair.sources.values()] == ["worse", "better"]
    printed = [line.split()[:3] for line in diff_lines(mixed)[-3:-1]]
    assert printed == [["on", "web", "+0.1400"], ["on", "code", "-0.1400"]]
    assert diff_values(mixed)["against_first"][0]["sources"]["code"]["verdict"] == "better"
    assert report(mixed)["pairs"][0]["details"][-1].startswith("On code -0.1400 (")


def test_a_source_with_too_few_batches_is_not_compared_alone() -> None:
    first, second = make_mixed("run_a", 0.7), make_mixed("run_b", 0.5)
    for run in (first, second):
        add_evaluation(run, [2.0] * 4, [2.0] * 4)
    pair = compare_runs(first, second)
    assert not isinstance(pair, str) and pair.batches == 8 and pair.sources == {}


def test_the_metric_that_sorts_a_list_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    make_mixed("run_a", 0.7)
    make("run_b")
    for key, shown in (("eval/val_loss/web", True), ("-eval/val_loss", False), ("lr", False)):
        assert runs.main(["list", "--sort", key]) == 0
        heading, *rows = capsys.readouterr().out.splitlines()
        assert heading.endswith("val_loss/web") == shown
        assert [row.split()[-1] for row in rows] == (["2.2", "-"] if shown else ["nf4", "nf4"])


def test_runs_are_chosen_by_the_weight_of_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    make_mixed("run_a", 0.7)
    make_mixed("run_b", 0.5)
    assert runs.main(["list", "--filter", "mixture.web.weight=0.5"]) == 0
    listed = capsys.readouterr().out
    assert "run_b" in listed and "run_a" not in listed


def test_the_loss_on_a_source_is_a_curve_beside_that_on_all() -> None:
    run = make_mixed("run_a", 0.7)
    order = metrics_of([run])
    assert order.index("eval/val_loss/web") == order.index("eval/val_loss") + 1
    assert described("eval/val_loss/web").label == "Held-out loss, web (nats per token)"
    titles = [panel["title"] for panel in report([run])["panels"]]
    assert "Held-out loss, web" in titles
