"""Tokenizers without a vocabulary file: UTF-8 bytes, characters, and bare ids.

Bytes are their own ids: 256 of them and no unknown token. Byte 0 does not occur in text (one that
does is read as a space), so it ends every document.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from config import DataError
from data.tokenizers.base import REPLACEMENT, Ids, StreamDecoder, Tokenizer, digest, storage_dtype

SEPARATOR, SPACE = 0, 32


class ByteTable:
    """Decoding for vocabularies in which every id stands for fixed bytes, whatever is around it."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._lengths = np.array([len(data) for data in table], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.stream_decoder().decode(ids, final=True)

    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder that keeps the bytes of an unfinished character."""
        return _ByteStreamDecoder(self._table)

    def count_bytes(self, ids: Ids) -> int | None:
        """Returns the bytes of the ids; ids without a token count as none."""
        # A padded embedding has rows, and so ids, beyond the vocabulary.
        ids = np.asarray(ids)
        return int(self._lengths[ids[ids < len(self._table)]].sum())


class _ByteStreamDecoder:
    """Joins the bytes of ids and decodes the characters that are complete."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """Returns the text that is complete so far; `final` also flushes a cut-off character."""
        table, unknown = self._table, REPLACEMENT.encode()
        data = b"".join(table[i] if i < len(table) else unknown for i in ids)
        return self._decoder.decode(data, final)


class ByteTokenizer(ByteTable, Tokenizer):
    """UTF-8 bytes as tokens."""

    name = "bytes"
    vocab_size = 256
    separator: int | None = SEPARATOR
    fingerprint = "bytes-1"

    def __init__(self) -> None:
        super().__init__([b"", *(bytes([byte]) for byte in range(1, 256))])

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """Returns the bytes of the text; NUL becomes a space and lone surrogates become '?'."""
        data = text.encode("utf-8", "replace").replace(bytes([SEPARATOR]), bytes([SPACE]))
        return np.frombuffer(data, dtype=np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Returns the kind alone: the mapping is fixed."""
        return {"kind": "bytes"}


class CharTokenizer(ByteTable, Tokenizer):
    """Characters as tokens: the id of each is its index in `characters`. There is no separator.

    A character outside of them raises DataError: skipping it would train on another text.
    """

    name = "char"
    separator: int | None = None

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise DataError("tokenizer 'char' has no characters, or one of them is there twice")
        self.characters = characters
        self.vocab_size = len(characters)
        self.fingerprint = f"char-{digest(characters.encode('utf-8', 'surrogatepass'))}"
        super().__init__([character.encode("utf-8", "replace") for character in characters])
        points = _code_points(characters)
        self._ids_by_point = np.argsort(points).astype(storage_dtype(self.vocab_size))
        self._sorted_points = points[self._ids_by_point]

    def encode(self, text: str) -> Ids:
        """Returns the ids of the characters."""
        points = _code_points(text)
        # A binary search of all characters at once: a dictionary look-up in Python for each of
        # them would take some ten times as long.
        found = np.searchsorted(self._sorted_points, points)
        found = np.minimum(found, self.vocab_size - 1)
        wrong = np.flatnonzero(self._sorted_points[found] != points)
        if len(wrong):
            at = int(wrong[0])
            line = text.count("\n", 0, at) + 1
            known = ascii("".join(sorted(self.characters)))[1:-1]
            raise DataError(
                f"the character {ascii(text[at])} (number {at + 1:,}, in line {line:,}) is "
                f"not among the {self.vocab_size} of the tokenizer 'char': "
                f"{known if len(known) <= 100 else known[:100] + '...'}"
            )
        return self._ids_by_point[found]

    def to_dict(self) -> dict[str, Any]:
        """Returns the characters in the order of their ids."""
        return {"kind": "char", "characters": self.characters}


def char_tokenizer(characters: Iterable[str]) -> CharTokenizer:
    """Returns the tokenizer of a text's characters, in code point order as nanoGPT numbers them."""
    return CharTokenizer("".join(sorted(set(characters))))


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class IdTokenizer(Tokenizer):
    """Tokens whose text is unknown, written as numbers."""

    name = "ids"
    separator: int | None = None
    fingerprint = "ids-1"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> Ids:
        """Returns the numbers in a text, separated by blanks; raises DataError for other text."""
        words = text.split()
        for word in words:
            if not re.fullmatch(r"[0-9]{1,10}", word) or int(word) >= self.vocab_size:
                raise DataError(
                    f"{ascii(word[:40])} is not a token: the text of these tokens is unknown; give "
                    f"numbers from 0 to {self.vocab_size - 1}, separated by blanks"
                )
        return np.array([int(word) for word in words], dtype=storage_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the numbers, separated by blanks."""
        return " ".join(str(i) for i in ids)

    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder that writes a blank before each number but the first."""
        return _IdStreamDecoder()

    def count_bytes(self, ids: Ids) -> int | None:
        """Returns None: the text is unknown."""
        del ids
        return None

    def to_dict(self) -> dict[str, Any]:
        """Returns the size of the vocabulary."""
        return {"kind": "ids", "vocab_size": self.vocab_size}


class _IdStreamDecoder:
    """Writes ids as numbers."""

    def __init__(self) -> None:
        self._blank = ""

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """Returns the numbers; nothing is ever incomplete."""
        del final
        parts = []
        for i in ids:
            parts.append(f"{self._blank}{i}")
            self._blank = " "
        return "".join(parts)
