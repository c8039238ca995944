"""From a name in the config, or the values in a checkpoint, to a tokenizer."""

from __future__ import annotations

import os
import re
from typing import Any

from config import DataError, TokenizerConfig
from data.tokenizers.base import Tokenizer
from data.tokenizers.bpe import FILE_NAME, Gpt2Tokenizer, JsonTokenizer, load_gpt2
from data.tokenizers.simple import ByteTokenizer, CharTokenizer, IdTokenizer

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer that a config names: bytes, gpt2, a `tokenizer.json` or a Hub name.

    Raises DataError with the remedy if it cannot be loaded.
    """
    name = config.name
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return load_gpt2()
    if name in ("char", "auto", "ids"):
        raise DataError(
            f"tokenizer.name={name} stands for the tokenizer of a token file. Make one: "
            "python prepare.py SOURCE data/NAME --tokenizer char; then train with dataset=NAME"
        )
    path = os.path.join(name, FILE_NAME) if os.path.isdir(name) else name
    if not os.path.isfile(path):
        if path != name or name.endswith(".json") or not _HUB_NAME.fullmatch(name):
            raise DataError(f"tokenizer.name={name}: no such file (from {os.getcwd()}): {path}")
        path = _hub_file(name)
    try:
        with open(path, encoding="utf-8") as file:
            return JsonTokenizer(name, file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _hub_file(name: str) -> str:
    """Returns the path of a Hub repository's tokenizer.json in the user's cache."""
    try:
        import huggingface_hub
    except ImportError:
        message = f"tokenizer.name={name} needs huggingface_hub: pip install huggingface_hub"
        raise DataError(message) from None
    try:
        # Asked first: hf_hub_download asks the Hub for a newer version, also for a cached file.
        cached = huggingface_hub.try_to_load_from_cache(name, FILE_NAME)
        if isinstance(cached, str):
            return cached
        path: str = huggingface_hub.hf_hub_download(name, FILE_NAME)
        return path
    except Exception as error:  # of the network, the Hub, the name, the disk
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"tokenizer.name={name}: no such file here, and the Hugging Face Hub gives none: "
            f"{reason} Set it to a {FILE_NAME} or its folder (or bytes, gpt2, char)"
        ) from None


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer of `Tokenizer.to_dict`; raises DataError for other values."""
    try:
        match values["kind"]:
            case "bytes":
                return ByteTokenizer()
            case "char":
                return CharTokenizer(values["characters"])
            case "gpt2":
                return Gpt2Tokenizer.from_dict(values)
            case "json":
                return JsonTokenizer(values["name"], values["json"])
            case "ids":
                return IdTokenizer(int(values["vocab_size"]))
            case kind:
                raise DataError(f"a tokenizer of the unknown kind {ascii(kind)[:40]}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not the description of a tokenizer: {error!r}") from None
