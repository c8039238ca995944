"""What stands beside token files: their tokenizer, the size of its vocabulary and their dtype.

The one idea: it is written as JSON. nanoGPT's `meta.pkl` is read too, by a reader that builds plain
values only: no class or function is ever looked up, so a pickle cannot run anything.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import DataError, TokenizerConfig, WriteError
from data.tokenizer import (
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    build_tokenizer,
    tokenizer_from_dict,
)

FORMAT = 1
GPT2_TOKENS = 50257
_JSON_LIMIT_BYTES = 256 << 20
_PICKLE_LIMIT_BYTES = 4 << 20
_REMEDY = "Make the token files again: python prepare.py SOURCE OUT --tokenizer NAME --overwrite"


@dataclass(frozen=True, slots=True)
class Meta:
    """What a file says of the token files beside it; None: it does not say."""

    tokenizer: Tokenizer | None
    vocab_size: int | None
    dtype: str | None
    path: str


def meta_path(tokens: str | os.PathLike[str]) -> Path:
    """Where the description of a single token file is written: NAME.meta.json."""
    return Path(tokens).with_suffix(".meta.json")


def read_meta(tokens: str | os.PathLike[str]) -> Meta | None:
    """The description of a token file: NAME.meta.json, meta.json or meta.pkl beside it.

    None where there is none; raises DataError where it cannot be read.
    """
    folder = Path(tokens).parent
    for path in (meta_path(tokens), folder / "meta.json", folder / "meta.pkl"):
        if path.is_file():
            return read_meta_file(path)
    return None


def read_meta_file(path: Path) -> Meta:
    """The description in a file of either kind; raises DataError where it cannot be read."""
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
        values = _plain_values(data) if is_pickle else json.loads(data)
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}, not a dictionary")
        return _from_pickle(values, path) if is_pickle else _from_json(values, path)
    except (DataError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:300]
        raise DataError(f"{path}: not a description of tokens: {reason}. {_REMEDY}") from None


def open_tokenizer(values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that comes with weights: a mapping (`Tokenizer.to_dict`), one that can be had
    by its `name`, or that of the text in data/NAME, as nanoGPT's sample.py finds it. Raises
    DataError.
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
    if values["format"] != FORMAT:
        raise ValueError(f"format {ascii(values['format'])[:20]}, and {FORMAT} is known here")
    tokenizer = tokenizer_from_dict(values["tokenizer"])
    dtype, vocab_size = values["dtype"], values["vocab_size"]
    if dtype not in ("uint8", "uint16", "uint32"):
        raise ValueError(f"dtype {ascii(dtype)[:20]}")
    if vocab_size != tokenizer.vocab_size:
        raise ValueError(f"vocab_size {ascii(vocab_size)[:20]}, the tokenizer's is not")
    return Meta(tokenizer, vocab_size, dtype, os.fspath(path))


def _from_pickle(values: dict[Any, Any], path: Path) -> Meta:
    """nanoGPT's: vocab_size, and for characters itos and stoi; its files are always uint16."""
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


def _plain_values(data: bytes) -> Any:
    """What a pickle describes; raises ValueError where that is more than plain values."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # The unpickler would reserve as many places as the number of the memo's place.
            if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
                raise ValueError(f"place {argument} in the memo of {len(data)} bytes")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # what a broken pickle raises is not limited
        raise ValueError(f"not a pickle of plain values ({type(error).__name__})") from None


def write_meta(
    path: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], tokens: Mapping[str, int]
) -> None:
    """Write the description as JSON, whole or not at all; raises WriteError.

    `tokens` counts those of each file.
    """
    values = {
        "format": FORMAT,
        "tokenizer": tokenizer.to_dict(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "tokens": dict(tokens),
        "separator": tokenizer.separator,
    }
    write_json(path, values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values beside their place and rename; raises WriteError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            json.dump(values, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from None
