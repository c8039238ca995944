"""Tokenizers: text survives, streaming is decoding, and a tokenizer is its mapping."""

from __future__ import annotations

import builtins
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
from data.tokenizers.base import Tokenizer, row_dtype, storage_dtype
from data.tokenizers.bpe import (
    END_OF_TEXT,
    FILE_NAME,
    Gpt2Tokenizer,
    JsonTokenizer,
    train_bpe,
)
from data.tokenizers.build import build_tokenizer, tokenizer_from_dict
from data.tokenizers.simple import ByteTokenizer, IdTokenizer, char_tokenizer

TEXT = (
    "The dragon's egg hatches when it is warm.\n\nIts 12 wings grow: na\u00efve \U0001f409!  " * 20
)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ANY = st.text(st.characters())  # lone surrogates and NUL too


@cache
def bpe() -> JsonTokenizer:
    return train_bpe("own.json", [TEXT], 300)


@cache
def small_gpt2() -> Tokenizer:
    """A small vocabulary for the class that GPT-2's goes through."""
    words = [bytes([byte]) for byte in range(256)]
    words += [b" t", b"he", b" the", b"in", b"\n\n", "\u00ef".encode(), b" w"]
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={END_OF_TEXT: len(words)},
    )
    return Gpt2Tokenizer.from_tiktoken(encoding)


@cache
def unigram() -> JsonTokenizer:
    """Pieces with leading blanks, a normalizer, truncation and padding, as in T5's file."""
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
    return JsonTokenizer("t5-like", inner.to_str())


@cache
def byte_fallback() -> JsonTokenizer:
    """Words, and bytes for other text, as in Llama's first vocabulary."""
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
    "gpt2": small_gpt2,
    "bpe": bpe,
    "unigram": unigram,
    "fallback": byte_fallback,
    "ids": lambda: IdTokenizer(1000),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def stream(tokenizer: Tokenizer, pieces: list[list[int]]) -> str:
    decoder = tokenizer.stream_decoder()
    return "".join(decoder.decode(piece) for piece in pieces) + decoder.decode([], final=True)


@given(PLAIN, st.text(st.sampled_from(sorted(set(TEXT)))), st.lists(ANY, max_size=4))
@settings(max_examples=25, deadline=None)
def test_text_survives_and_its_bytes_are_counted(text: str, known: str, texts: list[str]) -> None:
    for kind in ("bytes", "gpt2", "bpe"):
        tokenizer = KINDS[kind]()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = tokenizer.encode_documents(texts)
        assert tokenizer.count_bytes(ids) == sum(len(t.encode("utf-8", "replace")) for t in texts)
    characters = char_tokenizer(TEXT)
    assert characters.decode(characters.encode(known)) == known
    assert characters.count_bytes(characters.encode(known)) == len(known.encode())


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "bpe", "unigram", "fallback"])
@given(ANY, st.lists(st.integers(1, 5), max_size=30))
@settings(max_examples=40, deadline=None)
def test_streaming_in_any_pieces_gives_the_same_text(
    kind: str, text: str, lengths: list[int]
) -> None:
    tokenizer = KINDS[kind]()
    rest = ids = tokenizer.encode(text).tolist()
    pieces = []
    for length in lengths:
        pieces.append(rest[:length])
        rest = rest[length:]
    assert stream(tokenizer, [*pieces, rest]) == tokenizer.decode(ids)
    assert stream(tokenizer, [[i] for i in ids]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "bpe", "fallback"])
