"""Remote parquet: the batches of local files through any fault, few requests, bounded copies."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import DataError
from data import StepBatch, TrainLoader
from data.loading.lanes import LanePlan
from data.loading.packing import LaneReader
from data.remote import read_ahead
from data.remote import store as store_module
from data.remote.range_cache import Range, RangeCache
from data.sources.cache import cache_folder
from data.sources.parquet import counting, remote_file
from data.sources.parquet import dataset as parquet_dataset
from data.sources.parquet import reader as parquet_reader
from data.sources.parquet.dataset import ParquetDataset
from tests.data.batches import read, spec
from tests.data.parquet_folder import opened, segment_count, texts_of, write
from tests.remote_servers import S3Server, WebServer
from tests.runs import only_run, run_here

FILES, GROUPS, ROWS = 3, 8, 10
STEPS = 60


@pytest.fixture(autouse=True)
def quick_retries_and_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of random letters: 20 KB in each row group, more than Arrow reads with a footer."""
    folder, draw = tmp_path_factory.mktemp("random"), random.Random(0)
    for file in range(FILES):
        texts = [draw.randbytes(1000).hex() for _ in range(GROUPS * ROWS)]
        pages = {"data_page_size": 4000, "write_batch_size": 1, "use_dictionary": False}
        write(folder / f"part_{file}.parquet", list(texts), row_group_size=ROWS, **pages)
    return folder


def rows_of(dataset: ParquetDataset, steps: int = STEPS, **options: Any) -> torch.Tensor:
    return read(dataset, steps, spec(block_size=256), **options)[0]


def uploaded(server: WebServer, folder: Path, **options: Any) -> ParquetDataset:
    """The dataset of a folder's files as the server has them."""
    server.files = {f"text/{path.name}": path.read_bytes() for path in folder.iterdir()}
    dataset = opened(f"{server.url}/text", **options)
    server.faults.requests.clear()
    return dataset


def read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes row groups from the front, of several ranges."""
    monkeypatch.setattr(parquet_reader, "WHOLE_GROUP_BYTES", 1000)
    monkeypatch.setattr(parquet_reader, "_READ_BUFFER_BYTES", 100)
    monkeypatch.setattr(remote_file, "RANGE_BYTES", 5000)


def first_segments(dataset: ParquetDataset) -> list[int]:
    """The first segment of each row group."""
    table = dataset.segments(1).table
    return [int(number) for number in np.flatnonzero(table.first == 0)]


def of_text(server: WebServer) -> list[str]:
    """The requests for row groups, not for footers."""
    ends = tuple(f"-{len(body) - 1}" for body in server.files.values())
    return [each for each in server.faults.reads if not each.endswith(ends)]


def size_of(request: str) -> int:
    """The bytes that a request asks for."""
    first, last = request.split("bytes=")[1].split("-")
    return int(last) + 1 - int(first)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "remote read"]


@pytest.mark.parametrize(("kept", "whole"), [(0, True), (200_000, True), (1 << 30, False)])
def test_a_faulty_server_gives_the_batches_of_local_files(
    folder: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch, kept: int, whole: bool
) -> None:
    """More than an epoch, with a resume, of row groups read at once or in several ranges."""
    if not whole:
        read_in_parts(monkeypatch)
    remote = uploaded(web_server, folder, cache_bytes=kept, retry_seconds=20.0)
    web_server.faults.rate = 0.1
    local, (first, state) = opened(folder), read(remote, STEPS, spec(block_size=256))
    second, _ = read(remote, STEPS, spec(block_size=256), state)
    assert torch.equal(torch.cat([first, second]), rows_of(local, 2 * STEPS))


@pytest.mark.slow
def test_workers_on_s3_read_what_one_process_reads_locally(
    folder: Path, s3_server: S3Server
) -> None:
    s3_server.put("bucket", {f"text/{path.name}": path.read_bytes() for path in folder.iterdir()})
    remote = opened("s3://bucket/text", retry_seconds=20.0)
    s3_server.faults.rate = 0.05
    assert torch.equal(rows_of(remote, workers=3), rows_of(opened(folder)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_row_group_is_fetched_once_though_its_segments_are_read_apart(
    folder: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Without copies on disk or decoded row groups, four lanes in turn."""
    if not whole:
        read_in_parts(monkeypatch)
    monkeypatch.setattr(parquet_dataset, "SEGMENT_BYTES", 5000)
    monkeypatch.setattr(parquet_reader, "KEPT_BYTES", 0)
    remote = uploaded(web_server, folder, cache_bytes=0)
    lanes = np.array_split(np.arange(segment_count(remote)), 4)
    reader = remote.segments(1).open_reader()
    for step in range(len(lanes[0])):
        for lane, segments in enumerate(lanes):
            reader.prefetch(lane, segments[step:].tolist())
            if step < len(segments):
                reader.tokens(int(segments[step]), 1, 0, True)
    reader.close()
    reads = of_text(web_server)
    assert len(reads) == len(set(reads)) >= FILES * GROUPS


