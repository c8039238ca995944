"""Token files: splits, types, meta files, checked tokens, little memory."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from config import DataError, DataLoaderConfig, DatasetConfig, TokenizerConfig
from data.loading import load_plan
from data.sources.dataset import segments_of_split
from data.sources.tokens import dataset as token_dataset
from data.sources.tokens import file as token_file
from data.sources.tokens.checksums import BLOCK_BYTES, file_checksums
from data.sources.tokens.dataset import TokenSegments, TokenSpan, count_rows
from data.sources.tokens.file import TokenFile
from data.sources.tokens.meta import FileRecord, meta_path, write_meta
from data.tokenizers.simple import ByteTokenizer, IdTokenizer, char_tokenizer
from tests.data.batches import T, read, spec
from tests.data.parquet_folder import write
from tests.data.token_files import VOCABULARY, ids, put, tokens_of
from tests.data.token_files import open_tokens as opened
from tests.engine.forks import in_child

STEPS = 40


def refused(message: str, train: Path, *arguments: Any, **options: Any) -> None:
    """Token files cannot be opened, and the error says why."""
    with pytest.raises(DataError, match=message):
        opened(train, *arguments, **options)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**63))
def test_the_rows_of_a_span_fit_and_every_token_is_in_some_epoch(
    count: int, block_size: int, seed: int
) -> None:
    file = TokenFile("", 0, 0, np.dtype(np.uint16), 0, count, "")
    spans = (TokenSpan(0, 7, count, False), TokenSpan(0, 0, 0, True))
    segments = TokenSegments((file,), spans, block_size, 9)
    total = len(segments.shuffle_keys)
    assert total == count_rows(count, block_size)
    assert (total > 0) == (count > block_size)
    seen, left_out = np.zeros(count, dtype=np.bool_), []
    for epoch in range(0 if not total else 40 * block_size):
        places = [segments.span_of(segment, seed, epoch, True)[1:] for segment in (0, total - 1)]
        (first, length), (last, _) = places
        assert length == block_size + 1
        assert 7 <= first <= last == first + (total - 1) * block_size
        assert last + length <= 7 + count
        seen[first - 7 : last + length - 7] = True
        left_out.append(count - (last + length - first))
    assert seen.all() == (total > 0)
    assert max(left_out, default=0) <= 2 * block_size - 2


# Rows and splits.


def test_the_end_of_each_file_is_held_out(tmp_path: Path) -> None:
    for count, fraction, kept in ((4321, 0.1, 3888), (4321, 0.05, 4104), (100, 0.25, 75)):
        for part in range(2):
            put(tmp_path / f"{part}.bin", ids(count, 10_000 * part), "uint32")
        dataset = opened(tmp_path, test_fraction=fraction, token_dtype="uint32")
        stats = dataset.stats
        assert (stats.train_tokens, stats.test_tokens) == (2 * kept, 2 * (count - kept))
        assert (stats.error, stats.rows) == (0, 0)
        ends = [(s.file, s.first, s.first + s.length) for s in dataset.spans]
        assert ends == [(0, 0, kept), (1, 0, kept), (0, kept, count), (1, kept, count)]
        for split in ("train", "test"):
            rows = data.evaluation_rows(dataset, split, T, 10_000)
            assert bool((rows.diff() % VOCABULARY == 1).all())
        assert len(segments_of_split(dataset.segments(T), "train")) == 2 * count_rows(kept, T)
    whole = opened(tmp_path / "0.bin", token_dtype="uint32")
    assert (len(tokens_of(whole)), whole.stats.test_tokens) == (100, 0)
    assert not len(segments_of_split(whole.segments(T), "test"))


def test_a_second_file_is_held_out_whole(token_corpus: Path, tmp_path: Path) -> None:
    val = put(tmp_path / "val.npy", ids(333), "int64")
    dataset = opened(token_corpus, val, test_fraction=0.5)
    assert tokens_of(dataset, "test") == ids(333).tolist()
    assert tokens_of(dataset) == ids(4321).tolist()
    assert dataset.lines() == [
        "Loading data with memory mapping...",
        "Train data size: 4,321 tokens",
        "Validation data size: 333 tokens",
        "Checked: all 4,654 tokens (ids below 5,000)",
        f"No checksums for {token_corpus}/a.bin and 3 other files: damage that leaves valid token "
        "ids would go unnoticed (prepare.py writes checksums)",
        f"Token type of {token_corpus}/a.bin: uint16, detected (dataset.token_dtype states it)",
    ]


def test_a_folder_is_its_files_in_bytewise_order(tmp_path: Path) -> None:
    for name, first in (("b.npy", 200), ("B.npy", 0), ("a.npy", 100), ("_x.npy", 900)):
        put(tmp_path / name, ids(100, first), "uint32")
    (tmp_path / "notes.txt").touch()
    dataset = opened(tmp_path)
    assert tokens_of(dataset) == list(range(300))
    assert (dataset.stats.files, dataset.stats.train_tokens) == (3, 300)
    assert dataset.epoch_tokens(32) == 3 * 2 * 32  # whole rows


def test_a_prepared_folder_may_stand_where_parquet_files_do(tmp_path: Path) -> None:
    put(tmp_path / "train.ids", ids(900))
    put(tmp_path / "val.ids", ids(300))
    config = DatasetConfig(parquet_dir=str(tmp_path), token_dtype="uint16")
    dataset = data.open_dataset(config, TokenizerConfig(name="auto"), VOCABULARY)
    assert (dataset.stats.train_tokens, dataset.stats.test_tokens) == (900, 300)


# Types.


def test_npy_files_of_any_integers_are_read(tmp_path: Path) -> None:
    for dtype in ("uint8", "uint16", "uint32", "int16", "int32", "int64"):
        path = put(tmp_path / "a.npy", ids(700) % 120, dtype)
        assert tokens_of(opened(path)) == (ids(700) % 120).tolist()


often_zero = np.where(ids(900) % 2, 0, ids(900))  # every second token
DETECTED: list[tuple[str, str, npt.ArrayLike, tuple[int, ...]]] = [
    # written as, read as, tokens, vocabularies
    ("uint16", "uint16", np.arange(600) * 7919 % 50257, (50257,)),
    ("uint16", "uint16", np.arange(601) * 7919 % 256, (256,)),
    ("uint16", "uint16", np.arange(600) * 7919 % 65536, (65536,)),
    ("uint32", "uint32", np.arange(601) * 7919 % 50257, (50257,)),
    ("uint32", "uint32", np.arange(600) * 7919 % 256, (256,)),
    ("uint32", "uint32", np.arange(601) * 7919 % 65537, (65537,)),
    ("uint32", "uint32", np.arange(600) % 4, (65537,)),
    # what numpy writes by default, and what could be taken for it
    ("int64", "int64", ids(900), (VOCABULARY, 100_000)),
    ("int32", "uint32", ids(900), (VOCABULARY, 100_000)),
    ("int64", "int64", often_zero, (VOCABULARY, 100_000)),
    ("uint32", "uint32", np.append(often_zero[:-1], 7), (VOCABULARY, 100_000)),
    ("uint16", "uint16", np.append(often_zero[:-1], 7), (VOCABULARY,)),
    ("int64", "int64", ids(20), (VOCABULARY, 100_000)),
    ("uint32", "uint32", [5, 0, 7, 0], (VOCABULARY, 100_000)),  # too few to tell
    ("uint32", "uint32", np.zeros(900), (VOCABULARY, 100_000)),
    # an odd number of bytes; one token among zeros, in one of the samples
    ("uint8", "uint8", ids(701) % 250, (256,)),
    ("uint16", "uint16", np.arange(400_000) == 170_001, (VOCABULARY,)),
]


def test_types_are_detected(tmp_path: Path) -> None:
    for number, (written, expected, tokens, vocabularies) in enumerate(DETECTED):
        path = put(tmp_path / f"{number}.bin", tokens, written)
        for vocab_size in vocabularies:
            dataset = opened(path, vocab_size=vocab_size)
            assert f"Token type of {path}: {expected}, detected" in dataset.lines()[-1], number
            assert tokens_of(dataset) == np.asarray(tokens).astype(int).tolist(), number


def test_a_type_that_is_stated_or_cannot_be_is_taken_or_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "a.bin", ids(900), "int64")
    assert opened(path, token_dtype="uint32").stats.tokens == 1800
    dataset = opened(path, token_dtype="int64")
    assert (dataset.stats.tokens, "Token type" in "".join(dataset.lines())) == (900, False)
    put(path, -np.arange(900), "int64")
    refused(r"token -1 .* is below 0", path, token_dtype="int64")
    put(path, np.append(ids(900), -7), "int64")
    refused(r"token -7 .* is below 0.* if its tokens are not int64", path)
    put(path, ids(701) % 250, "uint8")
    refused(r"a\.bin: 701 bytes, an odd number.*50,257 tokens", path, vocab_size=50257)
    put(tmp_path / "b.bin", ids(700) % 250, "uint8")
    assert opened(tmp_path, vocab_size=256).stats.tokens == 1401
    for name, dtype in (("a", "uint16"), ("b", "int64")):
        put(tmp_path / f"{name}.bin", ids(900), dtype)
    refused(r"a\.bin looks like uint16, .*b\.bin like int64", tmp_path)
    put(path, [1] * 301)
    message = r"a\.bin: 602 bytes are not a multiple of 4 \(uint32\)"
    refused(message, path, token_dtype="uint32")
    refused(message, path, vocab_size=100_000)
    path = put(tmp_path / "a.npy", [1] * 301)
    refused(r"holds uint16 by its header, .*token_dtype is uint32", path, token_dtype="uint32")


def test_a_pickle_that_says_no_type_does_not_hide_a_wider_one(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3}))
    for dtype in ("uint16", "int64"):
        path = put(tmp_path / "train.bin", ids(600) % 3, dtype)
        dataset = opened(path, vocab_size=None)
        assert tokens_of(dataset) == (ids(600) % 3).tolist()
        assert any("int64, detected" in line for line in dataset.lines()) == (dtype == "int64")


# Tokenizers and meta files.


def characters_meta(folder: Path, characters: str = "abc", dtype: str = "uint16") -> None:
    write_meta(folder / "meta.json", char_tokenizer(characters), np.dtype(dtype), {})


def test_the_meta_file_tells_tokenizer_and_type(tmp_path: Path) -> None:
    train = put(tmp_path / "train.bin", ids(600) % 3, "uint8")
    characters_meta(tmp_path, dtype="uint8")
    for name in ("auto", "char"):
        dataset = opened(train, vocab_size=None, tokenizer=name)
        assert dataset.tokenizer.decode([0, 1, 2]) == "abc"
        assert (dataset.vocab_size, dataset.stats.tokens) == (3, 600)
        assert dataset.lines()[5:] == [
            f"Tokens described by {tmp_path / 'meta.json'}: char, 3 in the vocabulary, uint8"
        ]


def test_the_tokenizer_is_that_of_the_meta_file_of_the_config_or_of_the_model(
    tmp_path: Path,
) -> None:
    train = put(tmp_path / "a" / "train.bin", ids(600) % 3)
    dataset = opened(train, vocab_size=VOCABULARY)
    assert (dataset.tokenizer.name, dataset.vocab_size) == ("ids", VOCABULARY)
    refused(r"train\.bin: no meta file .* state model\.vocab_size", train, vocab_size=None)
    assert opened(train, tokenizer="bytes").vocab_size == 256
    refused(r"train\.bin: .*char, but no meta file .*prepare\.py", train, tokenizer="char")
    characters_meta(train.parent)
    message = r"bytes \(bytes-1\) by tokenizer\.name=bytes, char \(char-\w+\) by .*meta\.json"
    refused(message, train, tokenizer="bytes")
    val = put(tmp_path / "b" / "val.bin", ids(600) % 3)
    assert opened(train, val).tokenizer.name == "char"
    characters_meta(val.parent, "abcd")
    refused(r"tokens of two tokenizers: char .*a/meta\.json, char ", train, val)
    write_meta(train.parent / "meta.json", ByteTokenizer(), np.dtype(np.uint16), {})
    refused(r"char, but the tokens are of bytes by .*meta\.json", train, tokenizer="char")


def test_a_name_is_a_folder_of_data_and_without_meta_file_of_gpt2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = DatasetConfig(name="songs")
    with pytest.raises(DataError, match=r"dataset\.name=songs 'data/songs/train\.bin': not found"):
        data.open_dataset(config, TokenizerConfig(name="auto"))
    put(Path("data/songs/train.bin"), ids(600) % 3)
    put(Path("data/songs/val.bin"), ids(300) % 3)
    dataset = data.open_dataset(config, TokenizerConfig(name="auto"))
    assert dataset.vocab_size == 50257
    assert "No meta file in data/songs: GPT-2's 50,257 tokens" in "".join(dataset.lines())
    characters_meta(Path("data/songs"))
    dataset = data.open_dataset(config, TokenizerConfig(name="auto"))
    assert dataset.vocab_size == 3
    assert (dataset.stats.train_tokens, dataset.stats.test_tokens) == (600, 300)


# Errors: what, where, found value, remedy.


@pytest.mark.parametrize("large", [False, True])
def test_a_token_out_of_range_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:  # only some of it is checked at the start: the first and the last tokens
        monkeypatch.setattr(token_file, "CHECKED_AT_START_BYTES", 0)
        monkeypatch.setattr(token_file, "SAMPLE_BYTES", 16)
        monkeypatch.setattr(token_file, "SAMPLES", 2)
    values = ids(600)
    values[321] = 50257
    for path in (put(tmp_path / "a.bin", values, "int32"), put(tmp_path / "a.npy", values)):
        size, start = (2, 128) if path.suffix == ".npy" else (4, 0)
        message = (
            rf"{path}: token 50257 at offset {start + 321 * size} \(token number 321\) is not "
            r"below the vocabulary's 50257\. Set tokenizer\.name or model\.vocab_size .*"
            r"if its tokens are not u?int\d\d, set dataset\.token_dtype"
        )
        if not large:
            refused(message, path, vocab_size=50257)
            continue
        dataset = opened(path, vocab_size=50257)
        first = dataset.lines()[3]
        assert re.fullmatch(
            r"Checked: \d+ of 600 tokens \(ids below 50,257\); the rest as .*", first
        )
        with pytest.raises(DataError, match=message):
            tokens_of(dataset)
        held_out = opened(put(tmp_path / "t.bin", ids(600)), path, 50257)
        with pytest.raises(DataError, match=message):
            data.evaluation_rows(held_out, "test", T, 600)
        with pytest.raises(DataError, match=message):
            read(dataset, STEPS, spec())
    path = put(tmp_path / "b.npy", [-1] * 300, "int16")
    refused(r"token -1 at offset \d+ \(token number 0\) is below 0", path)


# Checksums.


def protected(folder: Path, name: str = "train.bin", count: int = 3 * BLOCK_BYTES // 2) -> Path:
    """Token files of three blocks, and of one, with what prepare.py writes beside them."""
    paths = {"train": folder / name, "val": folder / f"val{Path(name).suffix}"}
    put(paths["train"], ids(count))
    put(paths["val"], ids(300))
    records = {
        role: FileRecord((path.suffix,), path.stat().st_size, file_checksums(path))
        for role, path in paths.items()
    }
    tokens, meta = {"train": count, "val": 300}, folder / "meta.json"
    write_meta(meta, IdTokenizer(VOCABULARY), np.dtype(np.uint16), tokens, records)
    return paths["train"]


def whole_text(train: Path) -> tuple[list[int], list[int], str]:
    """All that a run could take from these files."""
    dataset = opened(train, train.with_stem("val"), vocab_size=None)
    fingerprint = dataset.tokenizer.fingerprint
    return tokens_of(dataset), tokens_of(dataset, "test"), fingerprint


@pytest.mark.parametrize("ending", [".bin", ".npy"])
@pytest.mark.parametrize("large", [False, True])
def test_no_damage_goes_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, large: bool
) -> None:
    if large:
        monkeypatch.setattr(token_file, "CHECKED_AT_START_BYTES", 0)
    train = protected(tmp_path, f"train{ending}", BLOCK_BYTES + 100)
    whole = whole_text(train)
    assert "(ids below 5,000 and checksums)" in opened(train, vocab_size=None).lines()[3]
    draw = random.Random(f"{ending} {large}")
    for path in (train, train.with_stem("val"), tmp_path / "meta.json"):
        content = path.read_bytes()
        for number in range(50 if path == train else 25):
            damaged = bytearray(content)
            at = draw.randrange(len(content))
            if number % 5 == 0:
                del damaged[at:]
            else:
                damaged[at] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                found = whole_text(train)
            except DataError as error:
                assert re.search(rf"(train|val){ending}|meta\.json", str(error)), error
            else:
                assert found == whole, (path.name, number, at)
        path.write_bytes(content)
    assert whole_text(train) == whole


def test_a_damaged_block_is_named_when_it_is_read_and_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "CHECKED_AT_START_BYTES", 0)
    monkeypatch.setattr(token_file, "SAMPLES", 2)
    monkeypatch.setattr(token_file, "SAMPLE_BYTES", 16)
    path = protected(tmp_path)
    dataset, compared = opened(path, vocab_size=None), list[int]()
    real = zlib.crc32

    def noted(part: bytes) -> int:
        compared.append(len(part))
        return real(part)

    monkeypatch.setattr(zlib, "crc32", noted)
    for _ in range(2):
        read(dataset, 4 * STEPS, spec())
    assert compared == [BLOCK_BYTES]  # the first and the last were compared at the start
    content = bytearray(path.read_bytes())
    content[BLOCK_BYTES + 7] ^= 1
    path.write_bytes(content)
    dataset, middle = opened(path, vocab_size=None), f"{BLOCK_BYTES} to {2 * BLOCK_BYTES - 1}"
    message = rf"train\.bin: damaged: block 1 \(bytes {middle}\) .* in .*meta\.json\. Restore"
    with pytest.raises(DataError, match=message):
        read(dataset, 4 * STEPS, spec())


def test_a_file_of_another_size_than_stated_is_refused(tmp_path: Path) -> None:
    path = protected(tmp_path)
    os.truncate(path, 2 * BLOCK_BYTES)
    message = rf"train\.bin: {2 * BLOCK_BYTES} bytes, and .*meta\.json states {3 * BLOCK_BYTES}"
    refused(message, path, vocab_size=None)
    values = {"format": 1, "tokenizer": {"kind": "bytes"}, "vocab_size": 256, "dtype": "uint16"}
    (tmp_path / "meta.json").write_text(json.dumps(values | {"tokens": {"train": 20_000}}))
    refused(r"32768 bytes, and .*meta\.json states 40000: .* cut", path, vocab_size=None)


def test_every_file_of_a_folder_has_its_own_description(tmp_path: Path) -> None:
    for name, dtype in (("a", "uint8"), ("b", "uint16")):
        path = put(tmp_path / f"{name}.ids", ids(300) % 200, dtype)
        record = FileRecord((".ids",), path.stat().st_size, file_checksums(path))
        write_meta(
            meta_path(path), ByteTokenizer(), np.dtype(dtype), {"train": 300}, {"train": record}
        )
    dataset = opened(tmp_path, vocab_size=None)
    assert tokens_of(dataset) == (ids(300) % 200).tolist() * 2
    assert not [line for line in dataset.lines() if "No checksums" in line]
    write_meta(meta_path(path), char_tokenizer("ab"), np.dtype(dtype), {})
    refused(r"tokens of two tokenizers: bytes .*b\.meta\.json", tmp_path, vocab_size=None)


def save(path: Path, array: npt.NDArray[Any], **options: Any) -> Path:
    np.save(path, array, **options)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1])
    return path


def zipped(path: Path) -> Path:
    np.savez(path.with_suffix(".npz"), a=np.zeros(9, int))
    return path.with_suffix(".npz").rename(path)


NO_TOKENS: list[tuple[Callable[[Path], Path], str]] = [
    (lambda d: save(d / "a.npy", np.zeros((3, 4), int)), r"int64 of shape \(3, 4\); tokens"),
    (lambda d: save(d / "a.npy", np.zeros(9, float)), r"a\.npy: float64 of shape \(9,\)"),
    (lambda d: save(d / "a.npy", np.zeros(9, ">u4")), r"a\.npy: big-endian uint32"),
    (lambda d: save(d / "a.npy", np.array(3)), r"a\.npy: int64 of shape \(\)"),
    (lambda d: save(d / "a.npy", np.zeros(0, int)), r"a\.npy: (holds no tokens|not a read)"),
    (
        lambda d: save(d / "a.npy", np.array([{}], object), allow_pickle=True),
        r"a\.npy: not a readable \.npy file",
    ),
    (lambda d: put(d / "a.bin", [1] * 9).rename(d / "a.npy"), "not a readable .npy file"),
    (lambda d: cut(save(d / "a.npy", np.zeros(9, int))), r"a\.npy: not a readable \.npy file"),
    (lambda d: zipped(d / "a.npy"), r"a\.npy: not a readable \.npy file \(the magic string"),
    (lambda d: put(d / "a.bin", []), r"a\.bin: empty \(interrupted copy\?\)"),
    (lambda d: put(d / "a.bin", [1] * 5, "uint8"), "5 bytes, an odd number"),
    (lambda d: put(d / "a.txt", [1]), r"'.*a\.txt': not a token file \(\.bin, \.ids, \.npy\)"),
    (lambda d: d / "none.bin", r"train_data_path '.*none\.bin': not found \(working directory"),
    (lambda d: d, r"no token files \(found nothing\)"),
    (lambda d: put(d / "x.json", []).parent, r"no token files \(found 1 \*\.json\)"),
    (
        lambda d: put(put(d / "x.bin", [1]).parent / "y.ids", [1]).parent,
        r"several kinds of token files \(found 1 \*\.\w+, 1 \*\.\w+\)",
    ),
]


def test_a_file_that_holds_no_tokens_is_named(tmp_path: Path) -> None:
    for number, (make, message) in enumerate(NO_TOKENS):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused(message, make(folder))
    path = tmp_path / "a.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(r"a\.bin is a Git LFS pointer.*git lfs pull", path)
    path.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    refused(r"a\.bin: a download error page", path)


def test_a_split_that_cannot_be_is_explained(tmp_path: Path) -> None:
    train = put(tmp_path / "train.bin", ids(90))
    refused(r"train\.bin: 90 tokens are too few to hold out .* 0\.98", train, test_fraction=0.98)
    small = put(tmp_path / "small.bin", ids(2))
    refused(r"small\.bin: 2 tokens are too few to hold out", small, test_fraction=0.1)
    (tmp_path / "link.bin").symlink_to(train)
    refused(r"train\.bin: both trained on and held out", train, tmp_path / "link.bin")


def test_a_file_that_vanishes_or_changes_stops_the_run(tmp_path: Path) -> None:
    path = put(tmp_path / "a.bin", ids(600))
    dataset = opened(path)
    put(path, ids(601))
    with pytest.raises(DataError, match=r"a\.bin: changed during the run \(1200 bytes .*1202\)"):
        read(dataset, 5, spec())
    path.unlink()
    with pytest.raises(DataError, match=r"a\.bin: there at the start of the run, now No such"):
        read(dataset, 5, spec())


# Identity.


def test_the_fingerprint_names_the_first_difference(tmp_path: Path) -> None:
    train = put(tmp_path / "train.bin", ids(600) % 200)
    saved = json.loads(json.dumps(opened(train).summary()))
    opened(train).check_unchanged(saved)
    others: list[tuple[dict[str, Any], str]] = [
        ({"test_fraction": 0.2}, r"test_fraction was 0\.0, is 0\.2"),
        ({"token_dtype": "uint8"}, r"train\.bin was read as uint16, is read as uint8"),
        ({"val": put(tmp_path / "val.bin", ids(99))}, "val had 0 files, has 1"),
        ({"tokenizer": "bytes", "token_dtype": "uint16"}, "tokenizer was ids-1, is bytes-1"),
    ]
    for options, message in others:
        with pytest.raises(DataError, match=message):
            opened(train, **options).check_unchanged(saved)
    put(train, ids(600, 1))
    with pytest.raises(DataError, match=r"train\.bin has the size it had, but other tokens"):
        opened(train).check_unchanged(saved)
    put(train, ids(601))
    with pytest.raises(DataError, match=r"train\.bin had 1200 bytes, has 1202"):
        opened(train).check_unchanged(saved)


def test_a_run_does_not_go_on_with_another_kind_of_data(token_corpus: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["text"] * 9)
    config = DatasetConfig(parquet_dir=str(tmp_path), test_fraction=0.0)
    folder, files = data.open_dataset(config, TokenizerConfig()), opened(token_corpus)
    message = f"it was parquet files of {tmp_path}, is token files of {token_corpus}"
    with pytest.raises(DataError, match=re.escape(message)):
        files.check_unchanged(folder.summary())
    with pytest.raises(DataError, match=f"it was token files of {token_corpus}, is parquet files"):
        folder.check_unchanged(files.summary())


# The maps.


def open_maps() -> int:
    """How many token files this process has mapped."""
    return Path("/proc/self/maps").read_text().count(".bin\n")


def test_files_are_mapped_once_and_given_back(
    token_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = opened(token_corpus).segments(T).open_reader()
    opens: list[str] = []
    real = token_file.TokenFile.map

    def noted(file: token_file.TokenFile) -> mmap.mmap:
        opens.append(file.path)
        return real(file)

    monkeypatch.setattr(token_file.TokenFile, "map", noted)
    rows = [reader.tokens(segment, 1, 0, True) for segment in range(266)]
    assert (len(opens), open_maps()) == (3, 3)
    reader.close()
    assert open_maps() == 0
    assert rows[0][0] == rows[0][1] - 1
    monkeypatch.setattr(token_file, "MAPPED_FILES", 2)
    again = [reader.tokens(segment, 1, 0, True) for segment in (0, 155, 160, 0, 156, 265, 1)]
    assert (len(opens), open_maps()) == (7, 2)
    assert all(np.array_equal(again[i], rows[j]) for i, j in ((1, 155), (3, 0), (5, 265), (6, 1)))
    reader.close()


@pytest.mark.parametrize("change", ["grown", "touched", "gone"])
def test_a_change_in_the_middle_of_a_run_is_noticed_soon(tmp_path: Path, change: str) -> None:
    path = put(tmp_path / "a.bin", ids(6000))
    reader = opened(path).segments(T).open_reader()
    for segment in range(100):
        reader.tokens(segment, 1, 0, True)
    if change == "grown":
        with path.open("ab") as file:
            file.write(b"\0\0")
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"a\.bin: (changed during|there at the start of) the run"):
        for segment in range(100, 100 + token_file.RECHECK_READS + 1):
            reader.tokens(segment, 1, 0, True)


@pytest.mark.slow
def test_files_of_gigabytes_take_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_plan, "CHUNK_BYTES", 1 << 18)  # as a run
    path = tmp_path / "train.bin"
    path.touch()
    os.truncate(path, 4 << 30)  # a hole: takes no disk

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024

    def work() -> str:
        # A child, as what other tests have left behind would be counted.
        with data.TrainLoader(
            opened(put(tmp_path / "small.bin", ids(5000))), spec(), DataLoaderConfig()
        ) as batches:
            next(batches)
        before = peak()
        dataset = opened(path, token_dtype="uint16", test_fraction=0.1)
        most = 0
        with data.TrainLoader(dataset, spec(lanes=16), DataLoaderConfig()) as batches:
            for _ in range(300):
                next(batches)
                most = max(most, peak() - before)
        data.evaluation_rows(dataset, "test", 512, 400)
        segments = dataset.segments(T)
        reader = segments.open_reader()
        for segment in np.random.default_rng(0).integers(0, len(segments.sizes), 1500).tolist():
            reader.tokens(segment, 0, 0, True)
            if segment % 10 == 0:
                most = max(most, peak() - before)
        return f"{dataset.stats.tokens} {most}"

    monkeypatch.setattr(token_dataset, "MAX_SEGMENTS", 1 << 16)  # not to measure the plan
    status, text = in_child(work)
    assert status == 0, text
    count, most = map(int, text.split())
    assert count == 2 << 30
    assert most < 50
