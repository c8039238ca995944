"""The same batches for any processes, workers and accumulation, stopped and resumed anywhere."""

from __future__ import annotations

import gc
import hashlib
import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import STOP_EXIT_CODES, DataError, DataLoaderConfig
from data.loading import lanes as lanes_module
from data.loading import load_plan, order
from data.loading import prefetch as feed
from data.loading.lanes import LanePlan
from tests.data.batches import G, T, read, spec
from tests.data.parquet_folder import (
    encoded,
    folder_of,
    marked,
    opened,
    reader,
    small_bpe,
    split,
    write,
)

STEPS = 40  # two epochs of the corpus below, for every lane


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marked")
    marked(folder)
    return folder


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps to a chunk, so that chunks end often."""
    monkeypatch.setattr(load_plan, "CHUNK_BYTES", 3 * G * (T + 1))


def dealt(dataset: data.Dataset, lanes: int, epoch: int) -> list[bytes]:
    """Slow and separate: the documents of each lane in one epoch, before lanes are balanced."""
    folder = folder_of(dataset)
    units = folder.segments(0).table
    keys = units.shuffle_key[split(dataset, "train")]
    tables = [pq.read_table(folder.index.path(i)) for i in range(len(folder.index.paths))]
    columns = [table.column("text").to_pylist() for table in tables]
    plan = order.segment_order(keys, 1337, epoch)
    result = []
    for lane in range(lanes):
        text = b""
        for unit in split(dataset, "train")[
            plan[lanes_module.assign_lanes(keys[plan], lanes) == lane]
        ]:
            file = int(folder.index.group_file[units.group[unit]])
            group = int(folder.index.group_number[units.group[unit]])
            first = 10 * group + int(units.first[unit])
            texts = columns[file][first : first + int(units.rows[unit])]
            for i in order.document_order(int(units.key[unit]), 1337, epoch, len(texts)):
                text += texts[i].encode() + b"\0"
        result.append(text)
    return result


def reference(dataset: data.Dataset, lanes: int, epochs: int) -> list[list[bytes]]:
    """The text of each lane, epoch by epoch: what is too much in one fills those of too little."""
    result: list[list[bytes]] = [[] for _ in range(lanes)]
    for epoch in range(epochs):
        texts = dealt(dataset, lanes, epoch)
        targets = lanes_module.tokens_per_lane(sum(map(len, texts)), lanes, epoch)
        rest = b"".join(text[n:] for text, n in zip(texts, targets, strict=True))
        for lane, (text, target) in enumerate(zip(texts, targets, strict=True)):
            missing = max(0, target - len(text))
            result[lane].append(text[:target] + rest[:missing])
            rest = rest[missing:]
    return result


def rows_of(streams: list[list[bytes]]) -> torch.Tensor:
    """The global rows of every step, as many lanes as rows, so one row of a lane in each step."""
    rows = np.empty((STEPS, G, T + 1), dtype=np.uint8)
    for lane, epochs in enumerate(streams):
        stream = np.frombuffer(b"".join(epochs), dtype=np.uint8)
        for step in range(STEPS):
            rows[step, lane] = stream[step * T : step * T + T + 1]
    return torch.from_numpy(rows)


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The global rows of every step, from the slow reference."""
    return rows_of(reference(opened(corpus), G, 6))


def test_a_run_of_an_earlier_version_goes_on_in_its_own_order(corpus: Path) -> None:
    dataset = opened(corpus)
    texts = [dealt(dataset, G, epoch) for epoch in range(9)]
    earlier = rows_of([[epoch[lane] for epoch in texts] for lane in range(G)])
    _, data_state = read(dataset, 1, spec())
    data_state |= {"version": 1, "positions": [[0, 0, 0]] * G}
    del data_state["epoch_tokens"]
    rows, after = read(dataset, 7, spec(), data_state)
    assert torch.equal(rows, earlier[:7])
    assert after["version"] == 1
    rest, _ = read(dataset, STEPS - 7, spec(), after)
    assert torch.equal(rest, earlier[7:])


