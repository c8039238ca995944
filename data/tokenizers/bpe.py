"""Tokenizers with a trained vocabulary: GPT-2's, and any `tokenizer.json` of Hugging Face.

Both keep the vocabulary itself, so token files and checkpoints can be decoded on a machine that
has no vocabulary file. GPT-2's goes through tiktoken, which encodes ten times as fast as the
package tokenizers does.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from config import DataError
from data.tokenizers.base import REPLACEMENT, Ids, StreamDecoder, Tokenizer, digest, storage_dtype
from data.tokenizers.simple import ByteTable

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
# Names of the token that ends a document in common vocabularies; the first that exists is taken.
_SEPARATORS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "[SEP]", "<eos>")
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Gpt2Tokenizer(ByteTable, Tokenizer):
    """GPT-2's byte pairs, encoded by tiktoken; the id after all others ends documents.

    `tokens` are the bytes of each id, in the order in which they are merged.
    """

    def __init__(self, name: str, tokens: Sequence[bytes]) -> None:
        self.name, self._tokens = name, tokens
        self.separator = len(tokens)
        self.vocab_size = len(tokens) + 1
        # With lengths: without them "ab", "c" and "a", "bc" would be the same mapping.
        mapping = b"".join(len(token).to_bytes(4, "little") + token for token in tokens)
        self.fingerprint = f"gpt2-{digest(mapping)}"
        super().__init__([*tokens, b""])

    # Built at the first use: decoding a checkpoint's tokens must not need tiktoken.
    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return _import_tiktoken().Encoding(
            self.name,
            pat_str=_GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            special_tokens={END_OF_TEXT: self.separator},
        )

    def encode(self, text: str) -> Ids:
        """Returns the ids; a separator that is spelled out in the text is encoded as text."""
        ids = self._encoding.encode_ordinary(_without_surrogates(text))
        return np.array(ids, dtype=storage_dtype(self.vocab_size))

    def __reduce__(self) -> tuple[Any, ...]:
        return Gpt2Tokenizer, (self.name, self._tokens)

    def to_dict(self) -> dict[str, Any]:
        """Returns the tokens as words of base64."""
        words = " ".join(base64.b64encode(token).decode() for token in self._tokens)
        return {"kind": "gpt2", "name": self.name, "tokens": words}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Gpt2Tokenizer:
        """Returns the tokenizer of `to_dict`."""
        tokens = [base64.b64decode(word, validate=True) for word in values["tokens"].split()]
        return Gpt2Tokenizer(values["name"], tokens)

    @staticmethod
    def from_tiktoken(encoding: tiktoken.Encoding) -> Gpt2Tokenizer:
        """Returns the tokenizer of a tiktoken encoding that splits words as GPT-2 does."""
        tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
        return Gpt2Tokenizer(encoding.name, tokens)


def load_gpt2() -> Gpt2Tokenizer:
    """Returns GPT-2's tokenizer from tiktoken's cache or its download; raises DataError."""
    package = _import_tiktoken()
    try:
        return Gpt2Tokenizer.from_tiktoken(package.get_encoding("gpt2"))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise DataError(
            "tokenizer.name=gpt2: its vocabulary is not on this machine and cannot be downloaded "
            f"({type(error).__name__}). Copy tiktoken's cache folder from another machine and set "
            "TIKTOKEN_CACHE_DIR to it, or set tokenizer.name to a folder with GPT-2's "
            f"{FILE_NAME}"
        ) from None


def _import_tiktoken() -> Any:
    try:
        import tiktoken
    except ImportError:
        raise DataError("tokenizer.name=gpt2 needs tiktoken: pip install tiktoken") from None
    return tiktoken


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, encoded by the package tokenizers.

    Raises DataError if `text` is not the content of such a file.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self._text = name, text
        self._inner = inner = _parse(name, text)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        # Ids may have gaps, and the embedding needs a row for the largest one.
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        found = [inner.token_to_id(token) for token in _SEPARATORS]
        self.separator = next((i for i in found if i is not None), None)
        added = inner.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        if self.separator is not None:
            self._special_ids.add(self.separator)
        # Truncation and padding are never applied here, so they do not belong to the mapping.
        values = {k: v for k, v in json.loads(text).items() if k not in ("truncation", "padding")}
        self.fingerprint = f"json-{digest(json.dumps(values, sort_keys=True).encode())}"
        self._byte_table: ByteTable | None = None
        if (values.get("decoder") or {}).get("type") == "ByteLevel":
            # Ids in the gaps of a vocabulary keep U+FFFD: a model may still draw them.
            table = [REPLACEMENT.encode()] * self.vocab_size
            for token, i in vocabulary.items():
                table[i] = b"" if i in self._special_ids else _token_bytes(token)
            self._byte_table = ByteTable(table)

    def encode(self, text: str) -> Ids:
        """Returns the ids without special tokens; one spelled out in the text is encoded as text.

        A vocabulary such as T5's has no other ids for the text of its separator: there that text
        is left out.
        """
        # One text at a time: the package's batch calls start threads, and threads do not survive
        # the fork of a data worker.
        found = self._inner.encode(_without_surrogates(text), add_special_tokens=False).ids
        ids = np.array(found, dtype=storage_dtype(self.vocab_size))
        return ids if self.separator is None else ids[ids != self.separator]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids; special tokens decode to nothing."""
        if self._byte_table is not None:
            return self._byte_table.decode(ids)
        kept = [i for i in ids if i not in self._special_ids]
        return self._inner.decode(kept, skip_special_tokens=False)

    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder that keeps an unfinished character until the next call."""
        if self._byte_table is not None:
            return self._byte_table.stream_decoder()
        return _PieceStreamDecoder(self._inner, self._special_ids)

    def count_bytes(self, ids: Ids) -> int | None:
        """Returns the bytes of the ids' text, document by document."""
        ids = np.asarray(ids)
        if self._byte_table is not None:
            return self._byte_table.count_bytes(ids)
        # The decoder drops the blank that begins a text, so each document is decoded by itself.
        documents = np.split(ids, np.flatnonzero(ids == self.separator))
        return sum(len(self.decode(document.tolist()).encode()) for document in documents)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (self.name, self._text)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of the file."""
        return {"kind": "json", "name": self.name, "json": self._text}


class _PieceStreamDecoder:
    """Decodes pieces whose text depends on their neighbours, such as blanks before words.

    The package's own DecodeStream cannot flush a cut-off character at the end of a text.
    """

    def __init__(self, inner: tokenizers.Tokenizer, special_ids: set[int]) -> None:
        self._inner, self._special_ids = inner, special_ids
        self._ids: list[int] = []
        self._n_decoded = 0

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """Returns the text that is complete so far; `final` also flushes a cut-off character."""
        self._ids += [i for i in ids if i not in self._special_ids]
        # The pieces returned last are decoded again together with the new ones, and the text that
        # is longer by is the new one. Decoding new pieces alone would drop the blanks before words.
        known = self._inner.decode(self._ids[: self._n_decoded], skip_special_tokens=False)
        text = self._inner.decode(self._ids, skip_special_tokens=False)
        # U+FFFD at the end may be the first bytes of a character that later ids complete.
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._ids = self._ids[self._n_decoded :]
        self._n_decoded = len(self._ids)
        return text[len(known) :]


def _parse(name: str, text: str) -> tokenizers.Tokenizer:
    package = _import_tokenizers(name)
    try:
        inner: tokenizers.Tokenizer = package.Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more special
        raise DataError(f"{name}: not a {FILE_NAME}: {str(error)[:200]}") from None
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # encode special tokens in a text as text
    return inner


def _import_tokenizers(name: str) -> Any:
    """Returns the package tokenizers; raises DataError naming the tokenizer that needs it."""
    try:
        import tokenizers
    except ImportError:
        message = f"tokenizer.name={name} needs tokenizers: pip install tokenizers"
        raise DataError(message) from None
    return tokenizers


def train_bpe(name: str, texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Returns byte pairs of the texts, merged in the order of their frequency; END_OF_TEXT is id 0.

    Deterministic; memory grows with the number of distinct words. The vocabulary is smaller than
    `vocab_size` if the text has no more pairs that occur twice.
    """
    package = _import_tokenizers(name)
    inner = package.Tokenizer(package.models.BPE())
    inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return JsonTokenizer(name, inner.to_str())


def _token_bytes(token: str) -> bytes:
    """Returns the bytes that a token of a byte-level vocabulary stands for."""
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8", "replace")  # an added token is written as its own text


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes: printable ones as themselves, others from U+0100 on.

    Source: bytes_to_unicode in openai/gpt-2, src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _without_surrogates(text: str) -> str:
    """Returns the text with '?' for lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
