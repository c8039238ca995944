"""Where two runs part, by their log records, and runs that a report page holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from compare.parting import BATCHES, LOSS, NORM, WEIGHTS, compare_records, step_losses
from compare.reading.original import find_original
from compare.reading.run import read_run
from compare.report.page import page
from config import Config, ConfigError, DataError
from engine.run_directory.environment_file import session_of_step
from engine.run_directory.saved_config import config_of_step
from settings.entries import flat_options, nested_options
from tests.compare.run_directories import make_run, write_records


def logged(every: int, steps: int = 40, batches: int | None = None) -> list[dict[str, Any]]:
    """Records of a run whose loss is 1 / step; from step `batches` on it reads other text."""
    records, before = list[dict[str, Any]](), 0
    for step in [1, *range(every, steps + 1, every)]:
        since = range(before + 1, step + 1)
        losses = [(0.5 if batches and each >= batches else 1) / each for each in since]
        changed = batches is not None and step >= batches
        records.append(
            {
                "step": step,
                "time": step * 0.5,
                "train/loss": sum(losses) / len(losses),
                "train/first_losses": losses,
                "train/grad_norm": 2.0 * losses[-1],
                "train/learning_rate": 1e-3,
                "train/batch_hash": f"{changed:x}{before}{step}",
                "train/weights_hash": f"{changed:x}{step}",
            }
        )
        before = step
    return records


def without(records: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in each.items() if key not in keys} for each in records]


def test_equal_runs_agree_in_all_records_of_the_same_steps() -> None:
    found = compare_records(logged(5), logged(10))
    assert found.parting is None
    assert (found.records, found.last_equal, found.largest) == (5, 40, 0.0)  # 1, 10, 20, 30, 40
    assert step_losses(logged(10)) == {step: 1 / step for step in range(1, 41)}


def test_the_first_loss_of_a_step_that_differs_is_named_with_the_batches_of_its_record() -> None:
    found = compare_records(logged(10), logged(10, batches=23))
    assert found.parting is not None
    assert (found.parting.step, found.parting.record, found.last_equal) == (23, 30, 20)
    assert list(found.parting.values) == [BATCHES, LOSS, NORM, WEIGHTS]
    assert found.parting.values[LOSS] == (1 / 23, 0.5 / 23)
    assert (found.largest, found.largest_step) == (0.5, 40)
    assert str(found.parting).startswith("step 23: batches 02030 and 12030, loss 0.0434782609 and")


def test_runs_of_an_earlier_version_are_compared_by_their_losses() -> None:
    hashes = "train/first_losses", BATCHES, WEIGHTS
    old = [without(logged(10), *hashes), without(logged(10, batches=23), *hashes)]
    found = compare_records(old[0], old[1])
    assert found.parting is not None and found.parting.step == 30
    assert list(found.parting.values) == [LOSS, NORM]
    assert compare_records(old[0], logged(10)).records == 5
    # The first session after an update knows its batches from its second record on.
    resumed = [record | {BATCHES: None} for record in logged(10)]
    assert step_losses(resumed) == {} and compare_records(resumed, logged(10)).parting is None


def test_a_mean_over_other_steps_is_not_compared() -> None:
    keys = "train/first_losses", BATCHES
    found = compare_records(without(logged(5), *keys), without(logged(10), *keys))
    assert found.parting is None and found.records == 5


def test_weights_that_differ_under_equal_losses_are_a_parting() -> None:
    changed = logged(10)
    changed[3]["train/weights_hash"] = "flipped"
    found = compare_records(logged(10), changed)
    assert found.parting is not None
    assert (found.parting.step, list(found.parting.values)) == (30, [WEIGHTS])


# ---- the config and the session of a step


def test_a_step_has_the_config_that_it_was_trained_with_last() -> None:
    """Trained to 50 at rate 1, from there at 2, then from 20 at 3, from 30 at 4."""
    folder = make_run()
    for rate, resumed in enumerate((50, 20, 30), start=1):
        place = folder / f"config.before_{resumed}.yaml"
        place.write_text(f"training: {{learning_rate: {rate}.0}}\n")
        os.utime(place, (rate, rate))
    rates = [config_of_step(folder, step).training.learning_rate for step in (1, 20, 21, 30)]
    assert rates == [1.0, 1.0, 3.0, 3.0]
    assert config_of_step(folder, 31) == Config.from_yaml(folder / "config.yaml")
    sessions = {"torch": "a", "resumed": [{"step": 50, "torch": "b"}, {"step": 20, "torch": "c"}]}
    assert [session_of_step(sessions, step)["torch"] for step in (20, 21, 60)] == ["a", "c", "c"]


# ---- what --reproduce takes


def test_a_config_that_was_made_flat_is_made_whole_again(tmp_path: Path) -> None:
    place = tmp_path / "mixture.yaml"
    place.write_text(
        "dataset:\n  mixture:\n    - {name: web.1, weight: 2, parquet_dir: a}\n"
        "    - {name: code, weight: 1, parquet_dir: b, text_column: text}\n"
    )
    config = Config.from_yaml(place, ["learning_rate=3.0000000001e-4"])
    flat = flat_options(config.to_dict())
    assert Config.from_dict(nested_options(flat, ["dataset.mixture"])) == config


def report_of(*names: str) -> Path:
    runs = []
    for number, name in enumerate(names):
        run = make_run(name, "learning_rate=3e-4", every=40)
        write_records(run, [*logged(10, batches=number or None)])
        runs.append(read_run(run))
    Path("report.html").write_text(page(runs))
    return Path("report.html")


def test_a_page_a_run_its_config_and_its_checkpoint_name_the_same_run() -> None:
    report = report_of("run_a", "run_b")
    original = find_original(f"{report}#run_b")
    assert (original.name, original.path, original.step) == ("run_b", None, 0)
    assert original.config == Config.from_yaml("checkpoints/run_b/config.yaml")
    own = find_original("run_b")
    assert compare_records(original.records, own.records).records == 5
    assert own.config == original.config and own.environment["torch"] == "2.6.0"
    assert find_original("checkpoints/run_b/config.yaml") == own
    later = find_original("run_b/checkpoint_120.pt")
    assert (later.step, later.checkpoint) == (120, Path("checkpoints/run_b/checkpoint_120.pt"))


def test_a_page_has_the_config_of_the_first_steps() -> None:
    """The run was resumed with another learning rate, which its directory keeps apart."""
    folder = make_run("run_a", "learning_rate=1e-3")
    first = (
        (folder / "config.yaml").read_text().replace("learning_rate: 1e-3", "learning_rate: 2.0")
    )
    (folder / "config.before_50.yaml").write_text(first)
    Path("report.html").write_text(page([read_run(folder)]))
    assert find_original("report.html").config.training.learning_rate == 2.0


def test_what_is_no_run_is_refused_in_one_sentence() -> None:
    report = report_of("run_a", "run_b")
    Path("broken.html").write_text('<script id="data">{"runs": [{"reproduce": {"name"')
    Path("other.html").write_text("<!doctype html><![foo[<p>hello")
    Path("notes.txt").touch()
    messages = {
        f"{report}": "report.html holds 2 runs: run_a, run_b. Name one: report.html#NAME.",
        f"{report}#run_c": "report.html holds no run run_c: run_a, run_b.",
        "broken.html": "broken.html is not a page of `runs.py report` that holds runs to repeat.",
        "other.html": "other.html is not a page of `runs.py report` that holds runs to repeat.",
        "absent.html": "absent.html: cannot be read: No such file or directory.",
        "notes.txt": "notes.txt: neither a run, a checkpoint, its config.yaml nor a report page.",
        "run_c": "run_c: no such run, checkpoint or folder; checkpoints holds run_a, run_b.",
        "run_a/checkpoint_7.pt": "run_a/checkpoint_7.pt: no such run, checkpoint or folder; "
        "checkpoints holds run_a, run_b.",
    }
    for word, message in messages.items():
        with pytest.raises(DataError) as refused:
            find_original(word)
        assert str(refused.value) == message


@pytest.mark.parametrize("value", ["\x1b[31m", -1, [1], {"a": 1}])
def test_a_page_whose_config_is_wrong_is_refused_as_any_config(value: object) -> None:
    (found,) = [{"name": "run_a", "config": {"training.learning_rate": value}, "records": []}]
    text = json.dumps({"runs": [{"reproduce": found}]})
    Path("report.html").write_text(f'<script type="application/json" id="data">{text}</script>')
    with pytest.raises(ConfigError) as refused:
        find_original("report.html")
    assert "learning_rate" in str(refused.value) and str(refused.value).isprintable()
