"""The same batches for any processes, workers and micro-batches, stopped and resumed anywhere."""

from __future__ import annotations

import itertools
import pickle
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import DataError, DataLoaderConfig
from data.loading import lanes, order
from data.sources.parquet.dataset import ParquetDataset
from data.sources.tokens import dataset as token_dataset
from tests.data.batches import G, Layout, T, read, read_all, spec
from tests.data.parquet_folder import marked, opened, small_bpe, split, write
from tests.data.token_files import VOCABULARY, ids, open_tokens, put

STEPS = 40  # two epochs of the corpora, for every lane


# Slow and separate: what the loader should give.


def dealt(dataset: ParquetDataset, count: int, epoch: int) -> list[bytes]:
    """The documents of each lane in one epoch, before lanes are balanced."""
    index, table = dataset.index, dataset.segments(T).table
    training = split(dataset, "train")
    keys = table.shuffle_key[training]
    texts = [pq.read_table(index.path(i))["text"].to_pylist() for i in range(len(index.paths))]
    plan = order.segment_order(keys, 1337, epoch)
    result = []
    for lane in range(count):
        text = b""
        for segment in training[plan[lanes.assign_lanes(keys[plan], count) == lane]]:
            group = table.group[segment]
            first = 10 * int(index.group_number[group]) + int(table.first[segment])
            documents = texts[index.group_file[group]][first : first + int(table.rows[segment])]
            key = int(table.key[segment])
            for i in order.document_order(key, 1337, epoch, len(documents)):
                text += documents[i].encode() + b"\0"
        result.append(text)
    return result


def balanced(texts: list[bytes], epoch: int) -> list[bytes]:
    """The text of each lane: what is too much in one fills those of too little."""
    targets = lanes.tokens_per_lane(sum(map(len, texts)), len(texts), epoch)
    rest = b"".join(text[n:] for text, n in zip(texts, targets, strict=True))
    result = []
    for text, target in zip(texts, targets, strict=True):
        missing = max(0, target - len(text))
        result.append(text[:target] + rest[:missing])
        rest = rest[missing:]
    return result


def packed_batches(streams: list[bytes]) -> torch.Tensor:
    """The global rows of every step, from as many lanes as rows."""
    rows = np.empty((STEPS, G, T + 1), dtype=np.uint8)
    for lane, text in enumerate(streams):
        stream = np.frombuffer(text, dtype=np.uint8)
        for step in range(STEPS):
            rows[step, lane] = stream[step * T : step * T + T + 1]
    return torch.from_numpy(rows)


