"""Text to token ids and back.

The one idea: a tokenizer is its mapping. `fingerprint` is the same for the same mapping, wherever
it was read from, and `to_dict` holds the mapping itself, so that token files and checkpoints can be
decoded where no vocabulary is. Bytes are their own ids: 256 of them, no file, no unknown token;
byte 0 does not occur in text (one that does is read as a space) and therefore ends every document.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from config import DataError, TokenizerConfig
from data.tokenizers.base import (
    REPLACEMENT,
    ByteTable,
    Documents,
    Ids,
    NumberStream,
    byte_level,
    digest,
    without_surrogates,
)
from data.tokenizers.base import StreamDecoder as StreamDecoder
from data.tokenizers.base import Tokenizer as Tokenizer
from data.tokenizers.base import row_dtype as row_dtype
from data.tokenizers.base import storage_dtype as storage_dtype

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

SEPARATOR, SPACE = 0, 32
END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
# What ends a document, in vocabularies of different makers; the first that exists.
_SEPARATORS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "[SEP]", "<eos>")
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


class ByteTokenizer(ByteTable):
    """UTF-8 bytes as tokens."""

    name = "bytes"
    vocab_size = 256
    separator: int | None = SEPARATOR
    fingerprint = "bytes-1"

    def __init__(self) -> None:
        super().__init__([b"", *(bytes([byte]) for byte in range(1, 256))])

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """The bytes of the text; NUL becomes a space and lone surrogates become '?'."""
        data = text.encode("utf-8", "replace").replace(bytes([SEPARATOR]), bytes([SPACE]))
        return np.frombuffer(data, dtype=np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Its kind alone."""
        return {"kind": "bytes"}


class CharTokenizer(ByteTable):
    """Characters as tokens: the id of each is its place in `characters`. No separator.

    A character outside raises DataError: to skip it would be to train on another text.
    """

    name = "char"
    separator: int | None = None

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise DataError("tokenizer 'char': its characters are none, or one is there twice")
        self.characters = characters
        self.vocab_size = len(characters)
        self.fingerprint = f"char-{digest(characters.encode('utf-8', 'surrogatepass'))}"
        super().__init__([character.encode("utf-8", "replace") for character in characters])
        points = _code_points(characters)
        self._order = np.argsort(points).astype(storage_dtype(self.vocab_size))
        self._sorted = points[self._order]

    def encode(self, text: str) -> Ids:
        """The ids of the characters."""
        points = _code_points(text)
        places = np.minimum(np.searchsorted(self._sorted, points), self.vocab_size - 1)
        wrong = np.flatnonzero(self._sorted[places] != points)
        if len(wrong):
            place = int(wrong[0])
            line = text.count("\n", 0, place) + 1
            raise DataError(
                f"the character {ascii(text[place])} (number {place + 1:,}, in line {line:,}) is "
                f"not among the {self.vocab_size} of the tokenizer 'char': {self._shown()}"
            )
        return self._order[places]

    def _shown(self) -> str:
        shown = ascii("".join(sorted(self.characters)))[1:-1]
        return shown if len(shown) <= 100 else shown[:100] + "..."

    def to_dict(self) -> dict[str, Any]:
        """The characters in the order of their ids."""
        return {"kind": "char", "characters": self.characters}


