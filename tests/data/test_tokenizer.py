"""Tokenizers: text survives, streaming is decoding, and a tokenizer is its mapping."""

from __future__ import annotations

import builtins
import importlib.util
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from config import DataError, TokenizerConfig
from data.tokenizers.base import byte_level
from data.tokenizers.bpe import (
    END_OF_TEXT,
    FILE_NAME,
    ByteTokenizer,
    IdTokenizer,
    JsonTokenizer,
    Tokenizer,
    build_tokenizer,
    char_tokenizer,
    rank_tokenizer,
    row_dtype,
    storage_dtype,
    tokenizer_from_dict,
    train_bpe,
)

TEXT = (
    "The dragon's egg hatches when it is warm.\n\nIts 12 wings grow: na\u00efve \U0001f409!  " * 20
)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ANY = st.text(st.characters())  # lone surrogates and NUL too


@cache
def bpe() -> JsonTokenizer:
    return train_bpe("own.json", [TEXT], 300)


@cache
def ranks() -> Tokenizer:
    """A small vocabulary for the class that GPT-2's goes through."""
    words = [bytes([byte]) for byte in range(256)]
    for pair in (b" t", b"he", b" the", b"in", b"\n\n", "\u00ef".encode(), b" w"):
        words.append(pair)
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={END_OF_TEXT: len(words)},
    )
    return rank_tokenizer(encoding)


@cache
def unigram_json() -> str:
    """Pieces with leading blanks and a normalizer, as T5's."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    inner.enable_truncation(4)
    inner.enable_padding(length=4)
    return inner.to_str()


@cache
def unigram() -> JsonTokenizer:
    return JsonTokenizer("t5-like", unigram_json())


@cache
def fallback() -> JsonTokenizer:
    """Words, and bytes for what is none, as Llama's first."""
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {c: 300 + n for n, c in enumerate("abcdehinorstw.")}  # with a gap below
    inner = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<unk>", "</s>"])
    return JsonTokenizer("llama-like", inner.to_str())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "char": lambda: char_tokenizer(TEXT),
    "gpt2": ranks,
    "bpe": bpe,
    "unigram": unigram,
    "fallback": fallback,
    "ids": lambda: IdTokenizer(1000),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> Tokenizer:
    return KINDS[kind]()


def stream(tokenizer: Tokenizer, pieces: list[list[int]]) -> str:
    decoder = tokenizer.stream_decoder()
    return "".join(decoder.decode(piece) for piece in pieces) + decoder.decode([], final=True)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "bpe"])
@given(PLAIN)
@settings(max_examples=60, deadline=None)
def test_text_survives(kind: str, text: str) -> None:
    tokenizer = make(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.sampled_from(sorted(set(TEXT)))))
def test_text_of_known_characters_survives(text: str) -> None:
    tokenizer = char_tokenizer(TEXT)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "bpe", "unigram", "fallback"])
@given(ANY, st.lists(st.integers(1, 5), max_size=30))
@settings(max_examples=60, deadline=None)
def test_streaming_in_any_pieces_gives_the_same_text(
    kind: str, text: str, lengths: list[int]
) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode(text).tolist()
    pieces = []
    rest = ids
    for length in lengths:
        pieces.append(rest[:length])
        rest = rest[length:]
    assert stream(tokenizer, [*pieces, rest]) == tokenizer.decode(ids)
    assert stream(tokenizer, [[i] for i in ids]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "bpe", "fallback"])
def test_only_whole_characters_are_given_out(kind: str) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode("a\U0001f409b").tolist()
    decoder = tokenizer.stream_decoder()
    parts = [decoder.decode([token]) for token in ids]
    assert len(ids) > 3
    assert [part for part in parts if part] == ["a", "\U0001f409", "b"]
    assert stream(tokenizer, [ids[:-2]]).startswith("a\ufffd")


@every_kind
@given(st.lists(st.integers(0, 1200), max_size=20))
@settings(max_examples=40, deadline=None)
def test_any_ids_can_be_decoded(kind: str, ids: list[int]) -> None:
    """A model with more rows than tokens, or an untrained one, draws them."""
    tokenizer = make(kind)
    assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(stream(tokenizer, [[i] for i in ids]), str)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "bpe"])
@given(st.lists(ANY, max_size=4))
@settings(max_examples=40, deadline=None)
def test_bytes_are_counted_without_separators(kind: str, texts: list[str]) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode_documents(texts)
    assert tokenizer.count_bytes(ids) == sum(len(t.encode("utf-8", "replace")) for t in texts)


def test_bytes_of_characters_and_pieces_are_those_of_their_text() -> None:
    tokenizer = char_tokenizer(TEXT)
    assert tokenizer.count_bytes(tokenizer.encode(TEXT)) == len(TEXT.encode())
    documents = unigram().encode_documents(["the egg", "its wings"])
    assert unigram().count_bytes(documents) == len("the egg" + "its wings")
    assert IdTokenizer(9).count_bytes(np.array([1, 2])) is None


