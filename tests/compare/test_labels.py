"""Labels of runs: what tells the runs of a set apart, in a few words."""

from __future__ import annotations

import pytest

from compare.labels import LONGEST, descriptions, labels, names
from compare.reading.run import Run, read_run
from tests.compare.run_directories import make


def make_all(*options: str) -> list[Run]:
    """Makes a run per text of options, named by the time of day."""
    return [
        make(f"run_20251108_14000{n}", *text.split(), losses=(3.0,))
        for n, text in enumerate(options)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["model.name=llama learning_rate=0.004", "model.name=gpt learning_rate=0.001"],
            ["llama, lr 0.004", "gpt, lr 0.001"],
        ),
        (["learning_rate=1e-5", "learning_rate=3e-4"], ["lr 1e-5", "lr 0.0003"]),
        (["use_fp8=true", ""], ["fp8", "no fp8"]),  # `no` only if there is nothing else
        (
            ["use_fp8=true", "learning_rate=0.002", ""],
            ["lr 0.001, fp8", "lr 0.002", "lr 0.001"],
        ),
        (["", ""], ["140000", "140001"]),
        (
            ["n_layer=2", "n_layer=2", "n_layer=3"],
            ["n_layer 2, 140000", "n_layer 2, 140001", "n_layer 3"],
        ),
        ([""], ["run_20251108_140000"]),
        (
            ["parquet_dir=/a/b/stories", "parquet_dir=/c/code/"],
            ["parquet_dir stories", "parquet_dir code"],
        ),
        (
            ["optimizer.name=muon batch_size=8", "batch_size=16"],
            ["muon, batch 8", "adamw, batch 16"],
        ),
        (["tokenizer.name=gpt2", "tokenizer.name=char"], ["tokenizer gpt2", "tokenizer char"]),
    ],
)
def test_runs_are_labelled_by_what_differs(options: list[str], expected: list[str]) -> None:
    runs = make_all(*options)
    assert labels(runs) == expected
    assert names(runs) == [f"run_20251108_14000{n}" for n in range(len(options))]


def test_labels_are_short_and_prefer_what_tells_runs_apart() -> None:
    many = "n_embd=128 n_head=2 mlp_internal_dim_multiplier=32 dropout=0.2 weight_decay=0.2"
    runs = make_all(*(f"{many} seed={n}" for n in range(5)), "")
    assert max(map(len, descriptions(runs))) <= LONGEST
    told = descriptions(runs, 12)
    assert max(map(len, told)) <= 12 and len(set(told)) == 6
    assert told[3].startswith("seed 3")


def test_a_run_whose_config_is_lost_is_labelled_by_its_time() -> None:
    runs = make_all("learning_rate=0.002", "learning_rate=0.004", "learning_rate=0.008")
    (runs[1].path / "config.yaml").write_text("model: [")
    (runs[1].path / "environment.json").write_text("{}")
    assert labels([read_run(run.path) for run in runs]) == ["lr 0.002", "140001", "lr 0.008"]
