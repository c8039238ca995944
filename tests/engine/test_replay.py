"""Steps of a run, trained again in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from config import DataError
from engine.hardware.distributed import World
from engine.replay.replay import Replay, open_replay
from engine.replay.start import find_start
from engine.signals import StopRequest
from tests.engine.test_distributed import processes
from tests.runs import metrics, only_run, run_here

WORDS = ["n_layer=1", "max_iters=12", "checkpoint_freq=5", "log_freq=4", "test_freq=3"]
WORDS += ["eval_iters=1", "dropout=0.1", "sample_prompt=the", "sample_tokens=2"]


@contextmanager
def replayed(run: Path, step: int) -> Iterator[Replay]:
    """A replay that stands before a step."""
    start, alone = find_start(run, step), World(0, 1, torch.device("cpu"))
    with open_replay(start.config, start.checkpoint, alone, StopRequest(), train.train) as replay:
        assert replay.advance_to(step - 1) == step - 1
        yield replay


def logged(run: Path) -> dict[int, dict[str, Any]]:
    """The log records of a run, by step."""
    return {r["step"]: r for r in metrics(run) if "train/loss" in r}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.slow
def test_a_replay_computes_the_records_of_the_run_bit_for_bit_and_writes_nothing(
    tiny: list[str], tmp_path: Path
) -> None:
    assert run_here([*tiny, *WORDS, f"checkpoint_dir={tmp_path}"]) == 0
    run = only_run(tmp_path)
    records, before = logged(run), files(tmp_path)
    assert find_start(run, 5).checkpoint is None, "the checkpoint of a step lies after it"
    for step, begin in ((12, 10), (8, 5), (5, 0)):  # from checkpoints, and from scratch
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
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_run_of_two_processes_is_replayed_on_one(tiny: list[str], tmp_path: Path) -> None:
    processes(2, [*tiny, *WORDS, "dropout=0", f"checkpoint_dir={tmp_path}"])
    run = only_run(tmp_path)
    records = logged(run)
    with replayed(run, 9) as replay:
        pass
    for step, mine in ((r["step"], r) for r in replay.logged_after(records.keys())):
        assert mine["train/batch_hash"] == records[step]["train/batch_hash"]
        assert mine["train/loss"] == pytest.approx(records[step]["train/loss"], abs=1e-5)
    with replayed(run, 1) as replay:
        replay.advance_to(4)
    again = {r["step"]: r for r in replay.logged_after(records.keys())}
    assert [again[s]["train/batch_hash"] for s in (1, 4)] == [
        records[s]["train/batch_hash"] for s in (1, 4)
    ]


@pytest.mark.slow
def test_each_step_is_replayed_with_the_options_of_its_time(
    tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, *WORDS, f"checkpoint_dir={tmp_path}"]
    assert run_here(words) == 0
    run = only_run(tmp_path)
    again = f"resume_from_checkpoint={run / 'checkpoint_5.pt'}"
    assert run_here([*words, again, "learning_rate=1e-4"]) == 0
    assert find_start(run, 4).config.training.learning_rate == 3e-3
    assert find_start(run, 7).config.training.learning_rate == 1e-4
    (run / "checkpoint_5.json").unlink()
    with pytest.raises(DataError, match="between steps 0 and 7 .*learning_rate"):
        find_start(run, 7)


@pytest.mark.slow
def test_the_steps_of_a_fork_before_it_are_those_of_its_parent(
    tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, *WORDS, "max_iters=6"]
    assert run_here([*words, f"checkpoint_dir={tmp_path / 'a'}"]) == 0
    parent = only_run(tmp_path / "a")
    forked = f"fork_from_checkpoint={parent / 'checkpoint_5.pt'}"
    assert run_here([*words, forked, "max_iters=8", f"checkpoint_dir={tmp_path / 'b'}"]) == 0
    fork = only_run(tmp_path / "b")
    assert find_start(fork, 5).run == parent
    start = find_start(fork, 7)
    assert (start.run, start.checkpoint, start.step) == (fork, None, 5)
    with replayed(fork, 8) as replay:
        replay.advance_to(8)
    assert replay.records[-1]["train/weights_hash"] == logged(fork)[8]["train/weights_hash"]
    parent.rename(tmp_path / "gone")
    with pytest.raises(DataError, match="a fork that begins after step 5"):
        find_start(fork, 5)
