"""What the tests of loading share: chunks that end often, and a small corpus of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.loading import load_plan
from tests.data.batches import G, T
from tests.data.parquet_folder import marked
from tests.data.token_files import ids, put


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight steps of bytes or two of larger tokens to a chunk, so that chunks end often."""
    monkeypatch.setattr(load_plan, "CHUNK_BYTES", 8 * G * (T + 1))


@pytest.fixture(scope="session")
def parquet_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents that are all different, in three files."""
    folder = tmp_path_factory.mktemp("marked")
    marked(folder)
    return folder


@pytest.fixture(scope="session")
def token_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,321 tokens, each once, in three files."""
    folder = tmp_path_factory.mktemp("tokens")
    for name, first, last in (("a", 0, 2500), ("b", 2500, 2530), ("c", 2530, 4321)):
        put(folder / f"{name}.bin", ids(last - first, first))
    return folder