def test_what_lanes_announce_is_what_they_read_next_across_epochs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, announced = opened(folder), list[list[int]]()
    reader, segments = dataset.segments(1).open_reader(), np.arange(20)
    monkeypatch.setattr(reader, "prefetch", lambda lane, found: announced.append(list(found)))
    monkeypatch.setattr(reader, "tokens", lambda segment, *order: np.full(1, segment))
    plan = LanePlan(dataset.segments(1).table.key, segments, lanes=2, seed=1, shuffle=True)
    source = LaneReader(reader, plan)
    order = [int(source.tokens(epoch, 0, i)[0]) for epoch in range(4) for i in range(10)]
    for place, upcoming in enumerate(announced[:20], 1):
        assert upcoming[:10] == order[place : place + 10]


def test_the_second_run_reads_from_disk_and_damaged_copies_from_the_server(
    folder: Path, web_server: WebServer
) -> None:
    remote = uploaded(web_server, folder)
    expected = rows_of(remote)
    web_server.faults.requests.clear()
    assert torch.equal(rows_of(remote), expected)
    assert web_server.faults.requests == []
    copies = [path for path in (cache_folder() / "ranges").iterdir() if path.name != ".lock"]
    for number, path in enumerate(copies):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if number % 2 else content[:-1])
    assert torch.equal(rows_of(remote), expected)
    assert len(web_server.faults.requests) == len(copies)


def test_copies_stay_within_the_bound_and_the_last_used_remain() -> None:
    body = bytes(1000)
    ranges = [Range("https://host/a", "tag", start, start + 1000) for start in range(100)]
    # Two caches of one folder, as in two processes.
    for i, each in enumerate(ranges):
        RangeCache(20_000).save(each, body)
        sizes = [path.stat().st_size for path in (cache_folder() / "ranges").iterdir()]
        assert sum(sizes) <= 20_000 + 20  # the sum itself
        assert RangeCache(20_000).load(ranges[0]) == body, i
    kept = [each for each in ranges if RangeCache(20_000).load(each)]
    assert kept[0] == ranges[0] and kept[1:] == ranges[-len(kept) + 1 :] and len(kept) > 15
    assert RangeCache(20_000).load(ranges[0]._replace(tag="changed")) is None