def char_tokenizer(characters: Iterable[str]) -> CharTokenizer:
    """The tokenizer of the characters of a text, numbered in the order of their code points."""
    return CharTokenizer("".join(sorted(set(characters))))


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class IdTokenizer(Documents):
    """Tokens whose text is unknown, written as numbers."""

    name = "ids"
    separator: int | None = None
    fingerprint = "ids-1"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> Ids:
        """The numbers in a text, which blanks separate; raises DataError for anything else."""
        words = text.split()
        for word in words:
            if not re.fullmatch(r"[0-9]{1,10}", word) or int(word) >= self.vocab_size:
                raise DataError(
                    f"{ascii(word[:40])} is not a token: these tokens have no text; give numbers "
                    f"from 0 to {self.vocab_size - 1}, with blanks between them"
                )
        return np.array([int(word) for word in words], dtype=storage_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The numbers, with blanks between them."""
        return " ".join(str(i) for i in ids)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that writes a blank before each number but the first."""
        return NumberStream()

    def count_bytes(self, ids: Ids) -> int | None:
        """Unknown."""
        del ids
        return None

    def to_dict(self) -> dict[str, Any]:
        """How many there are."""
        return {"kind": "ids", "vocab_size": self.vocab_size}


class RankTokenizer(ByteTable):
    """GPT-2's byte pairs, by tiktoken; the id after all others ends documents.

    `tokens` are the bytes of each id, in the order in which they are merged.
    """

    def __init__(self, name: str, tokens: Sequence[bytes]) -> None:
        self.name, self._tokens = name, tokens
        self.separator = len(tokens)
        self.vocab_size = len(tokens) + 1
        mapping = b"".join(len(token).to_bytes(4, "little") + token for token in tokens)
        self.fingerprint = f"gpt2-{digest(mapping)}"
        super().__init__([*tokens, b""])

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:  # not needed where text is only decoded
        return _import_tiktoken().Encoding(
            self.name,
            pat_str=_GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            special_tokens={END_OF_TEXT: self.separator},
        )

    def encode(self, text: str) -> Ids:
        """The ids; what looks like a separator in the text is text."""
        ids = self._encoding.encode_ordinary(without_surrogates(text))
        return np.array(ids, dtype=storage_dtype(self.vocab_size))

    def __reduce__(self) -> tuple[Any, ...]:
        return RankTokenizer, (self.name, self._tokens)

    def to_dict(self) -> dict[str, Any]:
        """The tokens, as words of base64."""
        words = " ".join(base64.b64encode(token).decode() for token in self._tokens)
        return {"kind": "gpt2", "name": self.name, "tokens": words}


def rank_tokenizer(encoding: tiktoken.Encoding) -> RankTokenizer:
    """The tokenizer of a tiktoken encoding that splits words as GPT-2 does."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return RankTokenizer(encoding.name, tokens)


def _gpt2() -> RankTokenizer:
    tiktoken = _import_tiktoken()
    try:
        return rank_tokenizer(tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise DataError(
            "tokenizer.name=gpt2: its vocabulary is not on this machine and cannot be downloaded "
            f"({type(error).__name__}). Copy a folder in which tiktoken has kept it on another "
            "machine and name it in TIKTOKEN_CACHE_DIR, or set tokenizer.name to a folder with "
            f"GPT-2's {FILE_NAME}"
        ) from None


def _import_tiktoken() -> Any:
    try:
        import tiktoken
    except ImportError:
        raise DataError("tokenizer.name=gpt2 needs tiktoken: pip install tiktoken") from None
    return tiktoken


class JsonTokenizer(Documents):
    """A `tokenizer.json`, by the package tokenizers.

    Texts are encoded one by one: only its batch calls start threads, and threads do not survive
    the fork of a data worker. Raises DataError where `text` is not such a file.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self._text = name, text
        self._inner = inner = _parse(name, text)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        found = [inner.token_to_id(token) for token in _SEPARATORS]
        self.separator = next((i for i in found if i is not None), None)
        added = inner.get_added_tokens_decoder()
        self._silent = {i for i, token in added.items() if token.special}
        self._silent |= set() if self.separator is None else {self.separator}
        values = {k: v for k, v in json.loads(text).items() if k not in ("truncation", "padding")}
        self.fingerprint = f"json-{digest(json.dumps(values, sort_keys=True).encode())}"
        self._table: ByteTable | None = None
        if (values.get("decoder") or {}).get("type") == "ByteLevel":
            table = [REPLACEMENT.encode()] * self.vocab_size
            for token, i in vocabulary.items():
                table[i] = b"" if i in self._silent else byte_level(token)
            self._table = ByteTable(table)

    def encode(self, text: str) -> Ids:
        """The ids, without special tokens; what looks like one in the text is text.

        Where the model has no other ids for the text of the separator, as T5's, it is left out.
        """
        found = self._inner.encode(without_surrogates(text), add_special_tokens=False).ids
        ids = np.array(found, dtype=storage_dtype(self.vocab_size))
        return ids if self.separator is None else ids[ids != self.separator]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens vanish."""
        if self._table is not None:
            return self._table.decode(ids)
        return self.join([i for i in ids if i not in self._silent])

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that keeps an unfinished character until the next call."""
        if self._table is not None:
            return self._table.stream_decoder()
        return _PieceStream(self)

    def join(self, ids: list[int]) -> str:
        """The text of ids as the file's own decoder joins them; ids without a token vanish."""
        return self._inner.decode(ids, skip_special_tokens=False)

    def is_silent(self, token: int) -> bool:
        """Whether an id stands for no text."""
        return token in self._silent

    def count_bytes(self, ids: Ids) -> int | None:
        """The bytes that the ids stand for; of pieces with blanks, of their decoded text."""
        ids = np.asarray(ids)
        if self._table is not None:
            return self._table.count_bytes(ids)
        documents = np.split(ids, np.flatnonzero(ids == self.separator))
        return sum(len(self.decode(document.tolist()).encode()) for document in documents)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (self.name, self._text)

    def to_dict(self) -> dict[str, Any]:
        """The text of the file."""
        return {"kind": "json", "name": self.name, "json": self._text}


class _PieceStream:
    """Decodes pieces whose text depends on their neighbours, such as blanks before words.

    The last pieces given out are decoded again together with the new ones: what is more then is
    the new text. It waits while it ends in U+FFFD, which may be an unfinished character.
    """

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # of the ids kept, how many are given out

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """The text that is complete so far; `final` also gives out what is cut off."""
        self._ids += [i for i in ids if not self._tokenizer.is_silent(i)]
        known = self._tokenizer.join(self._ids[: self._given])
        text = self._tokenizer.join(self._ids)
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text[len(known) :]


def _parse(name: str, text: str) -> tokenizers.Tokenizer:
    package = _import_tokenizers(name)
    try:
        inner: tokenizers.Tokenizer = package.Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more special
        raise DataError(f"{name}: not a {FILE_NAME}: {str(error)[:200]}") from None
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


def _import_tokenizers(name: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        message = f"tokenizer.name={name} needs tokenizers: pip install tokenizers"
        raise DataError(message) from None
    return tokenizers


def train_bpe(name: str, texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """The byte pairs of a text, merged in the order of their frequency, after END_OF_TEXT as id 0.

    The same text gives the same tokenizer; memory grows with the distinct words. Fewer than
    `vocab_size` come out where the text has no more pairs that occur twice.
    """
    tokenizers = _import_tokenizers(name)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return JsonTokenizer(name, inner.to_str())


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a config names: bytes, gpt2, a `tokenizer.json` or a Hub name.

    Raises DataError where it cannot be had, with the remedy.
    """
    name = config.name
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return _gpt2()
    if name in ("char", "auto", "ids"):
        raise DataError(
            f"tokenizer.name={name} stands for the tokenizer of a token file. Make one: "
            "python prepare.py SOURCE data/NAME --tokenizer char; then train with dataset=NAME"
        )
    path = os.path.join(name, FILE_NAME) if os.path.isdir(name) else name
    if not os.path.isfile(path):
        if path != name or name.endswith(".json") or not _HUB_NAME.fullmatch(name):
            raise DataError(f"tokenizer.name={name}: no such file (from {os.getcwd()}): {path}")
        path = _download(name)
    try:
        with open(path, encoding="utf-8") as file:
            return JsonTokenizer(name, file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _download(name: str) -> str:
    """The path of a Hub repository's file in the user's cache, which is looked at first."""
    try:
        import huggingface_hub
    except ImportError:
        message = f"tokenizer.name={name} needs huggingface_hub: pip install huggingface_hub"
        raise DataError(message) from None
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, FILE_NAME)
        return (
            cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(name, FILE_NAME)
        )
    except Exception as error:  # of the network, the Hub, the name, the disk
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"tokenizer.name={name}: neither a file here nor to be had from the Hugging Face Hub: "
            f"{reason} Set it to a {FILE_NAME} or its folder (or bytes, gpt2, char)"
        ) from None


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """The tokenizer of `to_dict`; raises DataError for other values."""
    try:
        if values["kind"] == "bytes":
            return ByteTokenizer()
        if values["kind"] == "char":
            return CharTokenizer(values["characters"])
        if values["kind"] == "gpt2":
            tokens = [base64.b64decode(word, validate=True) for word in values["tokens"].split()]
            return RankTokenizer(values["name"], tokens)
        if values["kind"] == "json":
            return JsonTokenizer(values["name"], values["json"])
        if values["kind"] == "ids":
            return IdTokenizer(int(values["vocab_size"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not the description of a tokenizer: {error!r}") from None
    raise DataError(f"a tokenizer of kind {ascii(values['kind'])[:40]}, which is not known here")
