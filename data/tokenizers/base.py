"""What every tokenizer is: the interface, and what those share whose ids stand for bytes.

The one idea: most vocabularies are a table of bytes, one entry per id. Text, streaming and counting
follow from the table alone, whatever finds the ids in a text.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

REPLACEMENT = "\ufffd"

Ids = npt.NDArray[Any]


class StreamDecoder(Protocol):
    """Turns ids into text as they arrive."""

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """The text that is complete so far; `final` also gives out what is cut off."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back; ids without a token are read as U+FFFD, separators as nothing."""

    name: str
    """'bytes', 'char', 'gpt2', 'ids', or what the config named."""
    vocab_size: int
    separator: int | None
    """Ends every document and cannot come from text; None: documents are not separated."""
    fingerprint: str
    """The same for the same mapping."""

    def encode(self, text: str) -> Ids:
        """The ids of a text, without a separator; lone surrogates are read as '?'."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> Ids:
        """The ids of each text, each followed by the separator."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids."""
        ...

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that keeps an unfinished character until the next call."""
        ...

    def count_bytes(self, ids: Ids) -> int | None:
        """The UTF-8 bytes that the ids stand for, separators none; None where unknown."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `tokenizer_from_dict` makes it again."""
        ...


def storage_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integers that hold the ids."""
    return np.dtype(
        np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )


def row_dtype(vocab_size: int) -> np.dtype[Any]:
    """The integers of batches: torch indexes with uint8 and int32, not with uint16."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.int32)


class Documents:
    """What tokenizers share: documents one after the other."""

    vocab_size: int
    separator: int | None

    def encode(self, text: str) -> Ids:
        raise AssertionError("each tokenizer has its own")

    def encode_documents(self, texts: Sequence[str]) -> Ids:
        """The ids of each text, each followed by the separator."""
        dtype = storage_dtype(self.vocab_size)
        end = np.array([] if self.separator is None else [self.separator], dtype=dtype)
        parts = [part for text in texts for part in (self.encode(text), end)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


class ByteTable(Documents):
    """A tokenizer whose every id stands for certain bytes, whatever is around it."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._lengths = np.array([len(data) for data in table], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, separators vanish."""
        return self.stream_decoder().decode(ids, final=True)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that keeps the bytes of an unfinished character until the next call."""
        return ByteStream(self._table)

    def count_bytes(self, ids: Ids) -> int | None:
        """The bytes that the ids stand for; ids without a token count none."""
        ids = np.asarray(ids)
        return int(self._lengths[ids[ids < len(self._table)]].sum())


class ByteStream:
    """Joins the bytes of ids and decodes what is complete of them."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """The text that is complete so far; `final` also gives out what is cut off."""
        table, unknown = self._table, REPLACEMENT.encode()
        data = b"".join(table[i] if i < len(table) else unknown for i in ids)
        return self._decoder.decode(data, final)


class NumberStream:
    """Writes ids as numbers."""

    def __init__(self) -> None:
        self._blank = ""

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """The numbers; nothing is ever incomplete."""
        del final
        text = " ".join(str(i) for i in ids)
        text, self._blank = (self._blank + text if text else ""), " " if text else self._blank
        return text


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as they are, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def byte_level(token: str) -> bytes:
    """The bytes of a token; one that is not written so (an added one) is its own text."""
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8", "replace")


def without_surrogates(text: str) -> str:
    """The text with '?' for halves of surrogate pairs, which are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def digest(data: bytes) -> str:
    """A short hash, for fingerprints."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
