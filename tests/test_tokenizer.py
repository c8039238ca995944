"""Bytes are tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from config import TokenizerConfig
from data.tokenizer import build_tokenizer

tokenizer = build_tokenizer(TokenizerConfig())


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_text_survives(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_separator_cannot_come_from_text() -> None:
    assert tokenizer.encode("a\0b").tolist() == [97, 32, 98]
    assert tokenizer.decode([97, tokenizer.separator, 98]) == "ab"


def test_broken_bytes_are_replaced() -> None:
    assert tokenizer.decode([97, 0xC3, 98]) == "a\ufffdb"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_streaming_gives_the_same_text(text: str) -> None:
    decoder = tokenizer.stream_decoder()
    parts = [decoder.decode([token]) for token in tokenizer.encode(text).tolist()]
    assert "".join(parts) + decoder.decode([], final=True) == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text
