"""Descriptions of token files: written and read back; a pickle cannot do anything."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import DataError, WriteError
from data.sources.tokens.meta import (
    load_plain_pickle,
    meta_path,
    read_meta,
    read_meta_file,
    read_metas,
    write_json,
    write_meta,
)
from data.tokenizers.bpe import train_bpe
from data.tokenizers.simple import ByteTokenizer, char_tokenizer


class Call:
    """Pickles to a call, as an attacker would write it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def nanogpt(text: str) -> dict[str, Any]:
    """What nanoGPT's data/shakespeare_char/prepare.py writes."""
    characters = sorted(set(text))
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), char_tokenizer("\u00e9a\ud800"), train_bpe("b", ["ab"], 300)]
)
def test_what_is_written_is_read(tmp_path: Path, tokenizer: Any) -> None:
    write_meta(tmp_path / "meta.json", tokenizer, np.dtype(np.uint16), {"train": 7, "val": 1})
    meta = read_meta(tmp_path / "train.bin")
    assert meta is not None
    assert meta.tokenizer is not None
    assert meta.tokenizer.fingerprint == tokenizer.fingerprint
    assert (meta.vocab_size, meta.dtype) == (tokenizer.vocab_size, "uint16")
    assert meta.path == str(tmp_path / "meta.json")
    values = json.loads((tmp_path / "meta.json").read_text())
    assert values["tokens"] == {"train": 7, "val": 1}
    assert values["separator"] == tokenizer.separator
    assert os.listdir(tmp_path) == ["meta.json"]


def test_descriptions_of_earlier_versions_are_read_and_tell_sizes(tmp_path: Path) -> None:
    values = GOOD | {"tokens": {"train": 7, "val": 1}, "separator": 0}
    (tmp_path / "meta.json").write_text(json.dumps(values))
    meta, again = read_metas([str(tmp_path / "train.bin"), str(tmp_path / "val.bin")])
    assert meta is not None
    assert meta is again
    record = meta.record(str(tmp_path / "train.bin"))
    assert record is not None
    assert (record.size, record.crcs, meta.dtype) == (7, None, "uint8")
    assert meta.record("other.bin") is None
    assert meta.record("train.npy") is None
    (tmp_path / "meta.json").write_text(json.dumps(GOOD))
    assert read_meta_file(tmp_path / "meta.json").record("train.bin") is None


def test_the_file_of_its_own_name_comes_first_and_pickle_last(tmp_path: Path) -> None:
    tokens = tmp_path / "train.ids"
    assert read_meta(tokens) is None
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt("abc")))
    found = []
    for path in (tmp_path / "meta.pkl", tmp_path / "meta.json", meta_path(tokens)):
        if path.suffix == ".json":
            write_meta(path, ByteTokenizer(), np.dtype(np.uint8), {})
        meta = read_meta(tokens)
        assert meta is not None
        found.append(Path(meta.path).name)
    assert found == ["meta.pkl", "meta.json", "train.meta.json"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_characters_of_nanogpt_are_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(nanogpt("hello w\u00f6rld\n"), protocol))
    meta = read_meta_file(path)
    assert meta.tokenizer is not None
    assert meta.tokenizer.fingerprint == char_tokenizer("hello w\u00f6rld\n").fingerprint
    assert (meta.vocab_size, meta.dtype) == (meta.tokenizer.vocab_size, "uint16")


def test_a_pickle_may_give_a_size_alone(tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"vocab_size": 100_277}))
    meta = read_meta_file(path)
    assert (meta.tokenizer, meta.vocab_size) == (None, 100_277)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_values_are_read(value: object) -> None:
    assert load_plain_pickle(pickle.dumps(value)) == value


@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda d: b"\x80\x04" + d + b"."))
@settings(max_examples=100)
def test_no_bytes_do_more_than_fail(data: bytes) -> None:
    try:
        load_plain_pickle(data)
    except ValueError as error:
        assert str(error)


def test_a_hostile_pickle_is_refused_and_nothing_executed(tmp_path: Path) -> None:
    path, made = tmp_path / "meta.pkl", tmp_path / "made"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(nanogpt("ab") | {"x": Call(made)}, protocol))
        with pytest.raises(DataError, match=r"meta\.pkl: .* asks for (posix|os|nt)\.mkdir, and on"):
            read_meta(tmp_path / "train.bin")
    path.write_bytes(pickle.dumps(np.zeros(2)))
    with pytest.raises(DataError, match=r"asks for numpy\."):
        read_meta(tmp_path / "train.bin")
    assert not made.exists()


def test_a_few_bytes_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".")
    with pytest.raises(DataError, match="place 4294967295 in the memo of 9 bytes"):
        read_meta_file(path)
    path.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.")
    with pytest.raises(DataError, match="not a description of tokens"):
        read_meta_file(path)
    path.write_bytes(bytes((4 << 20) + 1))
    with pytest.raises(DataError, match="larger than 4 MiB"):
        read_meta_file(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "a list, not a dictionary"),
        ({"vocab_size": "7"}, "vocab_size is not a whole number"),
        ({"vocab_size": 3, "itos": {0: "a", 1: "b"}}, "itos does not number 3 characters"),
        ({"itos": {0: "a", 2: "b"}}, "itos does not number 2 characters from 0"),
        ({"itos": {0: "word"}}, "single characters"),
        ({"itos": ["a", "a"]}, "twice"),
        ({"itos": 7}, "single characters"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, values: object, message: str) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(values))
    with pytest.raises(DataError, match=rf"meta\.pkl: not a description of tokens: .*{message}"):
        read_meta_file(path)


GOOD = {"format": 1, "tokenizer": {"kind": "bytes"}, "vocab_size": 256, "dtype": "uint8"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "a list, not a dictionary"),
        ("[" * 100_000, "recursion|not a description"),
        ({}, "no 'format'"),
        (GOOD | {"format": 3}, "format 3, and 2 is known here"),
        (GOOD | {"format": 2, "digest": "0"}, "its digest does not match"),
        (GOOD | {"dtype": "float32"}, "dtype 'float32'"),
        (GOOD | {"vocab_size": 7}, "vocab_size 7, the tokenizer's is not"),
        (GOOD | {"tokenizer": {"kind": "x"}}, "kind 'x'"),
        (GOOD | {"tokenizer": None}, "not the description of a tokenizer"),
    ],
)
def test_broken_descriptions_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=rf"meta\.json: .*({message}).* python prepare\.py"):
        read_meta(tmp_path / "val.bin")


def test_what_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"gone/meta\.json: cannot be written: No such file"):
        write_json(tmp_path / "gone" / "meta.json", {})
    with pytest.raises(DataError, match=r"meta\.json: cannot be read: No such file"):
        read_meta_file(tmp_path / "meta.json")