def test_other_counts_of_tokens_are_another_order(corpus: Path) -> None:
    _, data_state = read(opened(corpus), 1, spec())
    data_state["epoch_tokens"] += 1
    with pytest.raises(DataError, match=r"counted \d+ tokens .*init_from="):
        read(opened(corpus), 1, spec(), data_state)


def test_each_document_comes_exactly_once_per_epoch(corpus: Path, expected: torch.Tensor) -> None:
    dataset = opened(corpus)
    rows, _ = read(dataset, STEPS, spec())
    assert torch.equal(rows, expected)
    lanes = reference(dataset, G, 2)
    texts = Counter(pq.read_table(corpus).column("text").to_pylist())
    for epoch in range(2):
        parts = []
        for lane in range(G):
            before, now = sum(map(len, lanes[lane][:epoch])), lanes[lane][epoch]
            stream = rows[:, lane, :-1].flatten().numpy().tobytes()[before : before + len(now)]
            assert stream == now  # the run is long enough to hold the epoch
            parts.append(stream)
        whole = Counter(b"".join(parts))
        assert whole == Counter(b"".join(text.encode() + b"\0" for text in texts.elements()))


Layout = tuple[int, int, int]
"""(processes, workers of each, accumulation)"""
LAYOUTS = list(itertools.product([1, 2, 4], [0, 1, 3], [1, 4]))


