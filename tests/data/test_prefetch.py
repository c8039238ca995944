"""Threads and workers end with their loader, and their errors arrive in the training loop."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
from config import STOP_EXIT_CODES, DataError, DataLoaderConfig
from data.loading import prefetch
from data.loading.lanes import LanePlan
from tests.data.batches import read, spec
from tests.data.parquet_folder import opened, write

WORKERS = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data prefetch"]


@WORKERS
def test_closing_leaves_no_thread_process_or_file(parquet_corpus: Path, workers: int) -> None:
    dataset = opened(parquet_corpus)
    read(dataset, 1, spec(), workers=workers)
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    batches = data.TrainLoader(dataset, spec(), DataLoaderConfig(num_workers=workers))
    kept = next(batches)
    assert threads()
    assert len(multiprocessing.active_children()) == workers
    start = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - start < 30  # no wait runs to its end
    assert not threads()
    assert not multiprocessing.active_children()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files
    assert kept.data_state()["positions"]
    with pytest.raises(DataError, match="closed"):
        for _ in range(10):
            next(batches)


def test_a_forgotten_loader_ends_its_thread(parquet_corpus: Path) -> None:
    batches = data.TrainLoader(opened(parquet_corpus), spec(), DataLoaderConfig())
    kept = next(batches)
    del batches
    gc.collect()
    assert not threads()
    assert kept.describe()


@WORKERS
def test_iterating_touches_no_global_random_state(parquet_corpus: Path, workers: int) -> None:
    before, python_before = torch.get_rng_state(), random.getstate()
    read(opened(parquet_corpus), 20, spec(), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before


@WORKERS
def test_an_error_while_reading_arrives_as_it_was_raised(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "a.parquet", ["x" * 40] * 50)
    dataset = opened(tmp_path)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"^.*a\.parquet: changed during the run [^\n]*$"):
        read(dataset, 5, spec(), workers=workers)
    assert not threads()
    assert not multiprocessing.active_children()


def test_the_thread_that_pins_memory_uses_the_gpu_of_its_process(
    parquet_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[tuple[str, int]] = []

    def note(device: int) -> None:
        devices.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", note)
    monkeypatch.setattr(prefetch, "DataLoader", lambda source, **_: source)
    read(opened(parquet_corpus), 1, replace(spec(), pin=True))
    assert devices == [("data prefetch", 3)]


@pytest.mark.slow
def test_a_killed_worker_is_named(parquet_corpus: Path) -> None:
    config = DataLoaderConfig(num_workers=2)
    with data.TrainLoader(opened(parquet_corpus), spec(), config) as batches:
        next(batches)
        victim = multiprocessing.active_children()[0]
        assert victim.pid
        os.kill(victim.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(DataError, match=rf"worker {victim.pid} was lost \(killed by SIGKILL"):
            while True:
                next(batches)
        assert time.monotonic() - start < 30  # of no timeout


@pytest.mark.slow
def test_workers_ignore_the_signals_of_the_group(parquet_corpus: Path) -> None:
    dataset = opened(parquet_corpus)
    expected, _ = read(dataset, 20, spec())
    with data.TrainLoader(dataset, spec(), DataLoaderConfig(num_workers=2)) as batches:
        next(batches)
        for process in multiprocessing.active_children():
            for number in STOP_EXIT_CODES:
                assert process.pid
                os.kill(process.pid, number)
        for step in range(1, 20):
            assert torch.equal(next(batches).micro_batches[0], expected[step])


@pytest.mark.slow
def test_a_source_that_hangs_is_an_error(
    parquet_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "TIMEOUT_S", 1.0)
    hung = threading.Event()
    monkeypatch.setattr(LanePlan, "lane_segments", lambda *_: hung.wait(30))
    batches = data.TrainLoader(opened(parquet_corpus), spec(), DataLoaderConfig())
    with pytest.raises(DataError, match="no batch within 1 s"):
        next(batches)
    hung.set()
    batches.close()


@pytest.mark.slow
def test_more_workers_than_lanes_are_announced(
    parquet_corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, _ = read(opened(parquet_corpus), 3, spec(lanes=2), workers=3)
    assert len(rows) == 3
    assert "num_workers: 3, but this process reads 2 lanes; 2 workers are used" in caplog.text
