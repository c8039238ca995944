"""A mixture of text on S3, local parquet and token files, killed and resumed on other numbers of
processes, is the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

import prepare
from config import Config
from data import Dataset, open_dataset
from data.loading import load_plan
from data.run_data import RunData
from data.sources.dataset import segments_of_split
from data.sources.tokens.dataset import TokenDataset
from engine.checkpoint.load import load_checkpoint
from engine.run_directory.manifest import data_path, steps_in
from tests.conftest import TEXT, TINY
from tests.data.parquet_folder import write
from tests.remote_servers import S3Server
from tests.runs import metrics, only_run, run_here, start_ranks, wait_for

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
KILLS = int(os.environ.get("KILLS", "2"))
"""How often the run is killed; 10 for a release."""
STEPS_PER_KILL = 18
STEPS = STEPS_PER_KILL * (KILLS + 1)
SHARES = {"web": 0.5, "books": 0.3, "notes": 0.2}
DOCUMENTS = 200
"""Of each source; the shares make other numbers of epochs of them."""
T, ROWS = 32, 8

Ids = npt.NDArray[np.int64]


def documents(name: str) -> list[str]:
    """Texts that each begin with a word of their own, all short of a row."""
    draw = random.Random(name)
    return [
        " ".join((f"{name}{n}", *draw.choices(TEXT.split(), k=draw.randint(2, 20))))
        for n in range(DOCUMENTS)
    ]


def write_tokenizer(path: Path) -> list[str]:
    """A tokenizer.json with a token for each word; returns the words by id."""
    names = [f"{name}{n}" for name in SHARES for n in range(DOCUMENTS)]
    words = ["<|endoftext|>", *sorted(set(TEXT.split())), *names]
    vocab = {word: number for number, word in enumerate(words)}
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<|endoftext|>"},
            }
        )
    )
    return words


@pytest.fixture
def mixed(
    tmp_path: Path,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    """The config file of a run of STEPS steps on three sources."""
    monkeypatch.setattr(load_plan, "CHUNK_BYTES", 4 * ROWS * (T + 1) * 4)  # of a few steps
    for number, name in enumerate(("web", "books")):
        for part in range(3):
            path = tmp_path / name / f"part_{part}.parquet"
            write(path, list(documents(name)[part::3]), row_group_size=7 + number)
    parts = {f"web/{path.name}": path.read_bytes() for path in (tmp_path / "web").iterdir()}
    s3_server.put("texts", parts)
    lines = (json.dumps({"id": n, "content": text}) for n, text in enumerate(documents("notes")))
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    write_tokenizer(tmp_path / "tokenizer.json")
    prepared = [tmp_path / "notes.jsonl", tmp_path / "notes", "--tokenizer"]
    assert prepare.main([*map(str, prepared), f"{tmp_path}/tokenizer.json", "--workers=1"]) == 0
    capsys.readouterr()
    config = tmp_path / "mixed.yaml"
    config.write_text(
        TINY
        + f"""
dataset:
  test_fraction: 0.1
  mixture:
    - {{name: web, parquet_dir: "s3://texts/web", weight: {SHARES["web"]}}}
    - {{name: books, parquet_dir: {tmp_path}/books, weight: {SHARES["books"]}}}
    - name: notes
      train_data_path: {tmp_path}/notes/train.bin
      val_data_path: {tmp_path}/notes/val.bin
      weight: {SHARES["notes"]}
