"""Where a run reads a text, found from the plan, is where its batches hold it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import data
from config import DataLoaderConfig
from data.loading.find_readings import Reading, ReadingSearch, find_matches
from data.loading.load_plan import plan_loading
from data.sources.dataset import Passage
from data.sources.parquet import counting
from tests.conftest import TEXT
from tests.data.batches import T, spec
from tests.data.parquet_folder import opened, small_bpe, write
from tests.data.test_mixture import WEIGHTS, mixed
from tests.data.token_files import ids, put

STEPS = 24  # several epochs
WORDS = [" ".join(TEXT.split()[n % 11 : n % 11 + 4]) for n in range(60)]


@pytest.fixture(scope="module")
def mixture(parquet_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    """web: 120 documents; books: bytes that tell their place; code: one row group."""
    folder = tmp_path_factory.mktemp("texts")
    put(folder / "books.bin", 1 + ids(700) % 255, "uint8")
    write(folder / "code" / "a.parquet", [f"[{n}]" for n in range(100)], row_group_size=100)
    text: list[dict[str, Any]] = [
        {"name": "web", "parquet_dir": str(parquet_corpus)},
        {"name": "books", "train_data_path": str(folder / "books.bin"), "token_dtype": "uint8"},
        {"name": "code", "parquet_dir": str(folder / "code")},
    ]
    return mixed([{**source, "weight": WEIGHTS[source["name"]]} for source in text], "bytes")


def check(dataset: data.Dataset, texts: list[str], per_step: tuple[int, ...] = (16, 32)) -> int:
    """Compares what the plan says of each text with batches, also after steps of another size;
    returns how many readings were compared."""
    state, step, compared = None, 0, 0
    for rows in per_step:
        own = spec(sequences_per_step=rows)
        plan = plan_loading(dataset, own, True, state)
        with data.TrainLoader(dataset, own, DataLoaderConfig(), state) as batches:
            taken = list(itertools.islice(batches, STEPS))
        held = {
            (step + 1 + number, sequence): dataset.tokenizer.decode(row.tolist())
            for number, batch in enumerate(taken)
            for sequence, row in enumerate(batch.micro_batches[0])
        }
        for text in texts:
            passage = Passage(text, dataset.tokenizer.encode(text))
            matches = [
                find_matches(source, T, passage, lambda *_: None) for source in dataset.sources
            ]
            found = list(ReadingSearch(plan, step + 1, STEPS, matches, passage).readings())
            places = {(each.step, each.sequence) for each in found}
            assert {place for place, row in held.items() if text in row} <= places
            for each in found:
                assert begins(text, held[each.step, each.sequence]), (text, each)
            assert_once_per_epoch(found)
            compared += len(found)
        state, step = json.loads(json.dumps(taken[-1].data_state())), step + STEPS
    return compared


def begins(text: str, row: str) -> bool:
    # A row ends, and so does the part of a segment that a lane reads.
    return text[:6] in row or any(row.endswith(text[:n]) for n in range(1, len(text)))


def assert_once_per_epoch(found: list[Reading]) -> None:
    # Rows of token files are cut elsewhere in each epoch, and what crosses their ends is not found.
    keys = [(each.epoch, each.source, each.stored.place, each.stored.numbers) for each in found]
    assert len(set(keys)) == len(keys)


def test_documents_are_found_in_every_epoch(parquet_corpus: Path) -> None:
    dataset = opened(parquet_corpus)
    assert check(dataset, ["<37>", "<0>", "<119>", "<5>xxxxx"]) > 8


def test_texts_of_a_mixture_are_found_in_all_its_sources(mixture: data.Dataset) -> None:
    assert check(mixture, ["<37>", "[42]", "ABCDEFG", "no such text"]) > 8


def test_other_tokens_are_found_where_the_plan_has_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{text} {number}" for number, text in enumerate(WORDS)]
    write(tmp_path / "a.parquet", list(texts))
    monkeypatch.setattr(counting, "ENCODE_BYTES", 400)
    dataset = opened(tmp_path, small_bpe(tmp_path, texts))
    assert dataset.stats.error
    assert check(dataset, [texts[7], texts[33]], (16,)) > 2


def test_text_that_is_held_out_is_told_apart(parquet_corpus: Path) -> None:
    dataset = opened(parquet_corpus, test_fraction=0.2)
    (source,) = dataset.sources
    trained = held_out = 0
    for number in range(0, 120, 9):
        passage = Passage(f"<{number}>", dataset.tokenizer.encode(f"<{number}>"))
        matches = find_matches(source, T, passage, lambda *_: None)
        assert bool(len(matches.training)) != bool(matches.held_out)
        trained, held_out = trained + len(matches.training), held_out + len(matches.held_out)
        for part in matches.held_out:
            assert part.place.startswith(str(parquet_corpus))
            assert int(part.place[part.place.index("part_") + 5]) == number // 40
    assert trained > held_out > 0


def test_each_row_of_a_batch_tells_its_documents(mixture: data.Dataset) -> None:
    with data.TrainLoader(mixture, spec(micro_batches=2), DataLoaderConfig()) as batches:
        for batch in itertools.islice(batches, 20):
            rows = [row for rows in batch.micro_batches for row in rows]
            origins = batch.origins()
            assert [each.number for each in origins] == list(range(16))
            for row, origin in zip(rows, origins, strict=True):
                edges = [part.tokens for part in origin.parts]
                assert [e.start for e in edges] == [0, *(e.stop for e in edges[:-1])]
                assert edges[-1].stop == T + 1
                for part in origin.parts:
                    tokens = row[part.tokens.start : part.tokens.stop].tolist()
                    if origin.source == "books":
                        assert tokens == [1 + n % 255 for n in part.numbers]
                    elif origin.source == "code" and len(tokens) > 4:
                        number = str(part.numbers.start)
                        assert bytes(tokens).rstrip(b"\0").decode() in f"[{number}]"
