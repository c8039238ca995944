"""Speed, start, resume and memory of the data loader against the promises, on 500 MB of text.

    python bench/loader.py            # about two minutes, needs 300 MB in the temporary folder

Every row runs in a process of its own, on one core, and is measured from after the imports of torch
and pyarrow. CPU-seconds count all threads, so a busy machine changes them little.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
FILES, GROUPS, DOCUMENTS = 10, 16, 1024
T, SEED = 512, 1337
ROWS: list[tuple[str, str, str, str, float, int]] = [
    # title, case, unit, better, target, lanes (= sequences per step)
    ("throughput, no document ids", "tokens", "Mtok/CPU-s", ">=", 250, 8),
    ("throughput, document ids", "ids", "Mtok/CPU-s", ">=", 100, 8),
    ("first batch, index cached", "first", "s", "<=", 0.1, 8),
    ("resume at 90 % of the data", "resume", "s", "<=", 0.2, 8),
    ("peak memory above imports", "memory", "MB", "<=", 100, 16),
    ("index of 10,000 files", "index", "s", "<=", 0.5, 8),
    ("the same, cached", "cached", "s", "<=", 0.15, 8),
]


def write_text(folder: Path) -> None:
    """500 MB of words with the frequencies of a language, 3.2 MB to a row group."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 11, 20_000)
    words = np.array([bytes(draw.integers(97, 123, n, dtype=np.uint8)).decode() for n in lengths])
    ranks = 1.0 / np.arange(1, len(words) + 1)
    for file in range(FILES):
        counts = draw.integers(150, 750, GROUPS * DOCUMENTS)  # words of a document
        picked = np.split(
            draw.choice(words, size=counts.sum(), p=ranks / ranks.sum()), np.cumsum(counts)[:-1]
        )
        pq.write_table(
            pa.table({"text": [" ".join(document) for document in picked]}),
            folder / f"part_{file:02d}.parquet",
            row_group_size=DOCUMENTS,
            compression="zstd",
            write_page_checksum=True,
        )


def write_many(folder: Path) -> None:
    """10,000 small files of four row groups."""
    first = folder / "0.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 40}), first, row_group_size=10)
    for number in range(1, 10_000):
        shutil.copy(first, folder / f"{number}.parquet")


def measure(case: str, folder: str, lanes: int) -> float:
    """One figure, in this process."""
    import data
    from config import DataLoaderConfig, DatasetConfig, TokenizerConfig
    from data.loading.packing import document_ids

    config = DatasetConfig(parquet_dir=folder, test_fraction=0.0)
    start = time.perf_counter()
    dataset = data.open_dataset(config, TokenizerConfig())
    if case in ("index", "cached"):
        return time.perf_counter() - start
    spec = data.BatchSpec(block_size=T, sequences_per_step=lanes, micro_batches=1, seed=SEED)
    steps = dataset.stats.tokens // (lanes * T)

    def first(data_state: dict[str, object] | None = None) -> data.StepBatch:
        with data.TrainLoader(dataset, spec, DataLoaderConfig(), data_state) as batches:
            return next(batches)

    if case == "first":
        first()
        return time.perf_counter() - start
    with data.TrainLoader(dataset, spec, DataLoaderConfig()) as batches:
        next(batches)
        cpu = time.process_time()
        for step in range(steps):
            batch = next(batches)
            if case == "ids":
                document_ids(batch.micro_batches[0][:, :-1], 0)
            if case == "resume" and step == steps * 9 // 10:
                break
        cpu = time.process_time() - cpu
    if case == "resume":
        start = time.perf_counter()
        first(batch.data_state())
        return time.perf_counter() - start
    return steps * lanes * T / cpu / 1e6


def peak_bytes() -> int:
    """The most memory this process has had (getrusage would count the parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run_case(case: str, folder: str, lanes: int) -> float:
    """`measure`, and the memory it took beyond the imports."""
    before = peak_bytes()
    figure = measure(case, folder, lanes)
    return (peak_bytes() - before) / 1e6 if case == "memory" else figure


def main() -> None:
    """Make the data, run every row in a fresh process, print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folders: dict[str, Callable[[Path], None]] = {"text": write_text, "many": write_many}
        for name, write in folders.items():
            Path(scratch, name).mkdir()
            write(Path(scratch, name))
        environment = os.environ | {"XDG_CACHE_HOME": scratch, "PYTHONPATH": str(ROOT)}
        core = {min(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else None
        print(f"{'':32}{'target':>20}{'measured':>12}")
        for title, case, unit, better, target, lanes in ROWS:
            folder = Path(scratch, "many" if case in ("index", "cached") else "text")
            command = [sys.executable, __file__, case, str(folder), str(lanes)]
            runs = []
            for _ in range(3):
                if case == "index":
                    shutil.rmtree(Path(scratch, "hatchery"), ignore_errors=True)
                if core:
                    os.sched_setaffinity(0, core)
                result = subprocess.run(command, env=environment, capture_output=True, check=True)
                runs.append(json.loads(result.stdout))
            figure = float(np.median(runs))
            met = figure >= target if better == ">=" else figure <= target
            goal = f"{better} {target:g} {unit}"
            print(f"{title:32}{goal:>20}{figure:12.3g}  {'' if met else 'MISSED'}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        print(json.dumps(run_case(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        main()
