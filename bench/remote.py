"""Speed of remote text against the same files on disk: of the loader alone, and under training.

    python bench/remote.py            # about eight minutes, needs 700 MB in the temporary folder

A web server on this machine, in a process of its own, waits 0 or 50 ms before each answer. Nothing
is kept on disk (cache_bytes: 0), except of row groups above 8 MB, whose parts are decoded again and
again. Local and remote runs alternate, the first pair is a warm-up, and the medians of the ratios
are printed; times are from after the first batch. `loader` takes batches as fast as they come,
`training` one million tokens per second. Server and loader share the cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
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
TEXT_BYTES, FILES, DOCUMENT_BYTES = 192 << 20, 4, 2048
GROUP_BYTES = (128 << 10, 1 << 20, 4 << 20, 24 << 20)
LATENCIES_S = (0.0, 0.05)
T, ROWS, SEED = 512, 16, 1337
TRAINING_TOKENS_PER_S, TRAINING_S = 1e6, 4.0
PAIRS = 5


class Handler(SimpleHTTPRequestHandler):
    """Files in ranges, each after a pause."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    latency_s = 0.0

    def do_GET(self) -> None:  # noqa: N802
        time.sleep(self.latency_s)
        wanted = self.headers.get("Range")
        if not wanted:
            super().do_GET()
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            self.send_response(206)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            while first <= last:
                count = last + 1 - first
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, count)


def serve(folder: str, latency_s: float) -> None:
    """Serves a folder on a free port, which is printed, until the process is killed."""
    Handler.latency_s = latency_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    print(server.server_address[1], flush=True)
    server.serve_forever()


def write_text(folder: Path, group_bytes: int) -> None:
    """Documents of words with the frequencies of a language."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 11, 20_000)
    words = np.array([bytes(draw.integers(97, 123, n, dtype=np.uint8)).decode() for n in lengths])
    ranks = 1.0 / np.arange(1, len(words) + 1)
    folder.mkdir()
    for file in range(FILES):
        text = " ".join(draw.choice(words, TEXT_BYTES // FILES // 7, p=ranks / ranks.sum()))
        starts = range(0, len(text), DOCUMENT_BYTES)
        pq.write_table(
            pa.table({"text": [text[start : start + DOCUMENT_BYTES] for start in starts]}),
            folder / f"part_{file}.parquet",
            row_group_size=group_bytes // DOCUMENT_BYTES,
            compression="zstd",
            write_page_checksum=True,
            write_statistics=False,
        )


def open_loader(place: str, cache_bytes: int = 0) -> data.TrainLoader:
    """A loader of the text of a folder or an address."""
    import data
    from config import DataLoaderConfig, DatasetConfig, TokenizerConfig

    config = DatasetConfig(parquet_dir=place, test_fraction=0.0, cache_bytes=cache_bytes)
    dataset = data.open_dataset(config, TokenizerConfig())
    spec = data.BatchSpec(block_size=T, sequences_per_step=ROWS, micro_batches=1, seed=SEED)
    return data.TrainLoader(dataset, spec, DataLoaderConfig())


def first_batch_s(place: str) -> float:
    """Seconds from the config to the first batch, after the imports of torch and pyarrow."""
    began = time.perf_counter()
    with open_loader(place) as batches:
        next(batches)
        return time.perf_counter() - began


def tokens_per_s(place: str, cache_bytes: int, training: bool) -> float:
    """Tokens per second after the first batch; of the loader alone over one epoch."""
    steps = int(TRAINING_S * TRAINING_TOKENS_PER_S if training else TEXT_BYTES) // (ROWS * T)
    with open_loader(place, cache_bytes) as batches:
        next(batches)
        began = time.perf_counter()
        for step in range(steps):
            next(batches)
            if training:
                end = began + (step + 1) * ROWS * T / TRAINING_TOKENS_PER_S
                time.sleep(max(0.0, end - time.perf_counter()))
        return steps * ROWS * T / (time.perf_counter() - began)


def compare(folder: Path, url: str, title: str, cache_bytes: int) -> None:
    """Prints the rows of one folder at one latency."""
    for training in (False, True):
        measure = partial(tokens_per_s, cache_bytes=cache_bytes, training=training)
        pairs = np.array([(measure(str(folder)), measure(url)) for _ in range(PAIRS + 1)][1:])
        local, remote, ratio = np.median((*pairs.T, pairs[:, 1] / pairs[:, 0]), axis=1)
        name = "training" if training else "loader"
        print(f"{title} {name:12}{local / 1e6:8.2f}{remote / 1e6:8.2f}{ratio:8.2f}", flush=True)
    command = [sys.executable, __file__, "first", url]  # the index is cached by now
    seconds = np.median([json.loads(subprocess.check_output(command)) for _ in range(3)])
    print(f"{title} first batch {seconds:.2f} s", flush=True)


def main() -> None:
    """Makes the data and prints the table: Mtok/s of local and remote text, and their ratio."""
    print(f"row group {'latency':>9} {'':12}{'local':>8}{'remote':>8}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"XDG_CACHE_HOME": scratch, "PYTHONPATH": str(ROOT)}
        for group_bytes in GROUP_BYTES:
            folder = Path(scratch, f"groups_of_{group_bytes}")
            write_text(folder, group_bytes)
            for latency_s in LATENCIES_S:
                command = [sys.executable, __file__, "serve", str(folder), str(latency_s)]
                # A reader that closes breaks its connections, which the server would tell of.
                with subprocess.Popen(
                    command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                ) as server:
                    assert server.stdout is not None
                    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
                    title = f"{group_bytes >> 10:6} KB {latency_s * 1000:6.0f} ms"
                    compare(folder, url, title, 1 << 32 if group_bytes > 8 << 20 else 0)
                    server.kill()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], float(sys.argv[3]))
    elif sys.argv[1:2] == ["first"]:
        print(first_batch_s(sys.argv[2]))
    else:
        main()
