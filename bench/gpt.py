"""GPT against nanoGPT: whole training runs in turn, and sampling at GPT-2 124M's shape.

    python -m bench.gpt --reference DIR --text FILE [--rounds 3] [--iters 2000] [--output]

DIR is a clone of karpathy/nanoGPT, which stays untouched: it runs in a copy. FILE is text, such as
tiny Shakespeare; both trainers read the same characters. Each round runs nanoGPT and ours as a user
would, one after the other, with the same settings; times are of the whole command, ratios the
median of the rounds'. Without --reference only ours is measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.bdh_measure import hardware, seconds, table
from config import Config
from model import build_model
from model.generate import Sampling, generate

ROOT = Path(__file__).resolve().parent.parent
PRESET = """\
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
"""
SMALL = "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 "
SMALL += "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
NEW_TOKENS = 64


class Trainer:
    """A command that trains; what it took and the held-out loss it came to."""

    def __init__(self, name: str, folder: Path, script: Path, more: list[str]) -> None:
        self.name, self.folder, self.more = name, folder, [os.fspath(script), "preset.py", *more]
        self.seconds: list[float] = []
        self.losses: list[float] = []
        (folder / "preset.py").write_text(PRESET)

    def run(self) -> None:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *self.more], cwd=self.folder, capture_output=True, text=True
        )
        self.seconds.append(time.perf_counter() - began)
        if done.returncode:
            raise SystemExit(f"{self.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found = re.findall(r"val loss:? ([0-9.]+)", done.stdout, re.IGNORECASE)
        self.losses.append(float(found[-1]))

    def row(self, first: Trainer) -> list[str]:
        ratios = (a / b for a, b in zip(first.seconds, self.seconds, strict=True))
        return [
            self.name,
            f"{statistics.median(self.seconds):.1f}",
            f"{min(self.losses):.3f} to {max(self.losses):.3f}",
            f"{statistics.median(ratios):.2f}",
        ]


def trainers(options: argparse.Namespace, folder: Path) -> list[Trainer]:
    """nanoGPT as it is (float32 on a CPU), ours with its words, and ours in float32 too."""
    iters = [f"--max_iters={options.iters}", f"--lr_decay_iters={options.iters}"]
    words = [*SMALL.split(), *iters]
    found = []
    ours = folder / "ours"
    ours.mkdir()
    prepare = [os.fspath(ROOT / "prepare.py"), os.fspath(options.text.resolve())]
    data = ["data/shakespeare_char", "--tokenizer", "char"]
    subprocess.run([sys.executable, *prepare, *data], cwd=ours, check=True, capture_output=True)
    if options.reference:
        theirs = folder / "nanogpt"
        shutil.copytree(options.reference, theirs, ignore=shutil.ignore_patterns(".git"))
        place = theirs / "data" / "shakespeare_char"
        shutil.copy(options.text, place / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=place, check=True, capture_output=True)
        found.append(Trainer("nanoGPT", theirs, theirs / "train.py", words))
    kinds = {"ours, the same words (bf16)": [], "ours, --dtype=float32": ["--dtype=float32"]}
    script = ROOT / "train.py"
    return found + [Trainer(name, ours, script, words + more) for name, more in kinds.items()]


def training(options: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        runs = trainers(options, Path(name))
        for _ in range(options.rounds):
            for run in runs:
                run.run()
        columns = "trainer", "whole command, s", "held-out loss", f"{runs[0].name} / this"
        yield f"### Training: {options.iters} iterations of 12 x 64 characters, 4 layers of 128"
        yield ""
        yield from table(columns, (run.row(runs[0]) for run in runs))


def load_nanogpt(directory: Path) -> Any:
    """nanoGPT's module `model.py`, from its clone."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", directory / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def reference_model(directory: Path, weights: torch.nn.Module) -> Any:
    """nanoGPT's GPT-2 124M with our weights."""
    module = load_nanogpt(directory)
    model = module.GPT(module.GPTConfig(bias=True, vocab_size=50257, dropout=0.0))
    model.load_state_dict(weights.state_dict(), strict=False)
    return model.eval()


def sampling(options: argparse.Namespace) -> Iterator[str]:
    """Tokens per second after a context of 512, at GPT-2 124M's shape."""
    shape = {"name": "gpt", "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
    config = Config.from_dict(
        {"model": {**shape, "dropout": 0.0, "bias": True}, "training": {"block_size": 1024}}
    )
    torch.manual_seed(0)
    ours: Any = build_model(config).eval()
    prompt = torch.randint(50257, (1, 512))

    def cached() -> None:
        tokens = generate(ours, prompt, Sampling(top_k=200), [torch.Generator()])
        for _ in range(NEW_TOKENS):
            next(tokens)

    ways: dict[str, Callable[[], object]] = {"ours": cached}
    if options.reference:
        theirs = reference_model(options.reference, ours)
        same = torch.allclose(theirs(prompt)[0][:, -1], ours(prompt)[:, -1], atol=1e-3)
        assert same, "the two models differ"
        ways = {"nanoGPT": lambda: theirs.generate(prompt, NEW_TOKENS, top_k=200), **ways}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            with torch.inference_mode():
                spent = seconds(way, torch.device("cpu"))
            if turn:  # the first round warms up
                taken[name].append(spent)
    first = next(iter(taken.values()))
    yield f"### Sampling: {NEW_TOKENS} tokens after 512, GPT-2 124M's shape, float32"
    yield ""
    rows = []
    for name, times in taken.items():
        ratio = statistics.median(a / b for a, b in zip(first, times, strict=True))
        each = statistics.median(times) / NEW_TOKENS
        rows.append([name, f"{each * 1000:.1f}", f"{1 / each:.1f}", f"{ratio:.2f}"])
    yield from table(("model", "ms per token", "tokens/s", f"{next(iter(taken))} / this"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gpt", description=__doc__)
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a clone of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=2000)
    parser.add_argument("--only", choices=("training", "sampling"))
    parser.add_argument("--output", action="store_true", help="write bench/results/gpt-cpu.md")
    options = parser.parse_args()
    device = torch.device("cpu")
    date = datetime.date.today().isoformat()
    lines = [
        f"## GPT against nanoGPT, {date}",
        "",
        f"{hardware(device)}, torch {torch.__version__}",
    ]
    for part in (training, sampling):
        if options.only in (None, part.__name__):
            for line in ("", *part(options)):
                lines.append(line)
                print(line, flush=True)
    if options.output:
        (ROOT / "bench" / "results" / "gpt-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
