"""The rows that a run is evaluated on: fixed, of their split only, spread over all of it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

import data
from config import DataError
from data.sources.tokens import dataset as token_dataset
from data.sources.tokens.file import TokenMaps
from tests.data.batches import T, read, spec
from tests.data.parquet_folder import marked, opened, segment_tokens, split, write
from tests.data.token_files import ids, open_tokens, put


def test_rows_never_change_and_touch_no_random_state(parquet_corpus: Path) -> None:
    state = torch.get_rng_state()
    for name in ("train", "test"):
        rows, again = (
            data.evaluation_rows(opened(parquet_corpus, test_fraction=0.3), name, T, 10)
            for _ in range(2)
        )
        assert (rows.shape, rows.dtype) == ((10, T + 1), torch.uint8)
        assert torch.equal(rows, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_documents_are_spread_over_the_whole_split(tmp_path: Path) -> None:
    texts = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(120)]
    write(tmp_path / "a.parquet", [*texts])
    dataset = opened(tmp_path, test_fraction=0.1)
    assert len(split(dataset, "test")) <= 16  # of more segments, only some are read
    every = data.evaluation_rows(dataset, "test", T, 10_000)
    few = data.evaluation_rows(dataset, "test", T, 4)
    assert len(every) > 2 * len(few)
    places = [int((every == row).all(dim=1).nonzero()) for row in few]
    gaps = np.diff([*places, len(every)])
    assert places[0] == 0
    assert gaps.max() <= 2 * gaps.min()


def test_rows_hold_only_their_split_and_each_token_once(parquet_corpus: Path) -> None:
    dataset = opened(parquet_corpus, test_fraction=0.3)
    rows = data.evaluation_rows(dataset, "test", T, 10_000)
    tokens = segment_tokens(dataset, shuffle=True)
    assert len(rows) == (sum(len(tokens[i]) for i in split(dataset, "test")) - 1) // T
    marks = [
        set(re.findall(r"<\d+>", table.numpy().tobytes().decode()))
        for table in (rows[:, :-1], read(dataset, 40, spec())[0][..., :-1].transpose(0, 1))
    ]
    whole = {mark for mark in marks[0] if int(mark[1:-1]) >= 100}  # not cut out of a longer mark
    assert not whole & marks[1]


@pytest.mark.parametrize("most", [1000, 60])
def test_rows_of_token_files_are_spread_evenly(
    token_corpus: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(token_dataset, "MAX_SEGMENTS", most)
    dataset = open_tokens(token_corpus, test_fraction=0.2)
    for name, edges in (
        ("train", [(0, 2000), (2500, 2524), (2530, 3962)]),
        ("test", [(2000, 2500), (2524, 2530), (3962, 4321)]),
    ):
        every = [
            list(range(begin + T * row, begin + T * row + T + 1))
            for begin, end in edges
            for row in range(token_dataset.count_rows(end - begin, T))
        ]
        for count in (1, 7, 20, 10_000):
            rows = data.evaluation_rows(dataset, name, T, count)
            count = min(count, len(every))
            assert rows.dtype == torch.int32
            assert rows.tolist() == [every[i * len(every) // count] for i in range(count)]


def test_evaluation_reads_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_tokens(put(tmp_path / "a.bin", ids(20_000)))
    reads, real = list[tuple[int, int]](), TokenMaps.read

    def noted(self: TokenMaps, number: int, first: int, count: int) -> npt.NDArray[np.uint16]:
        reads.append((first, count))
        return real(self, number, first, count)

    monkeypatch.setattr(TokenMaps, "read", noted)
    assert len(data.evaluation_rows(dataset, "train", T, 30)) == 30
    assert [count for _, count in reads] == [T + 1] * 30
    assert reads[-1][0] - reads[0][0] > 19_000


def test_a_split_shorter_than_a_row_is_explained(tmp_path: Path) -> None:
    marked(tmp_path / "text", files=1, rows=4)
    dataset = opened(tmp_path / "text", test_fraction=0.1)
    message = (
        r"^the test text \((\d+ tokens, )?dataset\.test_fraction 0\.1\) is shorter than one row "
        r"of .* 513 tokens"
    )
    with pytest.raises(DataError, match=message):
        data.evaluation_rows(dataset, "test", 512, 8)
    with pytest.raises(DataError, match=r"test_fraction 0\.0"):
        data.evaluation_rows(opened(tmp_path / "text"), "test", T, 8)
    val, train = put(tmp_path / "val.bin", ids(T)), put(tmp_path / "train.bin", ids(T + 1))
    with pytest.raises(DataError, match=rf"the train text \({T} tokens, {val}.*\) .* {T + 1} tok"):
        read(open_tokens(val), 1, spec())
    rows, _ = read(open_tokens(train, val), 2, spec())
    assert set(rows.flatten().tolist()) == set(range(T + 1))
    with pytest.raises(DataError, match=rf"the test text \({T} tokens, {val}\) is shorter"):
        data.evaluation_rows(open_tokens(train, val), "test", T, 4)
    for name in "ab":
        put(tmp_path / "both" / f"{name}.bin", ids(100))
    message = r"the test text \(20 tokens, .*both: 2 files, each taken alone, .*0\.1\) is shorter"
    with pytest.raises(DataError, match=message):
        data.evaluation_rows(open_tokens(tmp_path / "both", test_fraction=0.1), "test", T, 4)
