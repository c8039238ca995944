"""Parquet folders on a test server, with the same folder on disk beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from config import DatasetConfig
from data.remote.listing import list_files
from data.remote.store import RemoteStore
from data.sources.parquet_dataset import ParquetDataset, open_parquet
from data.tokenizers.simple import ByteTokenizer
from tests.data.parquet_folder import opened
from tests.remote_servers import WebServer


def uploaded(server: WebServer, folder: Path, **options: Any) -> ParquetDataset:
    """The dataset of a folder's files as the server has them; without a test split."""
    for path in folder.rglob("*.parquet"):
        server.files[f"text/{path.relative_to(folder)}"] = path.read_bytes()
    return served(f"{server.url}/text", folder, **options)


def served(url: str, folder: Path, **options: Any) -> ParquetDataset:
    """The dataset of files that a server has, with the footers of those of a folder."""
    index, listing = opened(folder).index, list_files(RemoteStore(5.0), url, (".parquet",))
    tags = tuple(file.tag for file in listing.files)
    config = DatasetConfig(parquet_dir=url, **{"test_fraction": 0.0, **options})
    return open_parquet(
        dataclasses.replace(index, root=listing.root, tags=tags), config, ByteTokenizer()
    )
