"""The meta file beside token files: tokenizer, vocabulary size, dtype, file sizes, checksums.

It is written as JSON. nanoGPT's `meta.pkl` is read too, by an unpickler that builds plain values
only: it looks up no class and no function, so a pickle cannot run anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config import DataError, TokenizerConfig, WriteError
from data.sources.tokens.checksums import BLOCK_BYTES, Crcs, from_text, to_text
from data.tokenizers.base import Tokenizer
from data.tokenizers.build import build_tokenizer, tokenizer_from_dict
from data.tokenizers.simple import CharTokenizer, IdTokenizer
from files.atomic import atomic_write_text

FORMAT = 2  # 1 has neither checksums nor a digest
GPT2_TOKENS = 50257
_JSON_LIMIT_BYTES = 256 << 20
_PICKLE_LIMIT_BYTES = 4 << 20
_REMEDY = "Make the token files again: python prepare.py SOURCE OUT --tokenizer NAME --overwrite"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a meta file states about one token file."""

    endings: tuple[str, ...]
    """Of the files that it is about."""
    size: int
    crcs: Crcs | None


@dataclass(frozen=True, slots=True)
class Meta:
    """The contents of a meta file; None: it does not say."""

    tokenizer: Tokenizer | None
    vocab_size: int | None
    dtype: str | None
    path: str
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """By role: "train", "val"."""

    @property
    def is_pickle(self) -> bool:
        """Whether it is nanoGPT's, which does not state the dtype."""
        return self.path.endswith(".pkl")

    def record(self, tokens: str) -> FileRecord | None:
        """Returns what it states about a token file beside it, if anything."""
        # NAME.meta.json is about one file, which it calls "train" whatever its name is.
        is_of_one_file = os.path.basename(self.path) != "meta.json"
        stem, ending = os.path.splitext(os.path.basename(tokens))
        record = self.files.get("train" if is_of_one_file else stem)
        return record if record and ending in record.endings else None


def meta_path(tokens: str | os.PathLike[str]) -> Path:
    """Returns the path of the meta file of a single token file: NAME.meta.json."""
    return Path(tokens).with_suffix(".meta.json")


def read_meta(tokens: str | os.PathLike[str]) -> Meta | None:
    """Reads NAME.meta.json, meta.json or meta.pkl beside a token file; None without any.

    Raises DataError if it cannot be read.
    """
    return read_metas([os.fspath(tokens)])[0]


def _beside(tokens: str | os.PathLike[str]) -> Path | None:
    folder = Path(tokens).parent
    for path in (meta_path(tokens), folder / "meta.json", folder / "meta.pkl"):
        if path.is_file():
            return path
    return None


def read_metas(tokens: Sequence[str]) -> list[Meta | None]:
    """Reads the meta file of each token file; one that describes several is read once."""
    found: dict[Path, Meta] = {}
    return [
        None if path is None else found.get(path) or found.setdefault(path, read_meta_file(path))
        for path in map(_beside, tokens)
    ]


def read_meta_file(path: Path) -> Meta:
    """Reads a meta file of either kind; raises DataError if it cannot be read."""
    is_pickle = path.suffix == ".pkl"
    try:
        with path.open("rb") as file:
            limit = _PICKLE_LIMIT_BYTES if is_pickle else _JSON_LIMIT_BYTES
            data = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise DataError(f"{path}: larger than {limit >> 20} MiB, which no description is")
    try:
        values = load_plain_pickle(data) if is_pickle else json.loads(data)
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}, not a dictionary")
        return _from_pickle(values, path) if is_pickle else _from_json(values, path)
    except (DataError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:300]
        raise DataError(f"{path}: not a description of tokens: {reason}. {_REMEDY}") from None


