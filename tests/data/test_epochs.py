"""An epoch is each document once, planned to the step, however the text is stored and dealt out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from config import Config, DataLoaderConfig
from data.loading import load_plan
from engine.planning.summary import planned_steps
from tests.data.parquet_folder import opened, segment_tokens, small_bpe, split, write

T = 64


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one step, so that not many epochs are read ahead."""
    monkeypatch.setattr(load_plan, "CHUNK_BYTES", 1)


def documents(size: int, seed: int = 0) -> list[str]:
    """About `size` bytes of documents of very different lengths."""
    draw, texts = random.Random(seed), list[str]()
    while size > 0:
        length = max(3, int(draw.lognormvariate(4, 1)))
        texts.append("".join(draw.choices("abcdefghij ", k=length)))
        size -= length + 1
    return texts


def one(folder: Path) -> None:
    write(folder / "a.parquet", [*documents(40_000)], row_group_size=10_000)


def many(folder: Path) -> None:
    for i in range(20):
        write(folder / f"{i}.parquet", [*documents(1_500, i)])


def uneven(folder: Path) -> None:
    for i, size in enumerate((20_000, 3_000, 900, 100, 5)):
        write(folder / f"{i}.parquet", [*documents(size, i), None, ""])
    write(folder / "long.parquet", [*documents(100), "x" * 9_000])


def repeated(folder: Path) -> None:
    write(folder / "a.parquet", [*documents(500)] * 80, row_group_size=10_000)


def tiny_groups(folder: Path) -> None:
    write(folder / "a.parquet", [*documents(20_000)], row_group_size=2)


def few(folder: Path) -> None:
    write(folder / "a.parquet", list[str | None](documents(20_000)[:10]))


def run(dataset: data.Dataset, sequences: int, lanes: int | None, epochs: int) -> list[int]:
    """Trains as long as `epochs`; the step in which each lane has ended them.

    Each token to train on is counted in the first epoch.
    """
    spec = data.BatchSpec(
        block_size=T, sequences_per_step=sequences, micro_batches=1, seed=1, lanes=lanes
    )
    ends: dict[int, int] = {}
    rows = []
    with data.TrainLoader(dataset, spec, DataLoaderConfig()) as batches:
        for step, batch in enumerate(batches, 1):
            rows.append(batch.micro_batches[0])
            for lane, (epoch, _, _) in enumerate(batch.data_state()["positions"]):
                if epoch >= epochs:
                    ends.setdefault(lane, step)
            if batch.epoch >= epochs:
                break
        plan = batches.plan.sources[0].lane_plan
    total, count = plan.epoch_tokens, plan.lanes
    assert total is not None
    table = torch.stack(rows)[..., :-1]  # (steps, rows, T), of which a lane has neighbours
    streams = table.reshape(len(rows), count, -1).transpose(0, 1).reshape(count, -1)
    bounds = [(total + lane) // count for lane in range(count)]
    seen = np.concatenate([s[:n].numpy() for s, n in zip(streams, bounds, strict=True)])
    segments = segment_tokens(dataset, shuffle=True)
    whole = np.concatenate([segments[i] for i in split(dataset, "train")])
    assert np.array_equal(np.bincount(seen), np.bincount(whole))
    return [ends[lane] for lane in range(count)]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in (one, many, repeated, tiny_groups)]


@pytest.mark.parametrize("kind", [uneven, few, *SLOW])
def test_epochs_end_when_planned_in_all_lanes(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path)
    dataset = opened(tmp_path, test_fraction=0.05)
    for sequences, lanes, epochs in ((8, 1, 1), (8, None, 2), (64, 64, 1)):
        if lanes == 64 and kind in (uneven, few):
            continue  # not so many row groups
        options = {"block_size": T, "batch_size": sequences, "epochs": epochs}
        config = Config.from_dict({"training": {**options, "max_iters": 10**8}})
        planned = planned_steps(config, 1, dataset.epoch_tokens(T))
        ends = run(dataset, sequences, lanes, epochs)
        assert max(ends) == planned
        assert max(ends) - min(ends) <= 1


def test_epochs_end_when_planned_with_tokens_of_any_tokenizer(tmp_path: Path) -> None:
    uneven(tmp_path / "data")
    dataset = opened(tmp_path / "data", small_bpe(tmp_path, documents(2_000)))
    ends = run(dataset, 8, None, 1)
    assert max(ends) == -(-dataset.epoch_tokens(T) // (8 * T))
    assert max(ends) - min(ends) <= 1
