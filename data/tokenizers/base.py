"""The interface of all tokenizers, and the integer types of token ids."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

REPLACEMENT = "\ufffd"

Ids = npt.NDArray[Any]


class StreamDecoder(Protocol):
    """Turns ids into text as they arrive."""

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """Returns the text that is complete so far; `final` also flushes a cut-off character."""
        ...


class Tokenizer(ABC):
    """Text to ids and back. Ids without a token decode to U+FFFD, separators to nothing."""

    name: str
    """'bytes', 'char', 'gpt2', 'ids', or the file or Hub name that the config gives."""
    vocab_size: int
    separator: int | None
    """Ends every document and never comes from text; None: documents are not separated."""
    fingerprint: str
    """Equal for equal mappings, whatever the name and wherever they were loaded from."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Returns the ids of a text, without a separator; lone surrogates are read as '?'."""

    def encode_documents(self, texts: Sequence[str]) -> Ids:
        """Returns the ids of each text, each followed by the separator."""
        dtype = storage_dtype(self.vocab_size)
        end = np.array([] if self.separator is None else [self.separator], dtype=dtype)
        parts = [part for text in texts for part in (self.encode(text), end)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids."""

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder that keeps an unfinished character until the next call."""

    @abstractmethod
    def count_bytes(self, ids: Ids) -> int | None:
        """Returns the UTF-8 bytes of the ids' text without separators; None: unknown."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns plain values from which `tokenizer_from_dict` builds the same tokenizer."""


def storage_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the smallest unsigned integers that hold the ids."""
    return np.dtype(
        np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )


def row_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the integers of batches: torch indexes with uint8 and int32, not with uint16."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.int32)


def digest(data: bytes) -> str:
    """Returns a short hash for fingerprints."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
