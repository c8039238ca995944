"""Small parquet folders for the tests of `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import data
from config import DatasetConfig, TokenizerConfig
from data.parquet import UnitReader


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


def opened(folder: Path, **options: Any) -> data.Dataset:
    """The dataset of a folder; without a test split unless asked for."""
    options = {"test_fraction": 0.0, **options}
    config = DatasetConfig(parquet_dir=str(folder), **options)
    return data.open_dataset(config, TokenizerConfig())


def reader(dataset: data.Dataset) -> UnitReader:
    """Reads the units of a dataset."""
    return UnitReader(dataset.index, dataset.units, dataset.config)