def test_a_stream_gives_whole_characters_and_a_cut_one_at_the_end(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode("a\U0001f409b").tolist()
    decoder = tokenizer.stream_decoder()
    parts = [decoder.decode([token]) for token in ids]
    assert len(ids) > 3
    assert [part for part in parts if part] == ["a", "\U0001f409", "b"]
    assert stream(tokenizer, [ids[:-2]]).startswith("a\ufffd")


@every_kind
@given(st.lists(st.integers(0, 1200), max_size=20))
@settings(max_examples=15, deadline=None)
def test_any_ids_can_be_decoded(kind: str, ids: list[int]) -> None:
    """A model with more rows than tokens, or an untrained one, draws them."""
    tokenizer = KINDS[kind]()
    assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(stream(tokenizer, [[i] for i in ids]), str)


@every_kind
def test_documents_end_with_a_separator_that_cannot_come_from_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    texts = ["1 2", "", "1"]
    end = [] if tokenizer.separator is None else [tokenizer.separator]
    expected = [i for text in texts for i in (*tokenizer.encode(text).tolist(), *end)]
    ids = tokenizer.encode_documents(texts)
    assert ids.tolist() == expected
    assert ids.dtype == tokenizer.encode("1").dtype == storage_dtype(tokenizer.vocab_size)
    assert len(tokenizer.encode_documents([])) == 0
    if kind not in ("char", "ids"):
        assert tokenizer.separator is not None
        assert tokenizer.separator not in tokenizer.encode(f"a{END_OF_TEXT}b</s>").tolist()
        wing = [tokenizer.separator, *tokenizer.encode("wing")]
        assert tokenizer.decode(wing).count("wing") == 1
        assert END_OF_TEXT not in tokenizer.decode(wing)


def test_bytes_of_pieces_are_those_of_their_text_and_of_numbers_unknown() -> None:
    documents = unigram().encode_documents(["the egg", "its wings"])
    assert unigram().count_bytes(documents) == len("the egg" + "its wings")
    assert IdTokenizer(9).count_bytes(np.array([1, 2])) is None


def test_nul_and_what_is_no_text_are_replaced() -> None:
    assert ByteTokenizer().encode("a\0b").tolist() == [97, 32, 98]
    assert ByteTokenizer().decode([97, 0, 98]) == "ab"
    assert bpe().decode(bpe().encode("a\0b")) == "a\0b"
    assert ByteTokenizer().decode([97, 0xC3, 98, 300]) == "a\ufffdb\ufffd"
    assert char_tokenizer("ab").decode([0, 7, 1]) == "a\ufffdb"
    for kind in ("bytes", "gpt2", "bpe"):
        assert KINDS[kind]().decode(KINDS[kind]().encode("x\ud800y")) == "x?y"


def test_characters_are_numbered_as_nanogpt_does_and_an_unknown_one_is_named() -> None:
    tokenizer = char_tokenizer("hello\nzoo")
    stoi = {character: i for i, character in enumerate(sorted(set("hello\nzoo")))}
    assert tokenizer.encode("hello\nzoo").tolist() == [stoi[c] for c in "hello\nzoo"]
    assert tokenizer.vocab_size == len(stoi)
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
def test_plain_values_and_pickles_hold_the_tokenizer(kind: str) -> None:
    tokenizer = KINDS[kind]()
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        for attribute in ("fingerprint", "name", "vocab_size", "separator"):
            assert getattr(other, attribute) == getattr(tokenizer, attribute)
        assert other.encode("1 2").tolist() == tokenizer.encode("1 2").tolist()
        assert other.decode(range(300, 310)) == tokenizer.decode(range(300, 310))


def test_fingerprints_tell_mappings_apart_and_not_names() -> None:
    own = bpe()
    values = json.loads(own.to_dict()["json"])
    renamed = JsonTokenizer("other", json.dumps(values | {"truncation": None}, indent=1))
    values["model"]["merges"].pop()
    fewer = JsonTokenizer("own.json", json.dumps(values))
    assert renamed.fingerprint == own.fingerprint != fewer.fingerprint
    assert len({make().fingerprint for make in KINDS.values()}) == len(KINDS)
    assert char_tokenizer("ab").fingerprint != char_tokenizer("abc").fingerprint


def test_fingerprints_are_those_of_earlier_checkpoints() -> None:
    assert ByteTokenizer().fingerprint == "bytes-1"
    assert IdTokenizer(7).fingerprint == "ids-1"
    assert char_tokenizer("ab").fingerprint == "char-0e52b5f187de1088"
    assert Gpt2Tokenizer("gpt2", [b"a", b"b"]).fingerprint == "gpt2-0ff3c227afedcace"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "not the description"),
        ({"kind": "char"}, "not the description"),
        ({"kind": "char", "characters": 7}, "not the description"),
        ({"kind": "char", "characters": "aa"}, "is there twice"),
        ({"kind": "gpt2", "name": "gpt2", "tokens": "!"}, "not the description"),
        ({"kind": "json", "name": "x", "json": "{"}, "x: not a tokenizer.json"),
        ({"kind": "words"}, "of the unknown kind 'words'"),
    ],
)
def test_other_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenizer_from_dict(values)


def test_a_file_or_its_folder_is_named_and_its_truncation_not_applied(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(bpe().to_dict()["json"], encoding="utf-8")
    for name in (str(path), str(tmp_path)):
        tokenizer = build_tokenizer(TokenizerConfig(name=name))
        assert (tokenizer.name, tokenizer.fingerprint) == (name, bpe().fingerprint)
    assert build_tokenizer(TokenizerConfig(name="bytes")).name == "bytes"
    assert len(unigram().encode("the egg hatches when it is warm")) > 7
    assert unigram().separator == 1
    assert byte_fallback().vocab_size == 314  # with ids beyond a gap


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


def test_a_name_or_file_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    for name, message in {
        "no/such/tokenizer.json": "no such file .*no/such/tokenizer.json",
        "a b": "no such file",
        "char": "stands for the tokenizer of a token file. Make one: python prepare.py",
        "auto": "python prepare.py SOURCE data/NAME",
        str(tmp_path): "no such file",
    }.items():
        with pytest.raises(DataError, match=message):
            build_tokenizer(TokenizerConfig(name=name))
    path = tmp_path / FILE_NAME
    for content in (b"{}", b"no json", b"\xff", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.json: (not a|cannot be read)"):
            build_tokenizer(TokenizerConfig(name=str(path)))


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
    with pytest.raises(DataError, match=r"no such file here, .*requested files\. Set it to a"):
        build_tokenizer(TokenizerConfig(name="t5-base"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *names: str(path))
    assert build_tokenizer(TokenizerConfig(name="t5-base")).vocab_size == 300


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


def test_gpt2_without_its_vocabulary_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("a long text")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(
        DataError, match=r"\(ConnectionError\)\. Copy .* TIKTOKEN_CACHE_DIR to it, or set"
    ):
        build_tokenizer(TokenizerConfig(name="gpt2"))


def test_gpt2_itself() -> None:
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
