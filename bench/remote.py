"""Speed of remote text against the same files on disk: of the loader alone, and under training.

    python bench/remote.py            # about five minutes, needs 1 GB in the temporary folder

A web server on this machine, in a process of its own, waits 0 or 50 ms before each answer. Nothing
is kept on disk (cache_bytes: 0), so every range comes from the server. Local and remote runs
alternate, one warm-up each, and the medians of the ratios of neighbours are printed; times are from
after the first batch. `training` takes 1 million tokens per second, as a GPU would; `loader` takes
batches as fast as they come. Server and loader share the cores, which a real server does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

if TYPE_CHECKING:
    import data

ROOT = Path(__file__).resolve().parent.parent
TEXT_BYTES, FILES = 192 << 20, 4
GROUP_BYTES = (128 << 10, 1 << 20, 4 << 20, 32 << 20)
LATENCIES_S = (0.0, 0.05)
T, ROWS, SEED = 512, 16, 1337
TRAINING_TOKENS_PER_S = 1e6
TRAINING_S = 6.0
PAIRS = 5
TARGET, FIRST_TARGET_S = 0.8, 2.0


class Handler(SimpleHTTPRequestHandler):
    """Files with ranges and ETags, each after a pause."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    latency_s = 0.0

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:  # noqa: N802
        time.sleep(self.latency_s)
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if not path.is_file() or not wanted:
            super().do_GET()
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            last = min(last, size - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            while first <= last:
                first += os.sendfile(
                    self.connection.fileno(), file.fileno(), first, last + 1 - first
                )

    def do_HEAD(self) -> None:  # noqa: N802
        time.sleep(self.latency_s)
        super().do_HEAD()


def serve(folder: str, latency_s: float) -> None:
    """Serves a folder on a free port, which is printed, until the process is killed."""
    Handler.latency_s = latency_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def server(folder: Path, latency_s: float) -> Iterator[str]:
    """The address of a folder on a server in a process of its own."""
    command = [sys.executable, __file__, "serve", str(folder), str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


def write_text(folder: Path, group_bytes: int) -> None:
    """Documents of 2 KB of words with the frequencies of a language."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 11, 20_000)
    words = np.array([bytes(draw.integers(97, 123, n, dtype=np.uint8)).decode() for n in lengths])
    ranks = 1.0 / np.arange(1, len(words) + 1)
    folder.mkdir()
    for file in range(FILES):
        text = " ".join(draw.choice(words, TEXT_BYTES // FILES // 7, p=ranks / ranks.sum()))
        documents = [text[at : at + 2048] for at in range(0, len(text), 2048)]
        pq.write_table(
            pa.table({"text": documents}),
            folder / f"part_{file}.parquet",
            row_group_size=group_bytes // 2048,
            compression="zstd",
            write_page_checksum=True,
            write_statistics=False,
        )


def open_text(place: str) -> data.Dataset:
    """The text of a folder or an address."""
    import data
    from config import DatasetConfig, TokenizerConfig

    config = DatasetConfig(parquet_dir=place, test_fraction=0.0, cache_bytes=0)
    return data.open_dataset(config, TokenizerConfig())


def tokens_per_s(dataset: data.Dataset, training: bool) -> float:
    """Tokens per second after the first batch."""
    import data
    from config import DataLoaderConfig

    spec = data.BatchSpec(block_size=T, sequences_per_step=ROWS, micro_batches=1, seed=SEED)
    step_tokens = ROWS * T
    steps = int(TRAINING_S * TRAINING_TOKENS_PER_S if training else TEXT_BYTES) // step_tokens
    with data.TrainLoader(dataset, spec, DataLoaderConfig()) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            step_began = time.perf_counter()
            next(batches)
            if training:
                spent = time.perf_counter() - step_began
                time.sleep(max(0.0, step_tokens / TRAINING_TOKENS_PER_S - spent))
        return steps * step_tokens / (time.perf_counter() - began)


def first_batch_s(place: str) -> float:
    """Seconds from the config to the first batch, after the imports of torch and pyarrow."""
    import data
    from config import DataLoaderConfig

    began = time.perf_counter()
    spec = data.BatchSpec(block_size=T, sequences_per_step=ROWS, micro_batches=1, seed=SEED)
    with data.TrainLoader(open_text(place), spec, DataLoaderConfig()) as batches:
        next(batches)
        return time.perf_counter() - began


def compare(folder: Path, latency_s: float) -> None:
    """Prints the rows of one folder at one latency."""
    with server(folder, latency_s) as url:
        local, remote = open_text(str(folder)), open_text(url)
        for training in (False, True):
            pairs = [
                (tokens_per_s(local, training), tokens_per_s(remote, training))
                for _ in range(PAIRS + 1)
            ][1:]
            figures = np.array(pairs)
            ratio = float(np.median(figures[:, 1] / figures[:, 0]))
            print(
                f"{folder.name:>8} {latency_s * 1000:6.0f} ms  {'training' if training else 'loader':9}"
                f"{np.median(figures[:, 0]) / 1e6:9.1f}{np.median(figures[:, 1]) / 1e6:9.1f}"
                f"{ratio:8.2f}  {'' if ratio >= TARGET else f'below {TARGET}'}",
                flush=True,
            )
        command = [sys.executable, __file__, "first", url]
        found = [json.loads(subprocess.check_output(command)) for _ in range(3)]
        seconds = float(np.median(found))
        missed = "" if seconds <= FIRST_TARGET_S else "MISSED"
        print(f"{folder.name:>8} {latency_s * 1000:6.0f} ms  first batch {seconds:.2f} s  {missed}")


def main() -> None:
    """Makes the data and prints the table."""
    print(f"{'group':>8} {'latency':>9}  {'':9}{'local':>9}{'remote':>9}{'ratio':>8}  (Mtok/s)")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"XDG_CACHE_HOME": scratch, "PYTHONPATH": str(ROOT)}
        for group_bytes in GROUP_BYTES:
            folder = Path(scratch, f"{group_bytes >> 10} KB")
            write_text(folder, group_bytes)
            for latency_s in LATENCIES_S:
                compare(folder, latency_s)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], float(sys.argv[3]))
    elif sys.argv[1:2] == ["first"]:
        print(first_batch_s(sys.argv[2]))
    else:
        main()
