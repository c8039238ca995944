"""Runs on several sources of text: where they differ, and their curves of each source."""

from __future__ import annotations

from dataclasses import replace

import pytest

import runs
from compare.curves import described, metrics_of
from compare.differences import differing_options, texts_differ
from compare.labels import descriptions
from compare.read import Run, read_run
from compare.report.content import report
from config import Config, SourceConfig
from tests.compare.run_directories import append, change_environment, make, make_run, stamp


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