@every_kind
def test_documents_end_with_the_separator(kind: str) -> None:
    tokenizer = make(kind)
    texts = ["1 2", "", "1"]
    end = [] if tokenizer.separator is None else [tokenizer.separator]
    expected = [i for text in texts for i in (*tokenizer.encode(text).tolist(), *end)]
    ids = tokenizer.encode_documents(texts)
    assert ids.tolist() == expected
    assert ids.dtype == tokenizer.encode("1").dtype == storage_dtype(tokenizer.vocab_size)
    assert len(tokenizer.encode_documents([])) == 0


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "unigram", "fallback"])
def test_the_separator_cannot_come_from_text(kind: str) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode(f"a{END_OF_TEXT}b</s>")
    assert tokenizer.separator not in ids.tolist()
    assert tokenizer.separator is not None
    assert tokenizer.decode([tokenizer.separator, *tokenizer.encode("wing"), 1000]).count("wing")


def test_nul_becomes_a_space_where_it_separates() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\0b").tolist() == [97, 32, 98]
    assert tokenizer.decode([97, tokenizer.separator or 0, 98]) == "ab"
    assert bpe().decode(bpe().encode("a\0b")) == "a\0b"


def test_what_cannot_be_decoded_is_replaced() -> None:
    assert ByteTokenizer().decode([97, 0xC3, 98, 300]) == "a\ufffdb\ufffd"
    assert char_tokenizer("ab").decode([0, 7, 1]) == "a\ufffdb"
    for kind in ("bytes", "gpt2", "bpe"):
        assert make(kind).decode(make(kind).encode("x\ud800y")) == "x?y"


def test_characters_are_numbered_as_nanogpt_does() -> None:
    tokenizer = char_tokenizer("hello\nzoo")
    stoi = {character: i for i, character in enumerate(sorted(set("hello\nzoo")))}
    assert tokenizer.encode("hello\nzoo").tolist() == [stoi[c] for c in "hello\nzoo"]
    assert tokenizer.vocab_size == len(stoi)
    assert tokenizer.separator is None


def test_an_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(DataError, match=r"'\\xe9' \(number 4, in line 2\) is not among the 3 of"):
        char_tokenizer("ab\n").encode("a\nb\u00e9")


def test_numbers_stand_for_tokens_without_text() -> None:
    tokenizer = IdTokenizer(100)
    assert tokenizer.encode(" 7 42\n").tolist() == [7, 42]
    assert tokenizer.decode([7, 42]) == stream(tokenizer, [[7], [], [42]]) == "7 42"
    for word in ("x", "100", "-1", "\u0663"):
        with pytest.raises(DataError, match="is not a token: .* from 0 to 99"):
            tokenizer.encode(f"1 {word}")


@every_kind
def test_plain_values_hold_the_tokenizer(kind: str) -> None:
    tokenizer = make(kind)
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert (other.name, other.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
        assert other.separator == tokenizer.separator
        assert other.encode("1 2").tolist() == tokenizer.encode("1 2").tolist()
        assert other.decode(range(300, 310)) == tokenizer.decode(range(300, 310))


def test_fingerprints_tell_mappings_apart_and_not_names() -> None:
    own = bpe()
    values = json.loads(own.to_dict()["json"])
    renamed = JsonTokenizer("other", json.dumps(values | {"truncation": None}, indent=1))
    values["model"]["merges"].pop()
    fewer = JsonTokenizer("own.json", json.dumps(values))
    assert renamed.fingerprint == own.fingerprint != fewer.fingerprint
    prints = {make(kind).fingerprint for kind in KINDS}
    assert len(prints) == len(KINDS)
    assert char_tokenizer("ab").fingerprint != char_tokenizer("abc").fingerprint
    assert ByteTokenizer().fingerprint == "bytes-1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "not the description"),
        ({"kind": "char"}, "not the description"),
        ({"kind": "char", "characters": 7}, "not the description"),
        ({"kind": "char", "characters": "aa"}, "one is there twice"),
        ({"kind": "gpt2", "name": "gpt2", "tokens": "!"}, "not the description"),
        ({"kind": "json", "name": "x", "json": "{"}, "x: not a tokenizer.json"),
        ({"kind": "words"}, "of kind 'words', which is not known here"),
    ],
)
def test_other_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenizer_from_dict(values)


def test_a_file_or_its_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(bpe().to_dict()["json"], encoding="utf-8")
    for name in (str(path), str(tmp_path)):
        tokenizer = build_tokenizer(TokenizerConfig(name=name))
        assert (tokenizer.name, tokenizer.fingerprint) == (name, bpe().fingerprint)
    assert build_tokenizer(TokenizerConfig(name="bytes")).name == "bytes"


