"""Text to token ids and back.

Bytes are their own ids: 256 of them, no training, no file, no unknown token. Byte 0 does not occur
in text (one that does is read as a space) and therefore ends every document.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from config import TokenizerConfig

SEPARATOR, SPACE = 0, 32


class ByteTokenizer:
    """UTF-8 bytes as tokens."""

    vocab_size = 256
    separator = SEPARATOR
    fingerprint = "bytes-1"

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """The bytes of the text; NUL becomes a space and lone surrogates become '?'."""
        data = text.encode("utf-8", "replace").replace(bytes([SEPARATOR]), bytes([SPACE]))
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, separators vanish."""
        return self.stream_decoder().decode(ids, final=True)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that keeps the bytes of an unfinished character until the next call."""
        return StreamDecoder(self.separator)


class StreamDecoder:
    """Turns ids into text as they arrive."""

    def __init__(self, separator: int) -> None:
        self._separator = separator
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """The text that is complete so far; `final` also gives out what is cut off."""
        data = bytes(i for i in ids if i != self._separator)
        return self._decoder.decode(data, final)


TOKENIZERS = {"bytes": ByteTokenizer}


def build_tokenizer(config: TokenizerConfig) -> ByteTokenizer:
    """The tokenizer of the config."""
    return TOKENIZERS[config.name]()
