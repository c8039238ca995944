"""`--reproduce` repeats a run: bit for bit, nearly, or not, and then says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import runs
import train
from compare.parting import Agreement, compare_records
from compare.reading.run import read_run
from config import command_line
from engine.replay.reproduce import is_close, verdict
from engine.replay.session import Fact
from tests.compare.run_directories import write_records
from tests.compare.test_parting import logged, without
from tests.conftest import write_corpus
from tests.runs import only_run, run_here, run_main

SAME = [Fact("data", "f00d", "f00d"), Fact("torch", "2.6", "2.6"), Fact("device", "cpu", "cpu")]
Told = Callable[..., str]


def compared(change: float, batches: int | None = None) -> Agreement:
    """A repetition whose losses are larger by a factor from step 20 on."""
    again = logged(10, batches=batches)
    for record in again[2:]:
        losses = [loss * change for loss in record["train/first_losses"]]
        record |= {"train/loss": sum(losses) / 10, "train/first_losses": losses}
    return compare_records(logged(10), again)


def test_the_verdict_has_three_words_and_the_likely_cause() -> None:
    assert verdict(compared(1.0), 40, SAME).startswith("Bit for bit: 40 steps agree in 45 losses")
    near = compared(1 + 2e-6)
    assert is_close(near) and not is_close(compared(1 + 2e-5))
    threads = [*SAME, Fact("threads", "8", "2"), Fact("python", "3.9", "3.12")]
    assert verdict(near, 40, threads) == (
        "Within 1e-5: the largest relative difference of a loss is 2.0e-06, at step 30. "
        "Likely cause: threads (then 8, now 2)."
    )
    far = verdict(compared(2.0), 40, SAME)
    assert far.startswith("Different from step 11: loss 0.0909090909 and 0.181818182 (then and now")
    assert far.endswith("whatever the run recorded of its machine and data is as then.")
    cuda = [*SAME[:2], Fact("device", "cuda:0 (H200)", "cuda:0 (H200)")]
    assert "a GPU does not add in the same order" in verdict(near, 40, cuda)
    dirty = [*SAME, Fact("code revision", "0a-dirty", "0a-dirty")]
    assert "changes of the code that were not committed" in verdict(near, 40, dirty)


def test_other_rows_are_never_close_and_are_blamed_on_the_data() -> None:
    found = compared(1.0, batches=23)
    assert not is_close(found)
    other = [Fact("data", "f00d", "beef"), *SAME[1:]]
    assert verdict(found, 40, other).endswith("other data (fingerprint then f00d, now beef).")
    assert verdict(found, 40, [*SAME, Fact("threads", "8", "2")]).endswith(
        "text that was changed behind an equal fingerprint."
    )


# ---- whole repetitions


@pytest.fixture
def run(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 30 steps with dropout, whose log records are of 7 steps each."""
    monkeypatch.chdir(tmp_path)
    arguments = ["checkpoint_dir=checkpoints", "log_freq=7", "dropout=0.2", "max_iters=20"]
    assert run_here([*tiny, *arguments]) == 0
    return only_run(Path("checkpoints"))


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def reproduce(word: object, code: int = 0) -> str:
        capsys.readouterr()
        assert train.main(command_line(["--reproduce", str(word)])) == code
        return "".join(capsys.readouterr())

    return reproduce


@pytest.mark.slow
def test_a_run_is_repeated_bit_for_bit_from_all_that_names_it(run: Path, told: Told) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert run_main(lambda: runs.main(["report", str(run), "-o", "r.html"])).returncode == 0
    here = sorted(os.listdir())
    from_page = told(f"r.html#{run.name}")
    assert "Repeating run_" in from_page and "steps 1 to 14, in memory" in from_page
    assert from_page.splitlines()[-1] == (
        "Bit for bit: 14 steps agree in 17 losses and 3 records "
        "(batches, learning rate, loss, gradient norm, weights)."
    )
    assert told(run / "config.yaml") == from_page
    # The checkpoint lies between two records: what it carries over is part of the first one.
    later = told(run / "checkpoint_10.pt").splitlines()[-1]
    assert later.startswith("Bit for bit: 4 steps agree in 5 losses and 1 records (batches, ")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert sorted(os.listdir()) == here


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_compared_by_its_losses(run: Path, told: Told) -> None:
    hashes = "train/batch_hash", "train/first_losses", "train/weights_hash"
    write_records(run, without(read_run(run).records, *hashes))
    assert "3 losses and 3 records (learning rate, loss, gradient norm)." in told(run)


@pytest.mark.slow
def test_a_document_that_was_edited_is_told_from_a_change_of_the_code(
    run: Path, told: Told, tiny: list[str], corpus_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus_dir, copy)
    assert run_here([*tiny, f"parquet_dir={copy}", "checkpoint_dir=b", "max_iters=10"]) == 0
    shutil.rmtree(copy)
    write_corpus(copy, seed=1)
    told_of_data = told(only_run(Path("b")), code=1)
    assert "Different from step 1: batches " in told_of_data
    assert "Likely cause: other data (fingerprint then " in told_of_data
    shutil.rmtree(copy)
    assert str(copy) in told(only_run(Path("b")), code=3)


@pytest.mark.slow
def test_the_threads_of_the_run_are_taken(run: Path, told: Told) -> None:
    here = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        output = told(run)
        assert "threads        1, as then" in output and "Bit for bit" in output
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(here)


def test_what_cannot_be_repeated_is_said_in_one_line(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told("run_x", code=3).startswith("run_x: no such run, checkpoint or folder; ")