def test_a_full_disk_only_means_no_copies(
    folder: Path,
    web_server: WebServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert torch.equal(rows_of(uploaded(web_server, folder)), rows_of(opened(folder)))
    assert "No space left" in caplog.text
    assert [path.name for path in (cache_folder() / "ranges").iterdir()] == [".lock"]


def test_reading_ahead_is_bounded_and_ends_with_the_reader(
    folder: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "READ_AHEAD_BYTES", 100_000)
    remote = uploaded(web_server, folder, cache_bytes=0)
    reader = remote.segments(1).open_reader()
    reader.prefetch(0, range(segment_count(remote)))
    wait_for(lambda: len(web_server.faults.reads) >= 2)
    time.sleep(0.1)
    assert sum(map(size_of, web_server.faults.reads)) <= 100_000
    assert threads()
    web_server.faults.latency_s = 0.2
    reader.prefetch(0, range(10, segment_count(remote)))
    reader.close()
    wait_for(lambda: not threads())


def test_a_server_that_stays_away_is_an_error_where_its_text_is_read(
    folder: Path, web_server: WebServer
) -> None:
    """Also with on_bad_shard: skip, which is for damage."""
    remote = uploaded(web_server, folder, cache_bytes=0, retry_seconds=0.1, on_bad_shard="skip")
    reader, (a, b, c) = remote.segments(1).open_reader(), first_segments(remote)[:3]
    reader.prefetch(0, [a, b])
    wait_for(lambda: len(web_server.faults.reads) == 3)  # a footer and two row groups
    web_server.faults.rate, web_server.faults.kinds = 1.0, ("503",)
    assert len(reader.tokens(a, 1, 0, True))
    reader.prefetch(0, [b, c])
    assert len(reader.tokens(b, 1, 0, True))
    with pytest.raises(DataError, match=r"http://.*part_0.parquet: .*retry_seconds"):
        reader.tokens(c, 1, 0, True)
    reader.close()
    with pytest.raises(DataError, match="retry_seconds"):
        rows_of(remote)


@pytest.mark.parametrize("skip", ["error", "skip"])
def test_a_file_that_changes_during_the_run_is_an_error(
    folder: Path, web_server: WebServer, skip: str
) -> None:
    remote = uploaded(web_server, folder, cache_bytes=0, on_bad_shard=skip)
    reader = remote.segments(1).open_reader()
    first, second = first_segments(remote)[:2]
    reader.tokens(first, 1, 0, True)
    web_server.files["text/part_0.parquet"] = web_server.files["text/part_1.parquet"]
    with pytest.raises(DataError, match=r"part_0.parquet: .*changed"):
        reader.tokens(second, 1, 0, True)
    reader.close()


def test_damaged_text_is_named_or_skipped_and_read_anew_by_the_next_start(
    folder: Path, web_server: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    good = uploaded(web_server, folder)
    body = web_server.files["text/part_1.parquet"]
    at = int(good.index.groups[GROUPS, 4]) + 5000  # in its first row group
    web_server.files["text/part_1.parquet"] = body[:at] + b"damage" + body[at + 6 :]
    with pytest.raises(DataError, match=r"http://.*part_1.parquet row group 0: .*damaged"):
        texts_of(opened(f"{web_server.url}/text"))
    skipping = opened(f"{web_server.url}/text", on_bad_shard="skip")
    assert len(texts_of(skipping)) == (FILES * GROUPS - 1) * ROWS
    assert "skipped: http://" in caplog.text
    # All else was kept on disk.
    assert len(of_text(web_server)) == FILES * GROUPS + 1


def test_counting_remote_text_reads_a_small_part_of_it(
    folder: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "REMOTE_BYTES", 50_000)
    remote, exact = uploaded(web_server, folder), opened(folder).stats.tokens
    assert abs(remote.stats.tokens - exact) <= remote.stats.error * exact
    assert 0 < len(of_text(web_server)) <= counting.MIN_REMOTE_SEGMENTS


@pytest.mark.slow
def test_a_run_whose_server_goes_away_ends_with_exit_3_and_its_steps_saved(
    folder: Path,
    web_server: WebServer,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(parquet_reader, "KEPT_BYTES", 0)
    monkeypatch.setattr(parquet_reader, "_LANE_RANGES", 1)
    real, steps = TrainLoader.__next__, itertools.count()

    def breaking(loader: TrainLoader) -> StepBatch:
        if next(steps) == 7:
            web_server.faults.rate, web_server.faults.kinds = 1.0, ("503",)
        return real(loader)

    url = uploaded(web_server, folder).index.root
    monkeypatch.setattr(TrainLoader, "__next__", breaking)
    words = f"""parquet_dir={url} cache_bytes=0 retry_seconds=0.2 block_size=512 max_iters=100000
        test_freq=null checkpoint_freq=null checkpoint_dir={tmp_path}"""
    assert run_here([*tiny, *words.split()]) == 3
    error = capsys.readouterr().err
    assert re.search(rf"{url}/part_..parquet: .*HTTP 503.*dataset.retry_seconds=0.2", error)
    assert "goes on with resume_from_checkpoint=auto" in error and "Traceback" not in error
    assert (only_run(tmp_path) / f"checkpoint_{next(steps) - 1}.json").exists()
