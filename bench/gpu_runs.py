"""The parts of `bench.gpu` that run what a user would: train.py, `--check-resume`, the tests."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import train
from bench.gpu_parts import Bench, failed
from bench.gpu_report import Row
from config import command_line

MODELS = {
    "bdh": "name: bdh, mlp_internal_dim_multiplier: 16",
    "gpt": "name: gpt",
    "llama": "name: llama",
}
CONFIG = """
model: {{{model}, n_layer: 2, n_embd: 128, n_head: 4}}
training: {{block_size: 128, batch_size: 8, max_iters: 20, learning_rate: 3e-3, log_freq: 10,
  test_freq: 20, eval_iters: 2, checkpoint_freq: 10, checkpoint_dir: "{folder}/runs"}}
dataset: {{parquet_dir: "{folder}/python-stdlib"}}  # built by the first run
low_precision: {{use_4bit: false}}
system: {{device: {device}}}
"""
RUNS = {
    "bdh, eager": ("bdh", "compile=false"),
    "bdh, compiled": ("bdh", "compile=true"),
    "bdh, fp8": ("bdh", "use_fp8=true"),
    "gpt, compiled": ("gpt", "compile=true"),
    "gpt, fp8": ("gpt", "use_fp8=true"),
    "llama, compiled": ("llama", "compile=true"),
    "bdh, documents": ("bdh", "mask=causal_document"),
    "gpt, documents": ("gpt", "mask=causal_document"),
    "bdh, graphs": ("bdh", "compile=graphs"),
    "gpt, graphs": ("gpt", "compile=graphs"),
}
RESUMED = "training.resume_from_checkpoint=auto"


def smoke(bench: Bench) -> Iterator[Row]:
    """Runs of 20 steps, and the first of them for 5 more."""
    kinds = {"bdh, eager": RUNS["bdh, eager"]} if bench.tiny else RUNS
    with tempfile.TemporaryDirectory() as folder:
        for what, (model, *words) in kinds.items():
            own = [*words, f"checkpoint_dir={folder}/{what.replace(', ', '-')}"]
            yield trained(bench, Path(folder), what, model, own, "loss")
            if what == "bdh, eager":
                more = [*own, "max_iters=25", RESUMED]
                yield trained(bench, Path(folder), f"{what}, resumed", model, more, "loss")


def resume(bench: Bench) -> Iterator[Row]:
    """BDH must be equal bit for bit. GPT need not: attention's backward pass adds atomically."""
    with tempfile.TemporaryDirectory() as folder:
        for model in ("bdh",) if bench.tiny else ("bdh", "gpt"):
            yield trained(bench, Path(folder), model, model, ["--check-resume", "6"])


def trained(
    bench: Bench, folder: Path, what: str, model: str, words: list[str], telling: str = ""
) -> Row:
    """Runs train.py in this process; the row has its exit code, if it is not 0, and the last line
    it printed that has the word `telling`, if there is one."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(model=MODELS[model], folder=folder, device=bench.device))
    said, began = io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = train.main(command_line([os.fspath(config), *words]))
    except (Exception, SystemExit) as error:
        return failed(what, error)
    finally:
        print(f"---- {what}\n{said.getvalue()}", file=sys.stderr)
    lines = [line.strip() for line in said.getvalue().splitlines() if line.strip(" -=")]
    last = [line for line in lines if code == 0 and telling in line] or lines
    ended = "" if code == 0 else f"exit code {code}: "
    return Row(what, [time.monotonic() - began], "s", note=ended + last[-1][:150])


def tests(bench: Bench) -> Iterator[Row]:
    """The tests of a GPU, the quick ones first; tiny: some of them, on a CPU."""
    if bench.tiny:
        yield from pytest_rows(bench, "gpu and not slow", "-k", "attention")
        return
    for marks in ("gpu and not slow", "gpu and slow"):
        yield from pytest_rows(bench, marks, "--maxfail=12")


def pytest_rows(bench: Bench, marks: str, *words: str) -> Iterator[Row]:
    """A row for each test that fails, at once, and one for all."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-vv", "-m", marks, *words]
    command += ["-p", "no:cacheprovider", "--tb=short", "--timeout=60"]
    command += ["-o", "filterwarnings=default"]
    environment = os.environ | {"GPU_TESTS_DEVICE": bench.device.type}
    began, last = time.monotonic(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip(" =\n") or last
            name, _, result = line.partition(" ")
            if result.startswith(("FAILED", "ERROR")):
                yield Row(name, note=result.split()[0].lower())
    seconds = time.monotonic() - began
    yield Row(
        f"pytest -m '{marks}'", [seconds], "s", note=f"exit code {process.returncode}: {last}"
    )


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "smoke": smoke,
    "tests": tests,
    "resume": resume,
}