def rows_of_lane(folder: Path, lane: int, count: int, segment_rows: int) -> list[list[list[int]]]:
    """The rows of a lane of token files, epoch by epoch."""
    parts = [np.fromfile(path, np.uint16).tolist() for path in sorted(folder.iterdir())]
    result = []
    for epoch in range(5):
        segments = []
        for part in parts:
            number = max((len(part) - T) // T, 1 if len(part) > T else 0)
            offset = order.row_offset_hash(1337, epoch) % (len(part) - number * T)
            rows = [part[offset + row * T :][: T + 1] for row in range(number)]
            segments += [rows[i : i + segment_rows] for i in range(0, number, segment_rows)]
        keys = order.numbered_keys(order.path_keys(["train"]), np.arange(len(segments)))
        plan = order.segment_order(keys, 1337, epoch).tolist()
        result.append([row for segment in plan[lane::count] for row in segments[segment]])
    return result


def token_batches(folder: Path, count: int, segment_rows: int) -> torch.Tensor:
    """The global rows of every step of token files."""
    each = G // count
    batches = np.empty((STEPS, G, T + 1), dtype=np.int32)
    for lane in range(count):
        rows = list(itertools.chain(*rows_of_lane(folder, lane, count, segment_rows)))
        batches[:, lane * each : (lane + 1) * each] = np.reshape(
            rows[: STEPS * each], (STEPS, each, T + 1)
        )
    return torch.from_numpy(batches)


class Case(NamedTuple):
    dataset: data.Dataset
    expected: torch.Tensor


@pytest.fixture(scope="module")
def documents(parquet_corpus: Path) -> Case:
    dataset = opened(parquet_corpus)
    epochs = [balanced(dealt(dataset, G, epoch), epoch) for epoch in range(6)]
    return Case(dataset, packed_batches([b"".join(texts) for texts in zip(*epochs, strict=True)]))


@pytest.fixture(scope="module")
def tokens(token_corpus: Path) -> Case:
    return Case(open_tokens(token_corpus), token_batches(token_corpus, G, 1))


@pytest.fixture(params=["documents", "tokens"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


# Order and resume.


@pytest.mark.parametrize("layout", [(1, 0, 1), (2, 0, 4), (4, 0, 1)], ids=str)
def test_batches_are_the_same_for_every_layout_also_interrupted(case: Case, layout: Layout) -> None:
    dataset, expected = case
    state, stops = None, sorted(random.Random(str(layout)).sample(range(1, STEPS), 2))
    for start, stop in itertools.pairwise([0, *stops, STEPS]):
        rows, state = read_all(dataset, stop - start, layout, state)
        assert rows.dtype == expected.dtype
        assert torch.equal(rows, expected[start:stop])
    assert state == read(dataset, STEPS, spec())[1]


LAYOUTS = list(itertools.product([1, 2, 4], [0, 1, 3], [1, 4]))


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.data(), st.permutations(LAYOUTS))
def test_stopping_anywhere_and_resuming_with_another_layout_changes_nothing(
    documents: Case, tokens: Case, draw: st.DataObject, layouts: list[Layout]
) -> None:
    for dataset, expected in (documents, tokens):
        state, done = None, 0
        for layout in layouts[:3]:
            steps = draw.draw(st.integers(1, STEPS // 3))
            rows, state = read_all(dataset, steps, layout, state)
            assert torch.equal(rows, expected[done : done + steps])
            done += steps


def test_every_data_state_continues_exactly_over_the_epoch_boundary(case: Case) -> None:
    dataset, expected = case
    with data.TrainLoader(dataset, spec(), DataLoaderConfig()) as batches:
        first = batches.first_data_state()
        taken = list(itertools.islice(batches, STEPS - 1))
    states = [first, *(batch.data_state() for batch in taken)]
    for step in range(0, STEPS, 5):
        assert torch.equal(read(dataset, 1, spec(), states[step])[0][0], expected[step])
        with data.TrainLoader(dataset, spec(), DataLoaderConfig(), states[step]) as batches:
            next(batches)
            assert batches.first_data_state() == states[step]
    epochs = [batch.epoch for batch in taken]
    assert epochs == sorted(epochs)
    assert (epochs[0], epochs[-1]) == (0, 2)
    for batch, state in zip(taken, states[1:], strict=True):
        assert batch.epoch == min(epoch for epoch, _, _ in state["positions"])


def test_each_document_comes_exactly_once_per_epoch(documents: Case, parquet_corpus: Path) -> None:
    dataset, rows = documents
    assert isinstance(dataset, ParquetDataset)
    texts = pq.read_table(parquet_corpus)["text"].to_pylist()
    streams = [rows[:, lane, :-1].flatten().numpy().tobytes() for lane in range(G)]
    for epoch in range(2):
        ends = [len(text) for text in balanced(dealt(dataset, G, epoch), epoch)]
        whole = Counter(b"".join(stream[:end] for stream, end in zip(streams, ends, strict=True)))
        assert whole == Counter("".join(text + "\0" for text in texts).encode())
        streams = [stream[end:] for stream, end in zip(streams, ends, strict=True)]


@pytest.mark.parametrize("count", [1, 4, 16])
def test_every_row_comes_exactly_once_per_epoch_and_lies_in_one_file(
    tokens: Case, token_corpus: Path, count: int
) -> None:
    rows, _ = read(tokens.dataset, STEPS, spec(lanes=count))
    each, starts = G // count, list[list[int]]()
    for epoch in range(2):
        seen = Counter[int]()
        for lane in range(count):
            epochs = rows_of_lane(token_corpus, lane, count, 1)
            before, now = (sum(map(len, epochs[:end])) for end in (epoch, epoch + 1))
            stream = rows[:, lane * each : (lane + 1) * each].reshape(-1, T + 1)
            assert bool((stream.diff() == 1).all())
            seen.update(stream[before:now, 0].tolist())
        assert set(seen.values()) == {1}
        for (begin, end), number in (((0, 2500), 155), ((2500, 2530), 1), ((2530, 4321), 110)):
            firsts = sorted(first for first in seen if begin <= first < end)
            assert np.diff(firsts).tolist() == [T] * (number - 1)
            assert firsts[-1] + T < end
            starts.append(firsts)
    assert all(starts[i][0] != starts[i + 3][0] for i in range(3))  # each epoch cuts elsewhere


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize(("most", "segment_rows"), [(266, 1), (265, 2), (60, 5)])
def test_more_rows_than_a_plan_takes_are_shuffled_by_some(
    token_corpus: Path, monkeypatch: pytest.MonkeyPatch, count: int, most: int, segment_rows: int
) -> None:
    monkeypatch.setattr(token_dataset, "MAX_SEGMENTS", most)
    dataset = open_tokens(token_corpus)
    first, state = read_all(dataset, 13, (2, 0, 1), None, lanes=count)
    second, _ = read_all(dataset, STEPS - 13, (4, 0, 1), state)
    expected = token_batches(token_corpus, count, segment_rows)
    assert torch.equal(torch.cat((first, second)), expected)


def test_a_run_of_an_earlier_version_goes_on_in_its_own_order(documents: Case) -> None:
    dataset = documents.dataset
    assert isinstance(dataset, ParquetDataset)
    epochs = [dealt(dataset, G, epoch) for epoch in range(9)]
    earlier = packed_batches([b"".join(texts) for texts in zip(*epochs, strict=True)])
    _, state = read(dataset, 1, spec())
    state |= {"version": 1, "positions": [[0, 0, 0]] * G}
    del state["epoch_tokens"]
    rows, after = read(dataset, 7, spec(), state)
    assert torch.equal(rows, earlier[:7])
    assert after["version"] == 1
    rest, _ = read(dataset, STEPS - 7, spec(), after)
    assert torch.equal(rest, earlier[7:])


def test_micro_batches_cut_the_rows_in_order(case: Case) -> None:
    for count in (1, 2, 4, 8):
        with data.TrainLoader(
            case.dataset, spec(micro_batches=count), DataLoaderConfig()
        ) as batches:
            batch = next(batches)
        assert [len(rows) for rows in batch.micro_batches] == [G // count] * count
        assert torch.equal(torch.cat(batch.micro_batches), case.expected[0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_lanes_than_processes(case: Case, count: int) -> None:
    dataset = case.dataset
    alone, state = read(dataset, 9, spec(lanes=count))
    rows, merged = read_all(dataset, 9, (4, 0, 1), None, lanes=count)
    assert torch.equal(rows, alone)
    assert merged == state
    again, _ = read(dataset, 3, spec(rank=1, world_size=2), merged)  # with the lanes of the state
    assert torch.equal(again, read(dataset, 3, spec(), state)[0][:, G // 2 :])


@pytest.mark.slow
def test_tokens_of_any_tokenizer_are_the_same_for_every_layout(tmp_path: Path) -> None:
    texts = marked(tmp_path)
    dataset = opened(tmp_path, small_bpe(tmp_path, texts))
    expected, end = read(dataset, STEPS, spec())
    assert expected.dtype == torch.int32
    assert 256 < expected.max() < dataset.vocab_size
    for layout in [(1, 2, 4), (2, 0, 1), (4, 1, 1)]:
        first, state = read_all(dataset, 7, layout, None)
        second, state = read_all(pickle.loads(pickle.dumps(dataset)), STEPS - 7, layout, state)
        assert torch.equal(torch.cat((first, second)), expected)
        assert state == end


def test_without_shuffling_the_text_comes_as_it_is_stored(tmp_path: Path) -> None:
    texts = marked(tmp_path / "text", files=2, rows=10)
    for part in range(3):
        put(tmp_path / "tokens" / f"{part}.ids", ids(700, 1000 * part))
    joined = "".join(text + "\0" for text in texts).encode()
    (tmp_path / "bytes.bin").write_bytes(joined)
    begins = [1000 * part + T * row for part in range(3) for row in range(42)]
    rows = []
    for dataset in (
        opened(tmp_path / "text"),
        open_tokens(tmp_path / "bytes.bin", tokenizer="bytes", token_dtype="uint8"),
        open_tokens(tmp_path / "tokens"),
    ):
        config = DataLoaderConfig(shuffle=False)
        with data.TrainLoader(dataset, spec(lanes=1), config) as batches:
            rows.append(torch.cat([next(batches).micro_batches[0] for _ in range(10)]))
    text, as_bytes, numbers = rows
    assert joined.startswith(text[:G, :-1].flatten().numpy().tobytes())
    assert torch.equal(text[:G], as_bytes[:G])  # bytes are the same tokens in either kind of file
    assert numbers[:, 0].tolist() == [begins[i % len(begins)] for i in range(10 * G)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed 7, this run 1337"),
        ({"shuffle": False}, "shuffle False, this run True"),
        ({"version": 9}, "version 9, this program reads 1 to 2"),
        ({"lanes": 3}, "processes a multiple of 3, or start a new run with its weights"),
        ({"lanes": 0}, "it has no lanes"),
        ({"first_lane": 4}, "holds lanes 4 to 19, this process reads 0 to 15"),
        ({"epoch_tokens": 7}, r"counted 7 tokens .*init_from="),
    ],
)
def test_a_data_state_of_another_run_is_refused(
    documents: Case, change: dict[str, Any], message: str
) -> None:
    _, state = read(documents.dataset, 1, spec())
    with pytest.raises(DataError, match=message):
        data.TrainLoader(documents.dataset, spec(), DataLoaderConfig(), {**state, **change})


@pytest.mark.parametrize(("sequences", "length"), [(2 * G, T), (G, 7)])
def test_steps_of_another_shape_go_on_at_the_next_token_of_every_lane(
    documents: Case, tokens: Case, sequences: int, length: int
) -> None:
    dataset, expected = documents
    other = spec(sequences_per_step=sequences, block_size=length)
    before, state = read(dataset, 5, spec())
    after, state = read(dataset, 6, other, state)
    last, _ = read(dataset, 3, spec(), state)
    for lane in range(G):
        seen = torch.cat(
            [
                rows.view(len(rows), G, -1, rows.shape[-1])[:, lane, :, :-1].flatten()
                for rows in (before, after, last)
            ]
        )
        assert torch.equal(seen, expected[:, lane, :-1].flatten()[: len(seen)])
    _, state = read(tokens.dataset, 1, spec())
    read(tokens.dataset, 1, replace(spec(), sequences_per_step=sequences), state)
    if length != T:  # rows of token files are cut by their length
        with pytest.raises(DataError, match=r"block_size 16, this run 7, .* training.init_from="):
            read(tokens.dataset, 1, other, state)


def test_one_segment_or_less_text_than_a_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["abc"])
    rows, state = read(opened(tmp_path), 2, spec())
    assert state["lanes"] == 1
    assert set(rows.numpy().tobytes().split(b"\0")) >= {b"abc"}
    write(tmp_path / "a.parquet", ["", "", None, ""])
    with pytest.raises(DataError, match="no text in the .* segments of lane 0"):
        read(opened(tmp_path), 1, spec())


def test_neighbours_in_a_batch_come_from_different_places(tmp_path: Path) -> None:
    marked(tmp_path, files=8, rows=200)
    dataset = opened(tmp_path)
    table, training = dataset.segments(T).table, split(dataset, "train")
    plan = lanes.LanePlan(table.shuffle_key, training, lanes=G, seed=1337, shuffle=True)
    files = [dataset.index.group_file[table.group[plan.lane_segments(0, v)]] for v in range(G)]
    length = min(map(len, files))
    places = np.stack([row[:length] for row in files])
    assert 0.0 < (places[1:] == places[:-1]).mean() < 0.35  # 1 / 8 expected


# What is told of a batch.


def numbers_in(text: str) -> set[int]:
    """'1-3, 7' as {1, 2, 3, 7}."""
    found = set[int]()
    for piece in text.split(", "):
        first, _, last = piece.replace(",", "").partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def test_a_batch_tells_which_documents_it_holds(documents: Case, parquet_corpus: Path) -> None:
    texts = pq.read_table(parquet_corpus)["text"].to_pylist()
    with data.TrainLoader(documents.dataset, spec(), DataLoaderConfig()) as batches:
        for batch in itertools.islice(batches, 20):
            named = set[str]()
            for line in batch.describe():
                found = re.fullmatch(r".*part_(\d)\.parquet row group (\d) rows (.*)", line)
                assert found
                first = 40 * int(found[1]) + 10 * int(found[2])
                named.update(texts[first + row] for row in numbers_in(found[3]))
            rows = torch.cat(batch.micro_batches).numpy()
            held = {mark for row in rows for mark in re.findall(r"<\d+>", row.tobytes().decode())}
            assert held <= {text[: text.index(">") + 1] for text in named}
            assert len(named) <= 2 * len(held) + 2 * G


def test_a_batch_tells_which_tokens_it_holds(tokens: Case, token_corpus: Path) -> None:
    before = {"a": 0, "b": 2500, "c": 2530}
    with data.TrainLoader(tokens.dataset, spec(lanes=2), DataLoaderConfig()) as batches:
        for batch in itertools.islice(batches, 20):
            named = set[int]()
            for line in batch.describe():
                found = re.fullmatch(rf"{token_corpus}/([abc])\.bin tokens (.*)", line)
                assert found
                named |= {before[found[1]] + number for number in numbers_in(found[2])}
            assert named == set(torch.cat(batch.micro_batches).flatten().tolist())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_skipped_is_counted(tmp_path: Path, workers: int) -> None:
    write(tmp_path / "a.parquet", ["text " * 30, None, "", "a\0b"] * 4)
    config = DataLoaderConfig(num_workers=workers)
    with data.TrainLoader(opened(tmp_path), spec(), config) as batches:
        for _ in range(60):
            next(batches)
        assert batches.skipped_counts["null documents"] >= 4
        assert batches.skipped_counts["NUL bytes replaced"] >= 4


def test_names_and_folders_of_token_files_do_not_matter(tokens: Case, tmp_path: Path) -> None:
    for name, first, last in (("x", 0, 2500), ("y", 2500, 2530), ("z", 2530, 4321)):
        put(tmp_path / f"{name}.ids", ids(last - first, first))
    other = open_tokens(tmp_path, vocab_size=VOCABULARY)
    other.check_unchanged(tokens.dataset.summary())
    assert torch.equal(read(other, 9, spec())[0], tokens.expected[:9])