def test_truncation_and_padding_of_a_file_are_not_applied() -> None:
    assert len(unigram().encode("the egg hatches when it is warm")) > 7
    assert unigram().separator == 1


def test_ids_beyond_a_gap_are_counted() -> None:
    assert fallback().vocab_size == 314


@given(st.binary(max_size=20))
def test_byte_level_characters_are_bytes(data: bytes) -> None:
    inner = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = data.decode("latin-1")
    written = "".join(piece for piece, _ in pieces.pre_tokenize_str(text))
    assert byte_level(written) == text.encode()
    assert inner.get_vocab_size() == 0


def test_an_added_token_stands_for_its_text() -> None:
    inner = tokenizers.Tokenizer.from_str(bpe().to_dict()["json"])
    inner.add_tokens(["\u65e5\u672c 1"])
    tokenizer = JsonTokenizer("added", inner.to_str())
    ids = tokenizer.encode("x\u65e5\u672c 1y")
    assert ids.tolist().count(tokenizer.vocab_size - 1) == 1
    assert tokenizer.decode(ids) == inner.decode(ids.tolist()) == "x\u65e5\u672c 1y"
    assert tokenizer.count_bytes(ids) == len("x\u65e5\u672c 1y".encode())


def test_the_same_text_trains_the_same_vocabulary() -> None:
    again = train_bpe("other", (TEXT[i : i + 100] for i in range(0, len(TEXT), 100)), 300)
    assert train_bpe("own.json", [TEXT], 300).fingerprint == bpe().fingerprint
    assert again.vocab_size == 300
    assert bpe().separator == 0
    assert train_bpe("few", ["ab"], 300).vocab_size == 257


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/tokenizer.json", "no such file .*no/such/tokenizer.json"),
        ("a b", "no such file"),
        ("char", "stands for the tokenizer of a token file. Make one: python prepare.py"),
        ("auto", "python prepare.py SOURCE data/NAME"),
    ],
)
def test_what_is_no_tokenizer_is_said(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_tokenizer(TokenizerConfig(name=name))


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    for content in (b"{}", b"no json", b"\xff", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.json: (not a|cannot be read)"):
            build_tokenizer(TokenizerConfig(name=str(path)))
    path.unlink()
    with pytest.raises(DataError, match="neither|no such file"):
        build_tokenizer(TokenizerConfig(name=str(tmp_path)))


def test_a_hub_name_is_taken_from_the_cache_and_else_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    path = tmp_path / "cached.json"
    path.write_text(bpe().to_dict()["json"], encoding="utf-8")

    def offline(*names: str) -> str:
        raise OSError("we cannot find the requested files.\nmore")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *names: str(path))
    tokenizer = build_tokenizer(TokenizerConfig(name="some-one/t5"))
    assert (tokenizer.name, tokenizer.fingerprint) == ("some-one/t5", bpe().fingerprint)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *names: None)
    with pytest.raises(DataError, match=r"neither a file here nor .*requested files\. Set it to a"):
        build_tokenizer(TokenizerConfig(name="t5-base"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *names: str(path))
    assert build_tokenizer(TokenizerConfig(name="t5-base")).vocab_size == 300


def test_gpt2_without_its_vocabulary_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("a long text")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(
        DataError, match=r"\(ConnectionError\)\. Copy .* TIKTOKEN_CACHE_DIR, or set"
    ):
        build_tokenizer(TokenizerConfig(name="gpt2"))


@pytest.mark.parametrize(
    ("package", "name"), [("tiktoken", "gpt2"), ("tokenizers", "x.json"), ("huggingface_hub", "t5")]
)
def test_a_missing_package_is_named_with_its_command(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: Any, **more: Any) -> Any:
        if wanted == package:
            raise ImportError(wanted)
        return real(wanted, *rest, **more)

    (tmp_path / "x.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=f"needs {package}: pip install {package}"):
        build_tokenizer(TokenizerConfig(name=name))


def test_gpt2_itself() -> None:
    assert importlib.util.find_spec("tiktoken")
    try:
        tokenizer = build_tokenizer(TokenizerConfig(name="gpt2"))
    except DataError:
        pytest.skip("GPT-2's vocabulary is not on this machine and cannot be downloaded")
    assert (tokenizer.vocab_size, tokenizer.separator) == (50257, 50256)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer_from_dict(tokenizer.to_dict()).fingerprint == tokenizer.fingerprint


def test_integers_are_as_wide_as_the_ids_need() -> None:
    sizes = (1, 256, 257, 65536, 65537)
    names = [storage_dtype(size).name for size in sizes]
    assert names == ["uint8", "uint8", "uint16", "uint16", "uint32"]
    assert [row_dtype(size).name for size in sizes] == ["uint8", "uint8", "int32", "int32", "int32"]