def open_tokenizer(values: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer that comes with weights; raises DataError.

    `values` are those of `Tokenizer.to_dict`, or name a tokenizer to build, or a folder data/NAME
    whose tokenizer is taken, as nanoGPT's sample.py does.
    """
    kind = values.get("kind")
    if kind == "name":
        return build_tokenizer(TokenizerConfig(name=values["name"]))
    if kind != "dataset":
        return tokenizer_from_dict(dict(values))
    meta = read_meta(Path("data") / values["name"] / "train.bin")
    if meta is not None and meta.tokenizer is not None:
        return meta.tokenizer
    size = values["vocab_size"]
    if size < GPT2_TOKENS:
        return IdTokenizer(size)
    return build_tokenizer(TokenizerConfig(name="gpt2"))


def _from_json(values: dict[str, Any], path: Path) -> Meta:
    if values["format"] not in (1, FORMAT):
        raise ValueError(f"format {ascii(values['format'])[:20]}, and {FORMAT} is known here")
    if values["format"] == FORMAT and values["digest"] != _digest(values):
        raise ValueError("its digest does not match, so it is damaged or was edited")
    tokenizer = tokenizer_from_dict(values["tokenizer"])
    dtype, vocab_size = values["dtype"], values["vocab_size"]
    if dtype not in ("uint8", "uint16", "uint32"):
        raise ValueError(f"dtype {ascii(dtype)[:20]}")
    if vocab_size != tokenizer.vocab_size:
        raise ValueError(f"vocab_size {ascii(vocab_size)[:20]}, the tokenizer's is not")
    files = _records(values) if values["format"] == FORMAT else _sizes(values, np.dtype(dtype))
    return Meta(tokenizer, vocab_size, dtype, os.fspath(path), files)


def _digest(values: Mapping[str, Any]) -> str:
    """Returns a digest of all other values, so that a flipped bit in them is noticed."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _records(values: dict[str, Any]) -> dict[str, FileRecord]:
    if values["block_bytes"] != BLOCK_BYTES:
        raise ValueError(f"checksums of {values['block_bytes']} bytes, and {BLOCK_BYTES} are known")
    return {
        role: FileRecord((file["ending"],), file["bytes"], from_text(file["crc32"], file["bytes"]))
        for role, file in values["files"].items()
    }


def _sizes(values: dict[str, Any], dtype: np.dtype[Any]) -> dict[str, FileRecord]:
    """Returns the sizes of files without a header, from the token counts of format 1."""
    tokens = values.get("tokens")
    if not isinstance(tokens, dict):
        return {}
    return {
        role: FileRecord((".bin", ".ids"), count * dtype.itemsize, None)
        for role, count in tokens.items()
        # bool is an int in Python, and nothing stops a file from having one.
        if type(count) is int
    }


def _from_pickle(values: dict[Any, Any], path: Path) -> Meta:
    """Reads nanoGPT's vocab_size, and itos for characters; its files are always uint16."""
    vocab_size, table = values.get("vocab_size"), values.get("itos")
    if vocab_size is not None and (type(vocab_size) is not int or vocab_size < 1):
        raise ValueError("vocab_size is not a whole number")
    if table is None:
        return Meta(None, vocab_size, "uint16", os.fspath(path))
    pairs = dict(enumerate(table)) if isinstance(table, list) else table
    if not isinstance(pairs, dict) or not all(
        type(i) is int and type(character) is str and len(character) == 1
        for i, character in pairs.items()
    ):
        raise ValueError("itos does not map numbers to single characters")
    if sorted(pairs) != list(range(len(pairs))) or vocab_size not in (None, len(pairs)):
        raise ValueError(f"itos does not number {vocab_size or len(pairs)} characters from 0")
    tokenizer = CharTokenizer("".join(pairs[i] for i in range(len(pairs))))
    return Meta(tokenizer, tokenizer.vocab_size, "uint16", os.fspath(path))


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, strings, bytes, None and collections of them; looks nothing up."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"it asks for {module_name}.{global_name}, and only plain values are read")


def load_plain_pickle(data: bytes) -> Any:
    """Returns the plain values of a pickle; raises ValueError for anything else."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # The unpickler reserves memory for as many entries as the largest index in the memo.
            if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
                raise ValueError(f"place {argument} in the memo of {len(data)} bytes")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # what a broken pickle raises is not limited
        raise ValueError(f"not a pickle of plain values ({type(error).__name__})") from None


def write_meta(
    path: Path,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    tokens: Mapping[str, int],
    files: Mapping[str, FileRecord] | None = None,
) -> None:
    """Writes a meta file as JSON, whole or not at all; raises WriteError.

    `tokens` and `files` have the number of tokens and the record of each file, by role.
    """
    values: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": tokenizer.to_dict(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "tokens": dict(tokens),
        "separator": tokenizer.separator,
        "block_bytes": BLOCK_BYTES,
        "files": {
            role: {"ending": file.endings[0], "bytes": file.size, "crc32": to_text(file.crcs)}
            for role, file in (files or {}).items()
            if file.crcs is not None
        },
    }
    write_json(path, values | {"digest": _digest(values)})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes plain values as JSON, whole or not at all; raises WriteError."""
    try:
        atomic_write_text(path, json.dumps(values) + "\n")
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from None
