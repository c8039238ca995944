"""All GPU measurements in one call of at most ten minutes, the most important ones first.

    bash bench/gpu.sh                       # writes bench/results/gpu-<device>.md
    bash bench/gpu.sh --plan                # says what it would do
    bash bench/gpu.sh --tiny                # tries itself on a CPU: tiny sizes, no measurement
    bash bench/gpu.sh --only ceilings,bdh --reference DIR --nanogpt DIR

This process never imports torch. Each part runs in a process group of its own, which is killed at
the part's limit, and hands over a row at a time; so a part that hangs or breaks costs its own rows
only. A part is left out when less time remains than it needs to measure anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.gpu_report import Report, Row, device_state, nvidia_smi

STARTED = time.monotonic()
RESULTS = Path(__file__).resolve().parent / "results"
TINY_BUDGET_S, TINY_LEAST_S = 115, 5


class Part(NamedTuple):
    """A part of the measurement: a function of bench/gpu_parts.py."""

    name: str
    limit_s: int
    least_s: int
    """With less time it would not get to a row."""
    title: str


PARTS = (
    Part("ceilings", 25, 15, "rates of copies, matmuls, launches: what shares are of"),
    Part("smoke", 70, 25, "train.py on small models, as a user would"),
    Part("tests", 110, 30, "pytest -m gpu"),
    Part("bdh", 110, 60, "BDH 25M against the reference: errors, then steps"),
    Part("kernels", 50, 20, "BDH 25M by kernels, a profile, and sizes of its plan"),
    Part("transformers", 120, 45, "GPT-2 124M and Llama 1B, against nanoGPT"),
    Part("precision", 95, 40, "steps with the optimizer in each number format"),
    Part("memory", 25, 10, "peak of a step; predicted: what the start of a run says"),
    Part("long", 40, 20, "BDH 25M on contexts of 8,192 tokens"),
    Part("resume", 30, 15, "train.py --check-resume"),
    Part("generate", 25, 10, "a new token, one sequence"),
)


class Step(NamedTuple):
    """A part and its time; limit_s 0: it is left out for this reason."""

    part: Part
    limit_s: float
    reason: str = ""


def steps(options: argparse.Namespace, planned: bool) -> Iterator[Step]:
    """Yields all parts, each with the time it may take as it is now; planned: as if each part
    before took its whole limit."""
    spent, began = 0.0, time.monotonic()
    names = options.only.split(",") if options.only else [part.name for part in PARTS]
    for part in PARTS:
        left = options.budget - (spent if planned else time.monotonic() - began)
        limit = min(part.limit_s, left)
        if part.name not in names:
            continue
        least = TINY_LEAST_S if options.tiny else part.least_s
        if limit < least:
            yield Step(part, 0, f"{max(0, left):.0f} s are left, and it needs {least}")
        else:
            spent += limit
            yield Step(part, limit)


def plan(options: argparse.Namespace) -> None:
    """Prints what a call would do, at its slowest."""
    began = 0.0
    print(f"On {' '.join(nvidia_smi('name')) or 'a CPU'}, {options.budget} s in all:")
    for part, limit, reason in steps(options, planned=True):
        when = f"from {began:3.0f} s, at most {limit:3.0f} s" if limit else f"left out: {reason}"
        print(f"  {part.name:13} {when}: {part.title}")
        began += limit
    for flag in ("reference", "nanogpt"):
        where = getattr(options, flag)
        print(f"  --{flag}: {where or 'not given, so that its rows are left out'}")


def run(part: Part, limit_s: float, report: Report, words: list[str]) -> None:
    """Runs a part in a process group of its own, at most so long, and writes its rows."""
    command = [sys.executable, "-m", "bench.gpu", *words]
    command += ["--part", part.name, "--limit", f"{limit_s:.0f}"]
    began, before = time.monotonic(), device_state()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=report.log, text=True, start_new_session=True
    ) as process:
        timer = threading.Timer(limit_s, kill, [process.pid])
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            if "facts" in found:
                report.head(found["facts"], "".join(f" {word}" for word in words))
                report.part(part.name, part.title, before)
            else:
                report.row(part.name, Row(**found))
        code = process.wait()
        timer.cancel()
        kill(process.pid)  # what it left, such as compilers
    ends = {0: "", -signal.SIGKILL: " **Killed at its limit.**"}
    told = ends.get(code, f" **{part.name} ended with code {code}: see {report.log.name}.**")
    report.write("", f"After {time.monotonic() - began:.0f} s: {device_state()}.{told}")


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="bench/results/")
    parser.add_argument("--budget", type=int, metavar="S", help="seconds in all: 570")
    parser.add_argument("--only", metavar="PARTS", help="parts, with commas between them")
    parser.add_argument("--plan", action="store_true", help="print what would be done")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: tries the bench itself")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a clone of pathwaycom/bdh")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a clone of karpathy/nanoGPT")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # how a part is started
    parser.add_argument("--limit", type=float, default=600, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.started = STARTED
    options.budget = options.budget or (TINY_BUDGET_S if options.tiny else 570)
    unknown = set((options.only or "ceilings").split(",")) - {part.name for part in PARTS}
    if unknown:
        parser.error(
            f"--only: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PARTS)}"
        )
    return options


def main() -> None:
    options = arguments()
    if options.part:
        from bench.gpu_parts import run_part

        run_part(options.part, options)
        return
    if options.plan:
        plan(options)
        return
    name = "-".join(nvidia_smi("name")).lower().removeprefix("nvidia ").replace(" ", "-") or "cpu"
    with contextlib.closing(Report(options.out, name + "-tiny" * options.tiny)) as report:
        for part, limit_s, reason in steps(options, planned=False):
            if limit_s:
                run(part, limit_s, report, sys.argv[1:])
            else:
                report.write("", f"## {part.name}: left out, {reason}")


if __name__ == "__main__":
    main()
