"""Small token files for the tests of `data`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import data
from config import DatasetConfig, TokenizerConfig
from data.sources.tokens.dataset import TokenDataset

VOCABULARY = 5000


def ids(count: int, first: int = 0) -> npt.NDArray[np.int64]:
    """Tokens that tell their place, and are below VOCABULARY."""
    return np.arange(first, first + count) % VOCABULARY


def put(path: Path, values: npt.ArrayLike, dtype: str = "uint16") -> Path:
    """A token file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(values).astype(dtype)
    np.save(path, array) if path.suffix == ".npy" else array.tofile(path)
    return path


def open_tokens(
    train: Path, val: Path | None = None, vocab_size: int | None = VOCABULARY, **options: Any
) -> TokenDataset:
    """A dataset of token files; without a test split unless asked for."""
    name = options.pop("tokenizer", "auto")
    options = {"test_fraction": 0.0, **options}
    config = DatasetConfig(
        train_data_path=str(train), val_data_path=None if val is None else str(val), **options
    )
    dataset = data.open_dataset(config, TokenizerConfig(name=name), vocab_size)
    assert isinstance(dataset, TokenDataset)
    return dataset


def tokens_of(dataset: TokenDataset, split: str = "train") -> list[int]:
    """All tokens of a split, from rows of one token and its successor."""
    segments = dataset.segments(1)
    reader, found = segments.open_reader(), list[int]()
    spans = zip(dataset.spans, itertools.pairwise(segments.bounds), strict=True)
    for span, (begin, end) in spans:
        if span.held_out == (split == "test"):
            rows = [reader.tokens(segment, 1, 0, True).tolist() for segment in range(begin, end)]
            found += [first for first, _ in rows] + rows[-1][1:]
    return found
