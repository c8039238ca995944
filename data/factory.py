"""Opens the dataset of a config: parquet or token files, and the tokenizer of its tokens.

Parquet files hold text, which any tokenizer can encode. Token files hold text that one tokenizer
has encoded: the one that a meta file beside them names, or one that does not contradict it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from config import DataError, DatasetConfig, TokenizerConfig, source_datasets, token_paths
from data.remote.copies import local_copies
from data.remote.listing import Listing
from data.remote.store import RemoteStore
from data.sources.dataset import Dataset, Source, errors_of_source, summary_of_source
from data.sources.mixture import MixtureDataset
from data.sources.parquet.dataset import characters, check_row_groups, check_rows, open_parquet
from data.sources.parquet.index import Index, build_index
from data.sources.parquet.remote_index import build_remote_index
from data.sources.tokens.dataset import TokenDataset, check_split
from data.sources.tokens.file import (
    ENDINGS,
    TokenFile,
    check_at_start,
    detect_dtype,
    find_files,
    open_files,
)
from data.sources.tokens.meta import GPT2_TOKENS, Meta, read_metas
from data.sources.tokens.remote import list_token_files
from data.tokenizers.base import Tokenizer
from data.tokenizers.build import build_tokenizer
from data.tokenizers.simple import IdTokenizer, char_tokenizer
from settings.addresses import is_remote

SourceIndex: TypeAlias = "Index | tuple[Listing, ...]"
"""The row groups of parquet files; of token files, the listings of those that are remote."""
_NO_CHECKPOINT: Mapping[str, Any] = MappingProxyType({})
_LISTED_METAS = 10  # meta files that the start of a run names, at most


def open_dataset(
    dataset: DatasetConfig,
    tokenizer: TokenizerConfig,
    vocab_size: int | None = None,
    known: Tokenizer | None = None,
    indexes: Mapping[str, SourceIndex] | None = None,
) -> Dataset:
    """Indexes and splits the data of a config.

    Reads the footers of parquet files (for the tokenizer `char` also the text, once), or samples of
    token files. Raises DataError for data that cannot be used.

    Args:
        vocab_size: that of the model; used if nothing else tells which tokens there are.
        known: the tokenizer of pretrained weights, which takes the place of the config's.
        indexes: those of `index_sources`, if another process has made them.
    """
    indexes = index_sources(dataset) if indexes is None else indexes
    if dataset.mixture:
        return _open_mixture(dataset, tokenizer, vocab_size, known, indexes)
    index = indexes[""]
    if isinstance(index, Index):
        return _open_parquet_files(index, dataset, tokenizer, known)
    return _open_token_files(index, _with_token_files(dataset), tokenizer, vocab_size, known)


def index_sources(
    dataset: DatasetConfig, saved: Mapping[str, Any] = _NO_CHECKPOINT
) -> dict[str, SourceIndex]:
    """Returns what the files of each source are, by name; asks servers, and reads footers.

    saved: the `summary` of the checkpoint that a run goes on from. Its commits are taken for
        addresses on the Hub, and DataError is raised for files that have changed since.
    """
    indexes = dict[str, SourceIndex]()
    for name, source in source_datasets(dataset).items():
        with errors_of_source(name):
            indexes[name] = _index_source(source, summary_of_source(saved, name))
    return indexes


def _index_source(source: DatasetConfig, saved: Mapping[str, Any]) -> SourceIndex:
    path, column = source.parquet_dir, source.text_column
    pins = saved.get("pins", {})
    store, skip_bad = RemoteStore(source.retry_seconds), source.on_bad_shard == "skip"
    tokens = token_paths(_with_token_files(source))
    if tokens is not None:
        remote = [each for each in tokens if each is not None and is_remote(each)]
        return tuple(list_token_files(store, each, pins.get(each, "")) for each in remote)
    if is_remote(path):
        return build_remote_index(store, path, column, skip_bad, saved)
    return build_index(path, column, skip_bad, saved)


def _with_token_files(dataset: DatasetConfig) -> DatasetConfig:
    """Names the token files of a folder with train.bin (.ids, .npy) in place of parquet files."""
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


def _open_mixture(
    dataset: DatasetConfig,
    config: TokenizerConfig,
    vocab_size: int | None,
    known: Tokenizer | None,
    indexes: Mapping[str, SourceIndex],
) -> MixtureDataset:
    """Opens every source. The tokenizer is that of the token files: text can follow it."""
    configs, opened = source_datasets(dataset), dict[str, Dataset]()
    parquet = {name: index for name, index in indexes.items() if isinstance(index, Index)}
    for name, source in configs.items():
        remote = indexes[name]
        if not isinstance(remote, Index):
            with errors_of_source(name):
                files = _with_token_files(source)
                opened[name] = _open_token_files(remote, files, config, vocab_size, known)
    claims = [(text.tokenizer, f"source {name}") for name, text in opened.items()]
    if claims and known is None:
        _same_tokenizer(claims)
        # Tokens without text have the same name, however many there are.
        known = max((tokenizer for tokenizer, _ in claims), key=lambda each: each.vocab_size)
    if parquet and claims and isinstance(known, IdTokenizer):
        raise DataError(
            f"dataset.mixture: {', '.join(parquet)}: text, to be mixed with the tokens of "
            f"{', '.join(opened)}, and nothing says which tokenizer made those. "
            "Set tokenizer.name to it."
        )
    if config.name == "char" and known is None:
        found = set[str]()
        for name, index in parquet.items():
            with errors_of_source(name):
                found.update(characters(index, configs[name]))
        known = char_tokenizer(found)
    for name, index in parquet.items():
        with errors_of_source(name):
            opened[name] = _open_parquet_files(index, configs[name], config, known)
        known = known or opened[name].tokenizer
    assert known is not None
    weights = {source.name: source.weight for source in dataset.mixture}
    sources = tuple(Source(name, weights[name], opened[name]) for name in configs)
    return MixtureDataset(sources, known)


def _open_parquet_files(
    index: Index, dataset: DatasetConfig, config: TokenizerConfig, known: Tokenizer | None
) -> Dataset:
    check_rows(index)
    check_row_groups(index)
    if known is not None:
        tokenizer = known
    elif config.name == "char":
        tokenizer = char_tokenizer(characters(index, dataset))
    else:
        tokenizer = build_tokenizer(
            replace(config, name="bytes") if config.name == "auto" else config
        )
    return open_parquet(index, dataset, tokenizer)


def _open_token_files(
    remote: tuple[Listing, ...],
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
    here = {listing.address: _local_path(listing, dataset) for listing in remote}
    found = [find_files(here.get(path, path), option) for option, path in named if path is not None]
    beside = [read_metas(files) for files in found]
    # One meta file may describe many token files.
    metas = list({meta.path: meta for metas in beside for meta in metas if meta}.values())
    told = metas or vocab_size or config.name != "auto" or known
    notes = [] if told else _gpt2_note(dataset)
    tokenizer = known or _token_tokenizer(
        config, metas, found[0][0], GPT2_TOKENS if notes else vocab_size
    )
    if known is not None:
        written = [(meta.tokenizer, meta.path) for meta in metas if meta.tokenizer]
        _same_tokenizer([(known, "the weights that are trained on"), *written])
    opened: list[tuple[TokenFile, ...]] = []
    notes += [_meta_note(meta, tokenizer) for meta in metas[:_LISTED_METAS]]
    for files, descriptions in zip(found, beside, strict=True):
        dtypes, note = _token_dtypes(files, descriptions, dataset.token_dtype, tokenizer)
        opened.append(open_files(files, dtypes, descriptions))
        notes += note
    train_files, val_files = opened[0], opened[1] if len(opened) > 1 else ()
    copied = [f"Copy of {address}: {path}" for address, path in here.items()]
    notes = copied + _checked_notes(train_files + val_files, tokenizer.vocab_size) + notes
    text = TokenDataset(
        train_files, val_files, tokenizer, dataset, tuple(dict.fromkeys(notes)), remote
    )
    check_split(text)
    return text


def _local_path(listing: Listing, dataset: DatasetConfig) -> str:
    """Returns the path of a copy of the remote file or folder that a listing is of."""
    store = RemoteStore(dataset.retry_seconds)
    folder = local_copies(store, listing, dataset.cache_bytes)
    is_file = listing.address.endswith(ENDINGS)
    return os.path.join(folder, listing.address.rsplit("/", 1)[1]) if is_file else str(folder)


def _gpt2_note(dataset: DatasetConfig) -> list[str]:
    """Returns a note that the data is taken for GPT-2 tokens, which nanoGPT's scripts write."""
    if dataset.name is None:
        return []
    return [
        f"No meta file in data/{dataset.name}: GPT-2's {GPT2_TOKENS:,} tokens, as nanoGPT takes "
        "it; tokenizer.name=gpt2 makes text of them"
    ]


def _token_tokenizer(
    config: TokenizerConfig, metas: Sequence[Meta], path: str, vocab_size: int | None
) -> Tokenizer:
    """Returns the tokenizer of token files; DataError if it is unknown or a meta file differs."""
    written = [(meta.tokenizer, meta.path) for meta in metas if meta.tokenizer]
    stated = f"tokenizer.name={config.name}"
    if config.name not in ("auto", "char"):
        return _same_tokenizer([(build_tokenizer(config), stated), *written])
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
    return _same_tokenizer(written)


def _same_tokenizer(claims: Sequence[tuple[Tokenizer, str]]) -> Tokenizer:
    """Returns the tokenizer of claims (tokenizer, source); raises DataError if they differ."""
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
    """Returns the dtype of each file, by option, meta file or detection, and a note on the last.

    None for .npy, whose header has it.
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
    """Returns lines on which tokens the start of a run has checked, and on missing checksums."""
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
