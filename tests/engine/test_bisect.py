"""`runs.py bisect` finds what was planted: an option, a document, threads, a bit; or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import runs
from engine.run_directory.manifest import data_path, manifest_path, read_manifest, render
from tests.compare.run_directories import make_run, write_records
from tests.compare.test_parting import logged, without
from tests.runs import metrics, only_run, run_here, run_main

Train = Callable[..., Path]
pytestmark = pytest.mark.slow


@pytest.fixture
def train_run(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains 12 steps with dropout, logged each 3 and saved each 4, into a folder of its own."""
    monkeypatch.chdir(tmp_path)
    common = ["max_iters=12", "log_freq=3", "checkpoint_freq=4", "test_freq=null", "dropout=0.1"]

    def train_into(folder: str, *options: str) -> Path:
        assert run_here([*tiny, *common, f"checkpoint_dir={folder}", *options]) == 0
        run = only_run(Path(folder))
        return run.rename(run.with_name(f"run_{folder}"))

    return train_into


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bisected(one: Path, other: Path, code: int = 1) -> dict[str, Any]:
    done = run_main(lambda: runs.main(["bisect", str(one), str(other), "--json"]))
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_equal_runs_agree_in_records_and_checkpoints(train_run: Train) -> None:
    one = train_run("a")
    shutil.copytree(one, "b/run_b")
    found = bisected(one, Path("b/run_b"), code=0)
    assert found["agree"] and found["equal_checkpoints"] == [4, 8, 12]
    assert found["conclusion"] == (
        "run_a and run_b agree in all 5 records (batches, learning rate, loss, gradient norm, "
        "weights) and in 3 checkpoints."
    )


def test_the_option_is_found_among_several_that_differ(train_run: Train) -> None:
    one = train_run("a")
    other = train_run("b", "weight_decay=0.3", "max_iters=14", "schedule.lr_decay_iters=12")
    # Of the three, only the weight decay matters: the length changes nothing under the same decay.
    found = bisected(one, other)
    assert found["cause"] == "option"
    assert found["conclusion"] == (
        "training.weight_decay explains it: with 0.3, run_a computes the same as run_b up to "
        "step 1."
    )
    assert found["parting"]["step"] == 1  # whose loss is equal, and the weights after it are not
    several = bisected(one, train_run("c", "weight_decay=0.3", "learning_rate=0.002"))
    assert several["conclusion"].startswith(
        "training.learning_rate and training.weight_decay explain it: with 2e-3 and 0.3, run_a"
    )
    assert any("after step " in line and "differs in" in line for line in found["evidence"])


def test_an_edited_document_is_shown_with_both_texts(
    train_run: Train, tiny: list[str], corpus_dir: Path
) -> None:
    shutil.copytree(corpus_dir, "copy")
    edited = Path("copy/part_1.parquet")
    texts = pq.read_table(edited)["text"].to_pylist()
    texts = [text.replace("dragon", "dragxn", 1) for text in texts]
    pq.write_table(pa.table({"text": texts}), edited, row_group_size=20, write_page_checksum=True)
    found = bisected(train_run("a"), train_run("b", "parquet_dir=copy"))
    assert found["cause"] == "text" and found["parting"]["step"] == 1
    conclusion = found["conclusion"]
    assert conclusion.startswith("Other text: step 1, row ")
    assert "part_1.parquet" in conclusion and "dragon" in conclusion and "dragxn" in conclusion


def test_another_number_of_threads_is_found(train_run: Train) -> None:
    # The smallest GPT in whose sums two threads round differently, in torch 2.13 on x86.
    gpt = ["model.name=gpt", "n_layer=1", "n_embd=32", "batch_size=8", "block_size=128"]
    options = [*gpt, "compute_dtype=float32", "max_iters=1"]
    one = train_run("a", *options)
    torch.set_num_threads(2)
    other = train_run("b", *options)
    torch.set_num_threads(1)
    if metrics(one) == metrics(other):
        pytest.skip("on this processor two threads round as one does")
    found = bisected(one, other)
    assert found["cause"] == "threads"
    assert found["conclusion"] == (
        "number of threads explains it: with 2, run_a computes the same as run_b up to step 1."
    )


@pytest.mark.parametrize(("every", "than"), [(2, "run_b logged at step 4"), (3, "a replay makes")])
def test_a_bit_that_flipped_in_a_checkpoint_is_found(
    train_run: Train, every: int, than: str
) -> None:
    """By the hash in the log record of its step or, without one, by a replay."""
    one = train_run("a", f"log_freq={every}", "max_iters=6")
    other = Path("b/run_b")
    shutil.copytree(one, other)
    place = data_path(other, 4)
    content = torch.load(place, weights_only=True)
    weight = content["model"]["encoder"]
    weight.view(torch.int32).view(-1)[7] ^= 1 << 20
    torch.save(content, place)
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    manifest = replace(read_manifest(place), size=os.path.getsize(place), sha256=digest)
    manifest_path(place).write_text(render(manifest))
    assert run_here(["--config", f"{other}/config.yaml", f"resume_from_checkpoint={place}"]) == 0
    found = bisected(one, other)
    assert found["cause"] == "weights" and found["parting"]["step"] == 5
    assert found["conclusion"].startswith(
        f"checkpoint_4.pt of run_b holds other weights than {than}: model.encoder differs in 1 of "
    )


def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = make_run("run_a"), make_run("run_b")
    write_records(one, without(logged(7)[1:], "train/first_losses"))
    write_records(other, without(logged(10)[1:], "train/first_losses"))
    done = run_main(lambda: runs.main(["bisect", str(one), str(other)]))
    assert done.returncode == 3
    assert "have no log record of the same step to compare" in done.stderr