"""
    )
    words = ["dropout=0", "compute_dtype=float32", f"tokens_per_step={T * ROWS}", "batch_size=4"]
    frequencies = ["log_freq=1", "test_freq=18", "checkpoint_freq=5", "keep_last=null"]
    return [os.fspath(config), *words, *frequencies, f"max_iters={STEPS}"]


@pytest.mark.slow
def test_a_mixture_killed_and_resumed_on_one_and_two_processes_is_the_uninterrupted_run(
    mixed: list[str], tmp_path: Path
) -> None:
    """Set KILLS=10 in the environment for more of them."""
    assert run_here([*mixed, f"checkpoint_dir={tmp_path / 'whole'}"]) == 0
    whole, draw = only_run(tmp_path / "whole"), random.Random(2)
    folder, same_processes = tmp_path / "killed", 0
    words = [*mixed, f"checkpoint_dir={folder}", "resume_from_checkpoint=auto"]
    for kill in range(KILLS + 1):
        if kill == 2:
            same_processes = max(steps_in(only_run(folder)))
        children = start_ranks(2 if kill and kill % 2 == 0 else 1, words)
        if kill < KILLS:
            wait_for(children[0], "Saved checkpoint")
            for _ in range(draw.randrange(6)):
                wait_for(children[0], "Iter ")
            for child in children:
                child.kill()
        output = "".join(child.communicate()[0] for child in children)
        assert children[0].returncode == (-signal.SIGKILL if kill < KILLS else 0), output
        assert len(list(folder.glob("run_*"))) == 1, output  # it went on, and began no other run
    run = only_run(folder)
    assert STEPS in steps_in(run)
    assert_same_data_and_losses(run, whole, same_processes)
    config = Config.from_yaml(run / "config.yaml")
    assert_shares_and_epochs(config, load_checkpoint(data_path(run, STEPS))["cursor"])


def assert_same_data_and_losses(run: Path, whole: Path, same_processes: int) -> None:
    """Up to step `same_processes` the run was resumed on as many, so all is equal bit for bit."""
    assert same_processes > 0
    for step in steps_in(run):
        one, other = (load_checkpoint(data_path(each, step)) for each in (run, whole))
        assert one["cursor"] == other["cursor"], step
    mine, theirs = metrics(run), metrics(whole)
    assert [record.keys() for record in mine] == [record.keys() for record in theirs]
    for one, other in zip(mine, theirs, strict=True):
        if one["step"] <= same_processes:
            assert one == other
        for name, value in one.items():
            if "loss" in name:
                assert value == pytest.approx(other[name], abs=1e-5), (one["step"], name)


def assert_shares_and_epochs(config: Config, last: dict[str, Any]) -> None:
    """Reads the batches again: each row is of one source, each source has its share after every
    step, and each document of a source was read once in each of its epochs."""
    dataset = open_dataset(config.dataset, config.tokenizer)
    seen, rows = np.zeros(dataset.vocab_size, dtype=np.int64), dict.fromkeys(SHARES, 0)
    own = {name: own_tokens(dataset, name) for name in SHARES}
    with RunData(dataset, config).batches(None, 0, 1, pin=False) as loader:
        for step in range(1, STEPS + 1):
            batch = next(loader)
            for row in torch.cat(batch.micro_batches).numpy():
                (name,) = (name for name in SHARES if np.isin(row, own[name]).any())
                rows[name] += 1
                np.add.at(seen, row[:-1], 1)
            assert sum(rows.values()) == step * ROWS
            for name, share in SHARES.items():
                assert abs(rows[name] - share * step * ROWS) < 1
        assert batch.data_state() == last
    for source, state in zip(dataset.sources, last["sources"], strict=True):
        epochs = [epoch for epoch, *_ in state["positions"]]
        every, some = training_tokens(source.dataset)
        counts = seen[np.intersect1d(own[source.name], every)]
        assert len(counts) > 0.8 * DOCUMENTS and min(epochs) > 0
        assert min(epochs) <= counts.min() and counts.max() <= max(epochs) + 1
        held_out = np.setdiff1d(own[source.name], some)
        assert len(held_out) and not seen[held_out].any()


def own_tokens(dataset: Dataset, name: str) -> Ids:
    """The first words of a source's documents."""
    tokens = [dataset.tokenizer.encode(text)[0] for text in documents(name)]
    return np.array(tokens, dtype=np.int64)


def training_tokens(dataset: Dataset) -> tuple[Ids, Ids]:
    """The tokens that every epoch has as inputs, and those that some epoch has."""
    if isinstance(dataset, TokenDataset):  # each epoch cuts rows at another offset, below 2 T
        (file,) = dataset.train_files
        tokens = np.fromfile(file.path, file.dtype).astype(np.int64)
        return tokens[2 * T : -2 * T], tokens
    segments = dataset.segments(T)
    reader, found = segments.open_reader(), []
    for number in segments_of_split(segments, "train").tolist():
        found.append(reader.tokens(number, 1, 0, False))
    reader.close()
    tokens = np.concatenate(found).astype(np.int64)
    return tokens, tokens
