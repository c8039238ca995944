"""Small parquet folders for the tests of `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

import data
from config import DatasetConfig, TokenizerConfig
from data.loading.order import Integers, Tokens
from data.sources.dataset import segments_of_split
from data.sources.parquet.dataset import ParquetDataset


def write(path: Path, texts: list[str | None], **options: Any) -> Path:
    """One file; `kind` is the Arrow type of the column, the rest goes to `pq.write_table`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = options.pop("kind", pa.string())
    column = pa.array(texts, pa.string()).cast(kind)
    options = {"row_group_size": 10, "write_page_checksum": True, **options}
    pq.write_table(pa.table({"text": column}), path, **options)
    return path


def marked(folder: Path, files: int = 3, rows: int = 40) -> list[str]:
    """Files of documents that are all different, of 5 to 60 bytes; returns the documents."""
    texts = [f"<{n}>" + "x" * (n * 7 % 55) for n in range(files * rows)]
    for f in range(files):
        write(folder / f"part_{f}.parquet", list(texts[f * rows : (f + 1) * rows]))
    return texts


def opened(folder: Path | str, name: str = "auto", **options: Any) -> ParquetDataset:
    """The dataset of a folder or an address, without a test split unless asked for."""
    config = DatasetConfig(parquet_dir=str(folder), **{"test_fraction": 0.0, **options})
    dataset = data.open_dataset(config, TokenizerConfig(name=name))
    assert isinstance(dataset, ParquetDataset)
    return dataset


def segment_count(dataset: data.Dataset) -> int:
    return len(dataset.segments(1).sizes)


def split(dataset: data.Dataset, name: str) -> Integers:
    """The segments of "train" or "test"."""
    return segments_of_split(dataset.segments(1), name)


def segment_tokens(dataset: data.Dataset, shuffle: bool = False, epoch: int = 0) -> list[Tokens]:
    """The tokens of every segment."""
    reader = dataset.segments(1).open_reader()
    tokens = [reader.tokens(i, 1, epoch, shuffle) for i in range(segment_count(dataset))]
    reader.close()
    return tokens


def texts_of(dataset: data.Dataset, shuffle: bool = False) -> list[str]:
    """All documents, segment by segment."""
    joined = np.concatenate(segment_tokens(dataset, shuffle))
    return joined.tobytes().decode().split("\0")[:-1]


def small_bpe(folder: Path, texts: list[str]) -> str:
    """The path of a tokenizer.json with byte pairs of these texts."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    path = folder / "tokenizer.json"
    inner.save(str(path))
    return str(path)
