"""What several test files share: one thread, a small text corpus, a run that takes a second."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.remote_servers import gcs_server as gcs_server
from tests.remote_servers import hub_server as hub_server
from tests.remote_servers import s3_process as s3_process
from tests.remote_servers import s3_server as s3_server
from tests.remote_servers import web_server as web_server

# Before torch is imported, and inherited by processes that tests start. Tensors in tests are small:
# more threads only wait for each other, and `make test` has a process for each core.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

ROOT = Path(__file__).resolve().parent.parent

TEXT = "the dragon egg hatches when warm and its wings grow with every neuron that fires"


def pytest_collection_finish() -> None:
    if "torch" in sys.modules:  # tests of the config run without it
        from data.loading import load_plan
        from model.compiled import separate_caches_by_cpu

        separate_caches_by_cpu()
        # The loader reads 256 kB ahead: thousands of steps of a tiny run, which would cost more
        # than its training. How much it reads ahead changes nothing (tests/data/test_loader.py).
        load_plan.CHUNK_BYTES = 1 << 13


def write_corpus(folder: Path, documents: int = 240, seed: int = 0) -> Path:
    """Three parquet files of short, learnable text."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(TEXT.split(), k=draw.randint(5, 60))) for _ in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(3):
        table = pa.table({"text": texts[part::3]})
        pq.write_table(
            table, folder / f"part_{part}.parquet", row_group_size=20, write_page_checksum=True
        )
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(autouse=True)
def cache_apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(folder))


TINY = """
model: {n_layer: 2, n_embd: 16, n_head: 2, mlp_internal_dim_multiplier: 4}
training:
  block_size: 32
  batch_size: 4
  max_iters: 30
  learning_rate: 3e-3
  log_freq: 5
  test_freq: 10
  eval_iters: 2
  checkpoint_freq: 10
low_precision: {use_4bit: false}
system: {device: cpu}
"""


@pytest.fixture
def tiny(corpus_dir: Path, tmp_path: Path) -> list[str]:
    """The config file of a run of 30 steps that takes about a second; add `checkpoint_dir=...`."""
    config = tmp_path / "tiny.yaml"
    config.write_text(f"{TINY}dataset:\n  parquet_dir: {corpus_dir}\n")
    return [os.fspath(config)]
