"""Where runs differ, and the paired comparison of their held-out losses."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from compare.differences import (
    MISSING,
    differing_data,
    differing_environment,
    differing_options,
    differing_without_effect,
    equal_options,
    texts_differ,
)
from compare.reading.run import Run, read_run
from compare.statistics.comparison import Comparison
from compare.statistics.paired import compare_runs
from engine.run_directory.manifest import Manifest, render
from tests.compare.run_directories import (
    add_checkpoint,
    append,
    change_environment,
    evaluation,
    make,
    make_run,
)


def test_options_that_differ_are_found_among_runs_of_any_version() -> None:
    a = make("run_a", "n_layer=3")
    b = make("run_b", "n_layer=4", "wandb_run_name=x", old=True)
    assert differing_options([a, b]) == {"model.n_layer": [3, 4]}
    assert differing_without_effect([a, b]) == {"logging.wandb_run_name": [None, "x"]}
    assert equal_options([a, b]) == len(a.config) - 2
    with (b.path / "config.yaml").open("a") as file:
        file.write("later:\n  warp: 9\n")
    assert differing_options([a, read_run(b.path)])["later.warp"] == [MISSING, "9"]
    path = make_run("run_c")
    (path / "config.yaml").unlink()
    (path / "environment.json").unlink()
    assert differing_options([a, read_run(path)]) == {}
    assert equal_options([a, read_run(path)]) == len(a.config)


def test_the_environment_is_that_of_the_newest_session() -> None:
    a, b, old = make_run("run_a"), make_run("run_b"), make_run("run_c", old=True)
    change_environment(a, resumed=[{"step": 3, "torch": "3.0", "time": "later"}])
    change_environment(b, command=["train.py"])
    runs = [read_run(path) for path in (a, b, old)]
    assert differing_environment(runs[:2]) == {"torch": ["3.0", "2.6.0"]}
    assert differing_environment(runs[1:]) == {}  # a value that one lacks is no difference


def test_data_differ_by_fingerprint_and_by_the_lines_printed_about_them() -> None:
    a, b, old = make_run("run_a"), make_run("run_b"), make_run("run_c", old=True)
    lines = ["Data: 3 files, 240 documents", "Split: 5 %"]
    change_environment(b, data={"fingerprint": "beef", "lines": lines})
    manifest = Manifest(
        step=300, tokens=1, loss=None, val_loss=None, fingerprint="cafe", size=0, sha256="", time=""
    )
    (old / "checkpoint_300.json").write_text(render(manifest))  # older runs have it only there
    add_checkpoint(old, 400)  # its manifest is damaged
    runs = [read_run(path) for path in (a, b, old)]
    assert differing_data(runs[:2]) == {
        "fingerprint": ["f00d", "beef"],
        "ledger": [[], ["Split: 5 %"]],
    }
    assert differing_data([runs[2], runs[0]]) == {"fingerprint": ["cafe", "f00d"]}


def test_a_text_column_that_was_not_named_is_none_that_differs() -> None:
    """As runs of token files leave it; of parquet files a run saves the name it found."""
    found, other = make("run_a", "text_column=text"), make("run_b", "text_column=content")
    unnamed = make("run_c", "text_column=auto")
    assert differing_options([found, unnamed]) == {} and not texts_differ([found, unnamed])
    assert differing_options([found, other]) == {"dataset.text_column": ["text", "content"]}
    assert texts_differ([found, other])


# ---- paired comparison


def two_runs(losses_a: list[Any], losses_b: list[Any]) -> tuple[Run, Run]:
    paths = make_run("run_a", losses=()), make_run("run_b", losses=())
    for path, losses in zip(paths, (losses_a, losses_b), strict=True):
        append(path, evaluation(100, losses))
    return read_run(paths[0]), read_run(paths[1])


def test_the_interval_is_that_of_a_textbook() -> None:
    # Differences 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.7764.
    a, b = two_runs([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    margin = 2.776445 * math.sqrt(0.5)
    for first, second, sign, verdict in ((a, b, 1, "worse"), (b, a, -1, "better")):
        pair = compare_runs(first, second)
        assert isinstance(pair, Comparison)
        assert pair.mean.difference == pytest.approx(3.0 * sign)
        assert pair.mean.interval == pytest.approx((3 * sign - margin, 3 * sign + margin))
        assert (pair.batches, pair.step_a, pair.step_b, pair.verdict) == (5, 100, 100, verdict)
    same = compare_runs(a, a)
    assert isinstance(same, Comparison)
    assert (same.mean.interval, same.batches, same.verdict) == ((0.0, 0.0), 5, "equal")


def test_noise_alone_shows_a_difference_one_time_in_twenty() -> None:
    draw, shown = random.Random(1), 0
    a, b = two_runs([1.0] * 5, [1.0] * 5)
    for _ in range(1000):
        hard = [draw.gauss(3, 1) for _ in range(8)]
        for run in (a, b):
            run.records[-1]["eval/val_losses"] = [loss + draw.gauss(0, 0.1) for loss in hard]
        pair = compare_runs(a, b)
        assert isinstance(pair, Comparison)
        shown += pair.verdict != "no difference shown"
    assert 30 <= shown <= 72


def test_runs_compare_at_their_newest_at_a_shared_and_at_their_best_evaluations() -> None:
    a, b = make("run_a", losses=(4.0, 2.0, 3.0)), make("run_b", losses=(4.0, 2.5))
    pairs = [compare_runs(a, b, at) for at in ("newest", "same step", "best")]
    steps = [(pair.step_a, pair.step_b) for pair in pairs if isinstance(pair, Comparison)]
    assert steps == [(300, 200), (200, 200), (200, 200)]
    other = make("run_c", every=64)
    assert compare_runs(a, other, "same step") == "there is no step at which both were evaluated"


@pytest.mark.parametrize(
    ("one", "options", "other", "reason"),
    [
        ({"losses": ()}, "", {}, "run_a has no evaluation"),
        ({}, "", {"old": True}, "run_b has no loss of each batch: its version did not store them"),
        ({}, "", {"losses": (3.0, None)}, "run_b has batches whose loss is not a number (step 200"),
        ({}, "", {"batches": 9}, "they were evaluated in 8 and 9 batches"),
        ({"batches": 4}, "", {"batches": 4}, "4 held-out batches are too few for an interval: it "),
        (
            {},
            "block_size=256 batch_size=16",
            {"rows": "beef"},
            "they were evaluated on different held-out text: they differ in training.block_size, "
            "training.batch_size",
        ),
        (
            {},
            "tokenizer.name=char",
            {"rows": "beef", "losses": (3.0, 2.0)},
            "tokenizer.name. Over tokenizers bits per byte compare: 3.6070 and 2.8856",
        ),
    ],
)
def test_the_reason_why_runs_cannot_be_paired_is_given(
    one: dict[str, Any], options: str, other: dict[str, Any], reason: str
) -> None:
    found = compare_runs(make("run_a", **one), make("run_b", *options.split(), **other))
    assert isinstance(found, str)
    assert reason in found
