"""From the options of a run to its text and tokenizer.

The one idea: parquet files hold text, which any tokenizer can encode. Token files hold what one has
encoded already: there the tokenizer is the one that a meta file beside them names, or one that does
not contradict it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from config import DataError, DatasetConfig, TokenizerConfig, token_paths
from data.sources.base import Dataset
from data.sources.meta import GPT2_TOKENS, Meta, read_metas
from data.sources.parquet_index import Index, build_index
from data.sources.parquet_text import characters, check_row_groups, check_rows, open_folder
from data.sources.token_file import (
    ENDINGS,
    TokenFile,
    check_at_start,
    detect_dtype,
    find_files,
    open_files,
)
from data.sources.token_text import TokenText, check_split
from data.tokenizers.base import Tokenizer
from data.tokenizers.build import build_tokenizer
from data.tokenizers.simple import IdTokenizer, char_tokenizer

_DESCRIBED = 10  # meta files that the start of a run names, at most


def open_dataset(
    dataset: DatasetConfig,
    tokenizer: TokenizerConfig,
    vocab_size: int | None = None,
    known: Tokenizer | None = None,
) -> Dataset:
    """Index and split the text of the config.

    Reads the footers of parquet files, and of text that is not to be bytes also a sample (for
    tokenizer `char` all of it, once); of token files a sample. `vocab_size`, the model's, counts
    where nothing else tells which tokens there are. `known` is the tokenizer of weights that are
    trained on, in place of that of the config. Raises DataError for data that cannot be used,
    naming the file, what was found and the remedy.
    """
    dataset = _prepared(dataset)
    if token_paths(dataset) is None:
        return _open_folder(dataset, tokenizer, known)
    return _open_token_files(dataset, tokenizer, vocab_size, known)


def _prepared(dataset: DatasetConfig) -> DatasetConfig:
    """A folder that holds train.bin (.ids, .npy) in place of parquet files is its token files."""
    folder = dataset.parquet_dir
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    endings = [ending for ending in ENDINGS if f"train{ending}" in names]
    if token_paths(dataset) or not endings or any(name.endswith(".parquet") for name in names):
        return dataset
    val = f"val{endings[0]}"
    return replace(
        dataset,
        train_data_path=os.path.join(folder, f"train{endings[0]}"),
        val_data_path=os.path.join(folder, val) if val in names else None,
    )


def _open_folder(
    dataset: DatasetConfig, config: TokenizerConfig, known: Tokenizer | None
) -> Dataset:
    index = build_index(dataset.parquet_dir, dataset.text_column, dataset.on_bad_shard == "skip")
    check_rows(index)
    check_row_groups(index)
    tokenizer = known or _text_tokenizer(config, index, dataset)
    return Dataset(open_folder(index, dataset, tokenizer), tokenizer)


def _text_tokenizer(config: TokenizerConfig, index: Index, dataset: DatasetConfig) -> Tokenizer:
    if config.name == "char":
        return char_tokenizer(characters(index, dataset))
    return build_tokenizer(replace(config, name="bytes") if config.name == "auto" else config)


def _open_token_files(
    dataset: DatasetConfig,
    config: TokenizerConfig,
    vocab_size: int | None,
    known: Tokenizer | None,
) -> Dataset:
    paths = token_paths(dataset)
    assert paths is not None
    options = ["dataset.train_data_path", "dataset.val_data_path"]
    if dataset.name is not None:
        options = [f"dataset.name={dataset.name}"] * 2
    named = zip(options, paths, strict=True)
    found = [find_files(path, option) for option, path in named if path is not None]
    beside = [read_metas(files) for files in found]
    metas = list({meta.path: meta for metas in beside for meta in metas if meta}.values())
    told = metas or vocab_size or config.name != "auto" or known
    notes = [] if told else _assumed(dataset)
    tokenizer = known or _token_tokenizer(
        config, metas, found[0][0], GPT2_TOKENS if notes else vocab_size
    )
    if known is not None:
        written = [(meta.tokenizer, meta.path) for meta in metas if meta.tokenizer]
        _agreed([(known, "the weights that are trained on"), *written])
    opened: list[tuple[TokenFile, ...]] = []
    notes += [_meta_note(meta, tokenizer) for meta in metas[:_DESCRIBED]]
    for files, descriptions in zip(found, beside, strict=True):
        dtypes, note = _token_dtypes(files, descriptions, dataset.token_dtype, tokenizer)
        opened.append(open_files(files, dtypes, descriptions))
        notes += note
    train_files, val_files = opened[0], opened[1] if len(opened) > 1 else ()
    notes = _checked_notes(train_files + val_files, tokenizer.vocab_size) + notes
    text = TokenText(train_files, val_files, tokenizer, dataset, tuple(dict.fromkeys(notes)))
    check_split(text)
    return Dataset(text, tokenizer)


def _assumed(dataset: DatasetConfig) -> list[str]:
    """What a folder of nanoGPT's holds where it does not say: its scripts write GPT-2's tokens."""
    if dataset.name is None:
        return []
    return [
        f"No meta file in data/{dataset.name}: GPT-2's {GPT2_TOKENS:,} tokens, as nanoGPT takes "
        "it; tokenizer.name=gpt2 makes text of them"
    ]


def _token_tokenizer(
    config: TokenizerConfig, metas: Sequence[Meta], path: str, vocab_size: int | None
) -> Tokenizer:
    """The tokenizer of token files; DataError where it is unknown or a meta file contradicts."""
    written = [(meta.tokenizer, meta.path) for meta in metas if meta.tokenizer]
    stated = f"tokenizer.name={config.name}"
    if config.name not in ("auto", "char"):
        return _agreed([(build_tokenizer(config), stated), *written])
    if not written and config.name == "char":
        raise DataError(
            f"{path}: {stated}, but no meta file beside it says which characters the tokens are. "
            "Make both: python prepare.py SOURCE data/NAME --tokenizer char"
        )
    if not written:
        return _tokens_without_text(metas, path, vocab_size)
    if config.name == "char" and written[0][0].name != "char":
        raise DataError(
            f"{stated}, but the tokens are of {written[0][0].name} by {written[0][1]}. "
            "Set tokenizer.name: auto"
        )
    return _agreed(written)


def _agreed(claims: Sequence[tuple[Tokenizer, str]]) -> Tokenizer:
    """The tokenizer that all name."""
    first, source = claims[0]
    for other, place in claims[1:]:
        if other.fingerprint != first.fingerprint:
            raise DataError(
                f"tokens of two tokenizers: {first.name} ({first.fingerprint}) by {source}, "
                f"{other.name} ({other.fingerprint}) by {place}. Set tokenizer.name: auto and "
                "model.vocab_size: null, or give files of one tokenizer."
            )
    return first


def _tokens_without_text(metas: Sequence[Meta], path: str, vocab_size: int | None) -> Tokenizer:
    sizes = [meta.vocab_size for meta in metas if meta.vocab_size]
    if not sizes and vocab_size is None:
        raise DataError(
            f"{path}: no meta file beside it says which tokens there are. Set tokenizer.name to "
            "the one that made them (gpt2, ...), or state model.vocab_size (50304 where nanoGPT "
            "would take GPT-2's)."
        )
    return IdTokenizer(max(sizes) if sizes else int(vocab_size or 0))


def _token_dtypes(
    files: Sequence[str], metas: Sequence[Meta | None], stated: str, tokenizer: Tokenizer
) -> tuple[list[np.dtype[Any] | None], list[str]]:
    """The dtype of each .bin and .ids as stated, written in its meta file or detected; and a note.

    None for .npy, whose header tells it.
    """
    if stated != "auto":
        return [np.dtype(stated)] * len(files), []
    if files[0].endswith(".npy"):
        return [None] * len(files), []
    # nanoGPT's meta.pkl does not state the dtype: it writes uint16, but others keep that file.
    pairs = list(zip(files, metas, strict=True))
    unsure = [path for path, meta in pairs if meta is None or meta.dtype is None or meta.is_pickle]
    found = detect_dtype(unsure, tokenizer.vocab_size) if unsure else None
    dtypes: list[np.dtype[Any] | None] = []
    for path, meta in pairs:
        written = np.dtype(meta.dtype) if meta and meta.dtype else None
        known = [dtype for dtype in (written, found if path in unsure else None) if dtype]
        dtypes.append(max(known, key=lambda dtype: dtype.itemsize, default=np.dtype(np.uint32)))
    first = next((i for i, (path, _) in enumerate(pairs) if path in unsure), None)
    if first is None or (metas[first] and dtypes[first] == np.uint16):
        return dtypes, []
    note = f"Token type of {files[first]}: {dtypes[first]}, detected"
    return dtypes, [f"{note} (dataset.token_dtype states it)"]


def _checked_notes(files: Sequence[TokenFile], vocab_size: int) -> list[str]:
    """What the start of a run has checked of the tokens, and what nothing protects."""
    total, checked = sum(file.count for file in files), check_at_start(files, vocab_size)
    part = "all" if checked == total else f"{checked:,} of"
    rest = "" if checked == total else "; the rest as it is read"
    bare = [file.path for file in files if file.checksums is None]
    sums = "" if len(bare) == len(files) else " and checksums"
    notes = [f"Checked: {part} {total:,} tokens (ids below {vocab_size:,}{sums}){rest}"]
    if bare:
        others = f" and {len(bare) - 1:,} other files" if len(bare) > 1 else ""
        notes.append(
            f"No checksums for {bare[0]}{others}: damage that leaves valid token ids would go "
            "unnoticed (prepare.py writes checksums)"
        )
    return notes


def _meta_note(meta: Meta, tokenizer: Tokenizer) -> str:
    return (
        f"Tokens described by {meta.path}: {tokenizer.name}, {tokenizer.vocab_size:,} in the "
        f"vocabulary, {meta.dtype or 'of unknown type'}"
    )
