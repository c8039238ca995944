"""Times `runs.py list` over many long runs, as a process, with all files in the page cache.

    python -m bench.runs [--runs 1000] [--records 10000] [--rounds 5] [--folder DIR]

The limit is 2 s for 1,000 runs of 10,000 records. Each run has its own config, learning rate,
environment and checkpoints. Their metrics.jsonl are hard links to one file, in which each tenth
record is an evaluation of 50 batches. `older` runs have no checksums, no copy of the config and no
best loss, so YAML and whole files are read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from config import Config
from engine.run_directory.environment_file import config_copy, environment_text
from engine.run_directory.metrics_file import metrics_line

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "list": [],
    "list --sort --filter": ["--sort", "best_loss", "--filter", "learning_rate>1e-4"],
    "list --json": ["--json"],
}


def write_metrics(path: Path, records: int, older: bool) -> None:
    """Writes one metrics.jsonl."""
    draw, best = random.Random(0), 9.0
    with path.open("wb") as file:
        for number in range(1, records + 1):
            record: dict[str, Any] = {
                "step": number * 10,
                "time": number * 0.512345,
                "tokens": number * 40960,
            }
            loss = 1.5 + 4 / number**0.5 + draw.gauss(0, 0.05)
            best = min(best, loss)
            if number % 10:
                record |= {
                    "train/loss": loss,
                    "train/learning_rate": 1e-3 * (1 - number / records),
                    "train/grad_norm": 1 + draw.random(),
                    "train/tokens_per_sec": 79000 + draw.gauss(0, 500),
                    "train/iter_time_ms": 51.2,
                    "train/mfu": None,
                    "train/memory_bytes": 1_900_000_000,
                    "train/data_wait": 0.0123,
                }
            else:
                record |= {
                    "eval/train_loss": loss,
                    "eval/val_loss": loss,
                    "eval/bits_per_byte": loss * 1.44,
                }
                record |= (
                    {}
                    if older
                    else {
                        "eval/best_loss": best,
                        "eval/best_step": number * 10,
                        "eval/val_losses": [loss + draw.gauss(0, 0.1) for _ in range(50)],
                        "eval/rows": "0123456789ab",
                        "eval/seconds": 1.5,
                    }
                )
            file.write(json.dumps(record).encode() + b"\n" if older else metrics_line(record))


def write_runs(folder: Path, runs: int, records: int, older: bool) -> None:
    """Writes run directories into `folder`/checkpoints."""
    metrics = folder / "metrics.jsonl"
    write_metrics(metrics, records, older)
    for number in range(runs):
        rates = {"learning_rate": 1e-5 * (number + 1), "seed": number % 7}
        config = Config.from_dict({"training": rates, "model": {"n_layer": 2 + number % 5}})
        run = folder / "checkpoints" / f"run_20251108_{number:06}"
        run.mkdir(parents=True)
        os.link(metrics, run / "metrics.jsonl")
        text = config.to_yaml()
        (run / "config.yaml").write_text(text)
        environment: dict[str, Any] = {"command": ["train.py"], "torch": "2.6.0", "resumed": []}
        if not older:
            environment |= {
                "run": {"parameters": 25_300_000, "tokens_per_step": 4096, "planned_steps": 100000},
                "config": config_copy(config, text, None),
                "metrics_bytes": metrics.stat().st_size,
                "ended": {"state": "done", "reason": "", "step": records * 10, "time": ""},
            }
        written = json.dumps(environment, indent=2) if older else environment_text(environment)
        (run / "environment.json").write_text(written)
        (run / ".lock").write_text("host elsewhere pid 1 since 14:30 (2025-11-08)\n")
        for step in (99000, 99500, 100000):
            (run / f"checkpoint_{step}.json").write_text("{}")
            (run / f"checkpoint_{step}.pt").touch()


def seconds(folder: Path, words: list[str]) -> float:
    """Returns the wall seconds of `runs.py list`."""
    command = [sys.executable, os.fspath(ROOT / "runs.py"), "list", *words]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") > 1, done.stderr
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    print(f"{options.runs:,} runs of {options.records:,} records, load {os.getloadavg()[0]:.1f}")
    print(f"{'':28}  median s  minimum s")
    for older in (False, True):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            write_runs(folder, options.runs, options.records, older)
            for name, words in COMMANDS.items():
                times = [seconds(folder, words) for _ in range(1 if older else options.rounds)]
                title = f"{name}{', older' if older else ''}"
                print(f"{title:28}  {statistics.median(times):8.2f}  {min(times):9.2f}")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
