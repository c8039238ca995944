"""Several sources in one run: every layout has the same batches, and each source its own epochs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data
from config import DataError, DataLoaderConfig, DatasetConfig, SourceConfig, TokenizerConfig
from data.sources.mixture import MixtureDataset
from tests.data.batches import G, Layout, read, read_all, spec
from tests.data.parquet_folder import write
from tests.data.token_files import ids, put

STEPS = 60
WEIGHTS = {"web": 0.6, "books": 0.3, "code": 0.1}


def mixed(sources: list[dict[str, Any]], tokenizer: str = "auto") -> MixtureDataset:
    entries = tuple(SourceConfig(**{"weight": 1.0, **source}) for source in sources)
    config = DatasetConfig(mixture=entries, test_fraction=0.0)
    dataset = data.open_dataset(config, TokenizerConfig(name=tokenizer), 5000)
    assert isinstance(dataset, MixtureDataset)
    return dataset


@pytest.fixture(scope="module")
def folder(parquet_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web: 120 documents; books: 700 bytes that tell their place; code: one row group."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "web").symlink_to(parquet_corpus)
    put(folder / "books.bin", 1 + ids(700) % 255, "uint8")
    write(folder / "code" / "a.parquet", [f"[{n}]" for n in range(100)], row_group_size=100)
    return folder


def opened(folder: Path, weights: dict[str, float], names: str = "web books code") -> Any:
    text = {
        "web": {"parquet_dir": str(folder / "web")},
        "books": {"train_data_path": str(folder / "books.bin"), "token_dtype": "uint8"},
        "code": {"parquet_dir": str(folder / "code")},
    }
    found = [{"name": name, "weight": weights[name], **text[name]} for name in names.split()]
    return mixed(found, "bytes")


Streams = dict[tuple[str, int], list[torch.Tensor]]
"""The rows of each (source, lane)."""


def streams(rows: torch.Tensor, states: list[dict[str, Any]]) -> Streams:
    """Sorts rows (steps, G, T + 1) by lane; `states` are those before and after each step."""
    found: Streams = {}
    for step, (before, after) in zip(rows, itertools.pairwise(states), strict=True):
        lanes = [
            (number, row % then["lanes"], row)
            for number, (then, now) in enumerate(
                zip(before["sources"], after["sources"], strict=True)
            )
            for row in range(then["rows"], now["rows"])
        ]
        for (number, lane, _), row in zip(sorted(lanes), step, strict=True):
            found.setdefault((after["sources"][number]["name"], lane), []).append(row)
    return found


def taken(
    dataset: data.Dataset, steps: int, state: dict[str, Any] | None = None, **options: Any
) -> tuple[torch.Tensor, list[dict[str, Any]], list[int]]:
    """Rows (steps, G, T + 1), the states before and after each step, and the epochs."""
    with data.TrainLoader(dataset, spec(**options), DataLoaderConfig(), state) as batches:
        states, parts = [batches.first_data_state()], list(itertools.islice(batches, steps))
    rows = torch.stack([torch.cat(batch.micro_batches) for batch in parts])
    return rows, states + [batch.data_state() for batch in parts], [b.epoch for b in parts]


def rows_given(states: list[dict[str, Any]]) -> list[list[int]]:
    return [[source["rows"] for source in state["sources"]] for state in states]


def check(folder: Path, phases: list[tuple[Layout, int]]) -> None:
    """Reads steps with one layout after the other; compares with an uninterrupted run of one."""
    dataset, state, done = opened(folder, WEIGHTS), None, 0
    expected, states, _ = taken(dataset, sum(steps for _, steps in phases))
    for layout, steps in phases:
        rows, state = read_all(dataset, steps, layout, state)
        assert torch.equal(rows, expected[done : done + steps])
        done += steps
        assert state == states[done]


def test_batches_are_the_same_for_every_layout_also_interrupted(folder: Path) -> None:
    check(folder, [((2, 0, 4), 13), ((16, 0, 1), 7), ((4, 0, 1), 21), ((1, 0, 8), 1)])


@pytest.mark.slow
def test_stopping_anywhere_and_resuming_with_other_layouts_changes_nothing(folder: Path) -> None:
    draw = random.Random(0)
    layouts = [(world, workers, 1) for world in (1, 2, 8) for workers in (0, 1, 3)]
    check(folder, [(layout, draw.randint(1, 9)) for layout in draw.sample(layouts, 6)])


def test_workers_and_fewer_lanes_than_processes_change_nothing(folder: Path) -> None:
    dataset = opened(folder, WEIGHTS)
    expected, states, _ = taken(dataset, 20, lanes=3)
    assert [source["lanes"] for source in states[0]["sources"]] == [2, 1, 1]
    rows, state = read_all(dataset, 20, (8, 0, 1), None, lanes=3)
    assert torch.equal(rows, expected)
    assert state == states[-1]
    assert torch.equal(read(dataset, 9, spec(lanes=3), workers=3)[0], expected[:9])


def test_each_source_reads_its_text_once_per_epoch_in_exact_shares(folder: Path) -> None:
    dataset = opened(folder, WEIGHTS)
    rows, states, epochs = taken(dataset, 2 * STEPS)
    for given in rows_given(states):
        for n, weight in zip(given, WEIGHTS.values(), strict=True):
            assert abs(n - weight * sum(given)) <= 0.75 + 1e-9
    found = streams(rows, states)
    assert epochs == sorted(epochs)
    assert epochs[-1] == min(p[0] for s in states[-1]["sources"] for p in s["positions"])
    for number, name in ((0, "web"), (2, "code")):
        texts = pq.read_table(folder / name)["text"].to_pylist()
        whole = Counter("".join(text + "\0" for text in texts).encode())
        lanes, total = states[0]["sources"][number]["lanes"], sum(whole.values())
        seen = Counter[int]()
        for lane in range(lanes):
            inputs = torch.stack(found[name, lane])
            assert torch.equal(inputs[1:, 0], inputs[:-1, -1])  # no token lost, none twice
            seen.update(inputs[:, :-1].flatten()[: (total + lane) // lanes].tolist())
        assert seen == whole
    lanes = states[0]["sources"][1]["lanes"]
    for lane in range(lanes):  # 42 rows of books in an epoch, dealt to the lanes
        begin = [int(row[0]) for row in found["books", lane]]
        assert len(set(begin[: 42 // lanes])) == 42 // lanes
    firsts = [int(row[0]) for lane in range(lanes) for row in found["books", lane][: 42 // lanes]]
    assert len(set(firsts)) == len(firsts)


def test_the_rows_of_a_source_do_not_depend_on_weights_that_change_at_a_resume(
    folder: Path,
) -> None:
    rows, states, _ = taken(opened(folder, WEIGHTS), 3 * STEPS)
    expected = streams(rows, states)
    found: Streams = {}
    state = None
    phases: list[tuple[dict[str, float], int]] = [
        (WEIGHTS, 11),
        ({"web": 1, "books": 1, "code": 2}, 13),
        ({"web": 0, "books": 3, "code": 7}, 9),
        ({"web": 0, "books": 6, "code": 14}, 5),  # the same shares
        (WEIGHTS, 17),
    ]
    for weights, steps in phases:
        rows, states, _ = taken(opened(folder, weights), steps, state)
        given = np.array(rows_given(states))
        share = np.array(list(weights.values())) / sum(weights.values())
        ideal = G * np.arange(steps + 1)[:, None] * share
        # From the change on; the same shares go on with what was given.
        assert (abs(given - given[0] - ideal) < (2 if steps == 5 else 0.75 + 1e-9)).all()
        for key, own in streams(rows, states).items():
            found.setdefault(key, []).extend(own)
        state = states[-1]
    for key, own in found.items():
        count = min(len(own), len(expected[key]))
        assert torch.equal(torch.stack(own[:count]), torch.stack(expected[key][:count]))


def test_a_source_without_weight_stays_where_it_is_and_may_begin_later(folder: Path) -> None:
    none = {**WEIGHTS, "books": 0}
    rows, states, _ = taken(opened(folder, none), 7)
    assert [source["lanes"] for source in states[-1]["sources"]] == [14, 1, 2]
    assert states[-1]["sources"][1]["positions"] == [[0, 0, 0]]
    merged = read_all(opened(folder, none), 7, (4, 0, 1), None)[1]
    assert merged == states[-1]
    _, states, _ = taken(opened(folder, WEIGHTS), 7, merged)
    assert [source["lanes"] for source in states[-1]["sources"]] == [14, 5, 2]
    assert states[-1]["sources"][1]["rows"] == round(0.3 * 7 * G)


def changes(state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    first, *rest = state["sources"]
    yield {"sources": [*rest, first]}, "has the sources"
    yield {"sources": rest}, "has the sources"
    yield {"seed": 7}, "seed 7, this run 1337"
    yield {"block_size": 7}, "block_size 7, this run 16"
    yield {"sources": [{**first, "epoch_tokens": 7}, *rest]}, "source web: .* counted 7 tokens"
    yield {"sources": [{**first, "rows_at_weight": 9}, *rest]}, "do not follow from their weights"
    yield {"sources": [{**first, "positions": []}, *rest]}, "it has no lanes"


def test_data_states_and_data_of_other_mixtures_are_refused(folder: Path) -> None:
    dataset = opened(folder, WEIGHTS)
    state = taken(dataset, 3)[1][-1]
    for change, message in changes(state):
        with pytest.raises(DataError, match=message):
            data.TrainLoader(dataset, spec(), DataLoaderConfig(), {**state, **change})
    alone = data.open_dataset(DatasetConfig(parquet_dir=str(folder / "web")), TokenizerConfig())
    with pytest.raises(DataError, match="has the sources"):
        data.TrainLoader(alone, spec(), DataLoaderConfig(), state)
    saved = dataset.summary()
    opened(folder, {**WEIGHTS, "web": 5}).check_unchanged(saved)
    for other, message in (
        (alone, "it was a mixture of web, books, code, is parquet files of"),
        (opened(folder, WEIGHTS, "books web code"), "is a mixture of books, web, code"),
    ):
        with pytest.raises(DataError, match=message):
            other.check_unchanged(saved)
    saved["sources"][1]["fingerprint"] = saved["fingerprint"] = "other"
    with pytest.raises(DataError, match="source books: same sizes, but other tokens"):
        dataset.check_unchanged(saved)


def test_all_sources_have_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.parquet", ["abc"] * 20)
    write(tmp_path / "b" / "b.parquet", ["cde"] * 20)
    text = [{"name": name, "parquet_dir": str(tmp_path / name)} for name in "ab"]
    tokens = {"name": "t", "train_data_path": str(put(tmp_path / "t.bin", ids(700)))}
    chars = mixed(text, "char")
    assert chars.tokenizer.decode(range(chars.vocab_size)) == "abcde"
    assert mixed(text).tokenizer.name == "bytes"
    assert mixed([tokens]).vocab_size == 5000
    with pytest.raises(DataError, match=r"a, b: text, to be mixed with the tokens of t.*tokenizer"):
        mixed([*text, tokens])
    assert len(mixed(text).lines()) == 2 * len(alone_lines(text[0]))
    assert mixed(text).stats.train_tokens == 160


def test_errors_of_a_source_name_it_and_its_options(folder: Path, tmp_path: Path) -> None:
    for name in ("plain", "lines"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "a.txt").write_text("no parquet")
    columns = pa.table({"line": ["a"] * 20, "id": ["b"] * 20})
    pq.write_table(columns, tmp_path / "lines" / "a.parquet")
    (tmp_path / "odd.bin").write_bytes(b"odd")
    for key, path, message in (
        ("parquet_dir", "plain", r"mixture\.a\.parquet_dir .* then set mixture\.a\.parquet_dir="),
        ("parquet_dir", "lines", r".*Name one: mixture\.a\.text_column=NAME"),
        ("train_data_path", "odd.bin", r".*Set mixture\.a\.token_dtype"),
    ):
        with pytest.raises(DataError, match=f"^source a: {message}"):
            mixed([{"name": "a", "token_dtype": "uint16", key: str(tmp_path / path)}])
    good = put(tmp_path / "good.bin", ids(700))
    dataset = mixed([{"name": "a", "train_data_path": str(good)}])
    good.unlink()
    with pytest.raises(DataError, match="^source a: .*good.bin"):
        taken(dataset, 1)


def alone_lines(source: dict[str, Any]) -> list[str]:
    config = DatasetConfig(parquet_dir=source["parquet_dir"], test_fraction=0.0)
    return data.open_dataset(config, TokenizerConfig()).lines()