def read_all(
    dataset: data.Dataset, steps: int, layout: Layout, data_state: dict[str, Any] | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The global rows (steps, G, T + 1) of all processes, and their merged data state."""
    world, workers, micro = layout
    specs = [spec(rank=rank, world_size=world, micro_batches=micro) for rank in range(world)]
    parts = [read(dataset, steps, part, data_state, workers) for part in specs]
    merged = data.merge_data_states([data_state for _, data_state in parts])
    return torch.cat([rows for rows, _ in parts], dim=1), merged


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_global_batches_are_the_same_for_every_layout_also_interrupted(
    corpus: Path, expected: torch.Tensor, layout: Layout
) -> None:
    dataset, data_state = opened(corpus), None
    stops = sorted(random.Random(str(layout)).sample(range(1, STEPS), 2))
    for start, stop in itertools.pairwise([0, *stops, STEPS]):
        rows, data_state = read_all(dataset, stop - start, layout, data_state)
        assert torch.equal(rows, expected[start:stop])
    assert data_state == read(dataset, STEPS, spec())[1]
    assert min(epoch for epoch, _, _ in data_state["positions"]) == 2


def test_accumulation_cuts_the_rows_in_order(corpus: Path, expected: torch.Tensor) -> None:
    for micro_batches in (1, 2, 4, 8):
        with data.TrainLoader(
            opened(corpus), spec(micro_batches=micro_batches), DataLoaderConfig()
        ) as batches:
            batch = next(batches)
        assert [len(rows) for rows in batch.micro_batches] == [G // micro_batches] * micro_batches
        assert torch.equal(torch.cat(batch.micro_batches), expected[0])


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, STEPS // 2), st.sampled_from(LAYOUTS)), min_size=2, max_size=4
    )
)
def test_stopping_anywhere_and_resuming_with_another_layout_changes_nothing(
    corpus: Path, expected: torch.Tensor, legs: list[tuple[int, Layout]]
) -> None:
    dataset, data_state, done = opened(corpus), None, 0
    for steps, layout in legs:
        steps = min(steps, STEPS - done)
        if not steps:
            break
        rows, data_state = read_all(dataset, steps, layout, data_state)
        assert torch.equal(rows, expected[done : done + steps])
        done += steps


def test_every_data_state_continues_exactly_over_the_epoch_boundary(
    corpus: Path, expected: torch.Tensor
) -> None:
    dataset = opened(corpus)
    with data.TrainLoader(dataset, spec(), DataLoaderConfig()) as batches:
        data_states = [batch.data_state() for batch in itertools.islice(batches, STEPS - 1)]
    epochs = {tuple(e for e, _, _ in data_state["positions"]) for data_state in data_states}
    assert len(epochs) == 3
    for step, data_state in enumerate(data_states, 1):
        rows, _ = read(dataset, 1, spec(), data_state)
        assert torch.equal(rows[0], expected[step])


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_fewer_lanes_than_processes(corpus: Path, lanes: int) -> None:
    dataset = opened(corpus)
    alone, data_state = read(dataset, 9, spec(lanes=lanes))
    parts = [read(dataset, 9, spec(rank=r, world_size=4, lanes=lanes)) for r in range(4)]
    assert torch.equal(torch.cat([rows for rows, _ in parts], dim=1), alone)
    merged = data.merge_data_states([data_state for _, data_state in parts])
    assert merged == data_state
    again, _ = read(
        dataset, 3, spec(rank=1, world_size=2), merged
    )  # lanes come from the data state
    assert torch.equal(again, read(dataset, 3, spec(), data_state)[0][:, G // 2 :])


def test_tokens_of_any_tokenizer_are_the_same_for_every_layout_also_interrupted(
    tmp_path: Path,
) -> None:
    texts = marked(tmp_path)
    dataset = encoded(tmp_path, small_bpe(tmp_path, texts))
    expected, end = read(dataset, STEPS, spec())
    assert expected.dtype == torch.int32
    assert dataset.vocab_size > 256
    assert expected.max() < dataset.vocab_size
    for layout in [(1, 2, 4), (2, 0, 1), (4, 1, 1)]:
        first, data_state = read_all(dataset, 7, layout, None)
        second, data_state = read_all(
            pickle.loads(pickle.dumps(dataset)), STEPS - 7, layout, data_state
        )
        assert torch.equal(torch.cat((first, second)), expected)
        assert data_state == end


def test_without_shuffling_the_text_comes_in_file_order(tmp_path: Path) -> None:
    texts = marked(tmp_path, files=2, rows=10)
    config = DataLoaderConfig(shuffle=False)
    with data.TrainLoader(opened(tmp_path), spec(lanes=1), config) as batches:
        rows = torch.cat(next(batches).micro_batches)
    stream = rows[:, :-1].flatten().numpy().tobytes()
    assert "".join(text + "\0" for text in texts).encode().startswith(stream)


def test_epochs_are_counted_by_the_slowest_lane(corpus: Path) -> None:
    with data.TrainLoader(opened(corpus), spec(), DataLoaderConfig()) as batches:
        taken = list(itertools.islice(batches, STEPS))
    epochs = [batch.epoch for batch in taken]
    assert epochs == sorted(epochs)
    assert (epochs[0], epochs[-1]) == (0, 2)
    for batch in taken:
        assert batch.epoch == min(epoch for epoch, _, _ in batch.data_state()["positions"])


def test_one_unit_or_less_text_than_a_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["abc"])
    rows, data_state = read(opened(tmp_path), 2, spec())
    assert data_state["lanes"] == 1
    assert set(rows.numpy().tobytes().split(b"\0")) >= {b"abc"}
    write(tmp_path / "a.parquet", ["", "", None, ""])
    with pytest.raises(DataError, match="no text in the .* segments of lane 0"):
        read(opened(tmp_path), 1, spec())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed 7, this run 1337"),
        ({"shuffle": False}, "shuffle False, this run True"),
        ({"version": 9}, "version 9, this program reads 1 to 2"),
        ({"lanes": 3}, "processes a multiple of 3, or start a new run with its weights"),
        ({"lanes": 0}, "it has no lanes"),
        ({"first_lane": 4}, "holds lanes 4 to 19, this process reads 0 to 15"),
    ],
)
def test_a_data_state_of_another_run_is_refused(
    corpus: Path, change: dict[str, Any], message: str
) -> None:
    dataset = opened(corpus)
    _, data_state = read(dataset, 1, spec())
    with pytest.raises(DataError, match=message):
        data.TrainLoader(dataset, spec(), DataLoaderConfig(), {**data_state, **change})


@pytest.mark.parametrize(("sequences", "length"), [(2 * G, T), (G, 7)])
def test_steps_of_another_shape_go_on_at_the_next_token_of_every_lane(
    corpus: Path, expected: torch.Tensor, sequences: int, length: int
) -> None:
    dataset = opened(corpus)
    other = replace(spec(), sequences_per_step=sequences, block_size=length)
    before, data_state = read(dataset, 5, spec())
    after, data_state = read(dataset, 6, other, data_state)
    last, _ = read(dataset, 3, spec(), data_state)
    for lane in range(G):
        seen = torch.cat(
            [
                rows.view(len(rows), G, -1, rows.shape[-1])[:, lane, :, :-1].flatten()
                for rows in (before, after, last)
            ]
        )
        assert torch.equal(seen, expected[:, lane, :-1].flatten()[: len(seen)])


def test_a_batch_tells_which_documents_it_holds(corpus: Path) -> None:
    dataset = opened(corpus)
    texts = pq.read_table(corpus).column("text").to_pylist()
    with data.TrainLoader(dataset, spec(), DataLoaderConfig()) as batches:
        for batch in itertools.islice(batches, 30):
            named = set()
            for line in batch.describe():
                found = re.fullmatch(r".*part_(\d)\.parquet row group (\d) rows (.*)", line)
                assert found
                file, group = int(found[1]), int(found[2])
                for piece in found[3].split(", "):
                    first, _, last = piece.partition("-")
                    for row in range(int(first), int(last or first) + 1):
                        named.add(texts[40 * file + 10 * group + row])
            rows = torch.cat(batch.micro_batches).numpy()
            held = {mark for row in rows for mark in re.findall(r"<\d+>", row.tobytes().decode())}
            assert held <= {re.match(r"<\d+>", text)[0] for text in named}  # type: ignore[index]
            assert len(named) <= 2 * len(held) + 2 * G


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["text " * 30, None, "", "a\0b"] * 4)
    dataset = opened(tmp_path)
    for workers in (0, 2):
        config = DataLoaderConfig(num_workers=workers)
        with data.TrainLoader(dataset, spec(), config) as batches:
            for _ in range(60):
                next(batches)
            assert batches.skipped_counts["null documents"] >= 4
            assert batches.skipped_counts["NUL bytes replaced"] >= 4


# Evaluation.


def test_evaluation_rows_never_change(corpus: Path) -> None:
    dataset = opened(corpus, test_fraction=0.3)
    state = torch.get_rng_state()
    for name in ("train", "test"):
        rows = data.evaluation_rows(dataset, name, T, 10)
        assert rows.shape == (10, T + 1)
        assert rows.dtype == torch.uint8
        again = data.evaluation_rows(opened(corpus, test_fraction=0.3), name, T, 10)
        assert torch.equal(rows, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_rows_are_spread_over_the_whole_split(tmp_path: Path) -> None:
    texts = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(120)]
    write(tmp_path / "a.parquet", [*texts])
    dataset = opened(tmp_path, test_fraction=0.1)
    assert len(split(dataset, "test")) <= 16  # of more units, only some are read
    every = data.evaluation_rows(dataset, "test", T, 10_000)
    few = data.evaluation_rows(dataset, "test", T, 4)
    assert len(every) > 2 * len(few)
    places = [int((every == row).all(dim=1).nonzero()) for row in few]
    gaps = np.diff([*places, len(every)])
    assert places[0] == 0
    assert gaps.max() <= 2 * gaps.min()


def test_evaluation_uses_only_its_split_and_each_token_once(corpus: Path) -> None:
    dataset = opened(corpus, test_fraction=0.3)
    rows = data.evaluation_rows(dataset, "test", T, 10_000)
    source = reader(dataset)
    tokens = sum(len(source.tokens(int(unit), 0, 0, True)) for unit in split(dataset, "test"))
    assert rows.shape[0] == (tokens - 1) // T
    starts = set(re.findall(r"<\d+>", rows[:, :-1].numpy().tobytes().decode()))
    training, _ = read(dataset, STEPS, spec())
    seen = set(re.findall(r"<\d+>", training[..., :-1].transpose(0, 1).numpy().tobytes().decode()))
    whole = {match for match in starts if int(match[1:-1]) >= 100}  # not cut out of a longer mark
    assert not whole & seen


def test_a_split_shorter_than_a_row_is_explained(tmp_path: Path) -> None:
    marked(tmp_path, files=1, rows=4)
    dataset = opened(tmp_path, test_fraction=0.1)
    # A count only where it is exact: an estimate may be above the row that it would stand beside.
    message = (
        r"^the test text \((\d+ tokens, )?dataset\.test_fraction 0\.1\) is shorter than one row "
        r"of .* 513 tokens"
    )
    with pytest.raises(DataError, match=message):
        data.evaluation_rows(dataset, "test", 512, 8)
    with pytest.raises(DataError, match=r"test_fraction 0\.0"):
        data.evaluation_rows(opened(tmp_path), "test", T, 8)


# Threads, workers, errors.


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data prefetch"]


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_no_thread_process_or_file(corpus: Path, workers: int) -> None:
    dataset = opened(corpus)
    read(dataset, 1, spec(), workers=workers)
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    batches = data.TrainLoader(dataset, spec(), DataLoaderConfig(num_workers=workers))
    kept = next(batches)
    assert feeds()
    assert len(multiprocessing.active_children()) == workers
    start = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - start < 30  # no wait runs to its end
    assert not feeds()
    assert not multiprocessing.active_children()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files
    assert kept.data_state()["positions"]
    with pytest.raises(DataError, match="closed"):
        for _ in range(10):
            next(batches)


def test_a_forgotten_loader_ends_its_thread(corpus: Path) -> None:
    batches = data.TrainLoader(opened(corpus), spec(), DataLoaderConfig())
    next(batches)
    del batches
    gc.collect()
    assert not feeds()


@pytest.mark.parametrize("workers", [0, 3])
def test_iterating_touches_no_global_random_state(corpus: Path, workers: int) -> None:
    dataset = opened(corpus)
    before, python_before = torch.get_rng_state(), random.getstate()
    read(dataset, 20, spec(), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_arrives_as_it_was_raised(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "a.parquet", ["x" * 40] * 50)
    dataset = opened(tmp_path)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"^.*a\.parquet: changed during the run [^\n]*$"):
        read(dataset, 5, spec(), workers=workers)
    assert not feeds()
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_named(corpus: Path) -> None:
    config = DataLoaderConfig(num_workers=2)
    with data.TrainLoader(opened(corpus), spec(), config) as batches:
        next(batches)
        victim = multiprocessing.active_children()[0]
        assert victim.pid
        os.kill(victim.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(DataError, match=rf"worker {victim.pid} was lost \(killed by SIGKILL"):
            while True:
                next(batches)
        assert time.monotonic() - start < 30  # of no timeout


def test_workers_ignore_the_signals_of_the_group(corpus: Path, expected: torch.Tensor) -> None:
    config = DataLoaderConfig(num_workers=2)
    with data.TrainLoader(opened(corpus), spec(), config) as batches:
        next(batches)
        for process in multiprocessing.active_children():
            for number in STOP_EXIT_CODES:
                assert process.pid
                os.kill(process.pid, number)
        for step in range(1, STEPS):
            assert torch.equal(next(batches).micro_batches[0], expected[step])


def test_a_source_that_hangs_is_an_error(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "TIMEOUT_S", 1.0)
    hung = threading.Event()
    monkeypatch.setattr(LanePlan, "lane_segments", lambda *_: hung.wait(30))
    batches = data.TrainLoader(opened(corpus), spec(), DataLoaderConfig())
    with pytest.raises(DataError, match="no batch within 1 s"):
        next(batches)
    hung.set()
    batches.close()


def test_more_workers_than_lanes_is_said(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, _ = read(opened(corpus), 3, spec(lanes=2), workers=3)
    assert len(rows) == 3
    assert "num_workers: 3, but this process reads 2 lanes; 2 workers are used" in caplog.text


def test_neighbours_in_a_batch_come_from_different_places(tmp_path: Path) -> None:
    marked(tmp_path, files=8, rows=200)
    dataset = opened(tmp_path)
    text = folder_of(dataset)
    plan = LanePlan(
        text.segments(0).shuffle_keys,
        split(dataset, "train"),
        lanes=G,
        seed=1337,
        shuffle=True,
    )
    files = [
        text.index.group_file[text.segments(0).table.group[plan.lane_segments(0, v)]]
        for v in range(G)
    ]
    length = min(map(len, files))
    table = np.stack([row[:length] for row in files])
    same = (table[1:] == table[:-1]).mean()
    assert 0.0 < same < 0.35  # 1 / 8 expected
