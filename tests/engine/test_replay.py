"""Steps of a run trained again in memory, and what their batches held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import runs
import train
from config import DataError
from engine.replay.batch import batch_of
from engine.replay.replay import Replay, open_replay
from engine.replay.start import find_start
from engine.signals import StopRequest
from tests.conftest import TINY
from tests.runs import metrics, only_run, run_here, run_main

WORDS = ["n_layer=1", "max_iters=12", "checkpoint_freq=5", "log_freq=4", "test_freq=3"]
WORDS += ["eval_iters=1", "sample_prompt=the", "sample_tokens=2"]


@contextmanager
def replayed(run: Path, step: int) -> Iterator[Replay]:
    """A replay that stands before a step."""
    with open_replay(find_start(run, step), StopRequest(), train.train) as replay:
        assert replay.advance_to(step - 1) == step - 1
        yield replay


def logged(run: Path) -> dict[int, dict[str, Any]]:
    """The log records of a run, by step."""
    return {r["step"]: r for r in metrics(run) if "train/loss" in r}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def told(*words: str) -> Any:
    """What `runs.py` prints as JSON."""
    done = run_main(lambda: runs.main([*words, "--json"]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def words(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(f"{TINY}dataset:\n  parquet_dir: {corpus_dir}\n")
    return [str(config), *WORDS]


@pytest.fixture(scope="module")
def run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, evaluations and samples, which a replay leaves out."""
    folder = tmp_path_factory.mktemp("run")
    assert run_here([*words, "dropout=0.1", f"checkpoint_dir={folder}"]) == 0
    return only_run(folder)


@pytest.mark.slow
def test_a_replay_computes_the_records_of_the_run_bit_for_bit_and_writes_nothing(
    run: Path,
) -> None:
    records, before = logged(run), files(run.parent)
    assert find_start(run, 5).checkpoint is None, "the checkpoint of a step lies after it"
    for step, begin in ((12, 10), (5, 0)):  # from a checkpoint, and from scratch
        assert find_start(run, step).step == begin
        with replayed(run, step) as replay:
            peeked = replay.next_step()
            assert peeked.number == step
            assert replay.advance_to(step) == step
            assert int(replay.records[-1]["train/batch_hash"], 16) == peeked.batch_hash
            for record in replay.logged_after(records.keys()):
                if record["step"] in records:
                    own = records[record["step"]]
                    same = {key for key in own if key in record and own[key] == record[key]}
                    assert same >= own.keys() - {"crc", "time"}, record
    assert files(run.parent) == before


@pytest.mark.slow
def test_a_batch_shows_its_documents_the_losses_of_the_step_and_that_it_is_the_right_one(
    run: Path, words: list[str], corpus_dir: Path, tmp_path: Path
) -> None:
    assert run_here([*words, "dropout=0", f"checkpoint_dir={tmp_path}"]) == 0
    run, before = only_run(tmp_path), files(tmp_path)
    losses = [loss for record in logged(run).values() for loss in record["train/first_losses"]]
    for step in (1, 7):
        batch = told("batch", str(run), str(step))
        assert "is what the run trained on" in batch["verdict"]
        assert sum(each["loss"] for each in batch["sequences"]) / 4 == pytest.approx(
            losses[step - 1], abs=1e-5
        )
        for each in batch["sequences"]:
            for part in each["documents"]:
                path, _, group = part["place"].partition(" row group ")
                table = pq.ParquetFile(path).read_row_group(int(group.split()[0]))
                assert part["text"] in table["text"][part["first"]].as_py()
    assert told("batch", str(run), "12", "--no-loss")["sequences"][0]["loss"] is None
    worst = told("batch", str(run), "7", "--worst", "2")["sequences"]
    assert worst == sorted(batch["sequences"], key=lambda each: -each["loss"])[:2]
    other = {**logged(run)[8], "train/batch_hash": "0" * 16}
    assert "NOT what the run trained on" in batch_of(run, 7, [other]).verdict
    assert "no hash" in batch_of(run, 7, [{"step": 8, "train/loss": 1.0}]).verdict
    for wrong in (["13"], ["7", "--worst", "0"], ["7", "--worst", "1", "--no-loss"]):
        assert run_main(partial(runs.main, ["batch", str(run), *wrong])).returncode == 2
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_text_is_seen_where_batches_hold_it_also_after_a_resume_with_other_steps_and_a_fork(
    run: Path, words: list[str], tmp_path: Path
) -> None:
    common = [*words, "dropout=0.1"]
    first, fork = tmp_path / "first", tmp_path / "fork"
    assert run_here([*common, "max_iters=5", f"checkpoint_dir={first}"]) == 0
    changed = ["batch_size=8", "learning_rate=1e-4", f"checkpoint_dir={first}"]
    resumed = only_run(first)
    assert run_here([*common, *changed, f"resume_from_checkpoint={resumed}"]) == 0
    assert find_start(resumed, 4).config.training.learning_rate == 3e-3
    assert find_start(resumed, 7).config.training.learning_rate == 1e-4
    parent = f"fork_from_checkpoint={resumed / 'checkpoint_10.pt'}"
    forked = [parent, "max_iters=14", f"checkpoint_dir={fork}"]
    assert run_here([*common, *changed, *forked]) == 0
    child = only_run(fork)
    text = "neuron"
    found = told("seen", str(child), text)
    assert found["steps"] == [6, 14]  # before, batches had another size
    assert found["notes"][0].startswith("Steps 1 to 5 are not looked at: their batches were of ")
    held = set()
    for step, count in ((5, 4), (6, 8), (10, 8), (11, 8)):
        sequences = told("batch", str(child), str(step), "--no-loss")["sequences"]
        assert len(sequences) == count
        for each in sequences:
            if step > 5 and any(text in document["text"] for document in each["documents"]):
                held.add((step, each["sequence"]))
    places = {(each["step"], each["sequence"]) for each in found["readings"]}
    assert held and held <= places
    with replayed(child, 12) as replay:
        replay.advance_to(12)
    assert replay.records[-1]["train/weights_hash"] == logged(child)[12]["train/weights_hash"]
    (resumed / "checkpoint_5.json").unlink()
    with pytest.raises(DataError, match="between steps 0 and 7 .*learning_rate"):
        find_start(resumed, 7)
    assert told("seen", str(resumed), text)["steps"] == [11, 12]
    first.rename(tmp_path / "gone")
    with pytest.raises(DataError, match="a fork that begins after step 10"):
        find_start(child, 5)
    lost = run_main(lambda: runs.main(["seen", str(child), text]))
    assert lost.returncode == 3 and "no step of it can be followed" in lost.stderr
