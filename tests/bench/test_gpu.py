"""The GPU measurements try themselves on a CPU: files, plan, limits, shares."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from itertools import accumulate
from pathlib import Path

import pytest

from bench.gpu import PARTS, Part, run
from bench.gpu_report import Report, Row, cells
from tests.conftest import ROOT


def bash(*words: str) -> str:
    command = ["bash", os.fspath(ROOT / "bench/gpu.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tiny_bench_writes_a_page_its_rows_and_a_log(tmp_path: Path) -> None:
    bash("--tiny", "--only", "precision", "--out", os.fspath(tmp_path))
    (page,) = tmp_path.glob("gpu-*-tiny.md")
    text, lines = page.read_text(), page.with_suffix(".jsonl").read_text().splitlines()
    assert "## precision" in text and "torch " in text
    assert f"cp {page.name} bench/results/" in text
    assert "ended with code" not in text and "Killed" not in text and "failed" not in text
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 4
    for row in rows:
        assert f"| {row['what']} |" in text and len(row["values"]) >= 1
    assert page.with_suffix(".log").exists() and len(list(tmp_path.iterdir())) == 3


def test_the_plan_says_what_there_is_no_time_for() -> None:
    lines = bash("--plan", "--budget", "95").splitlines()
    assert [line.split()[0] for line in lines[1 : len(PARTS) + 1]] == [p.name for p in PARTS]
    first, second, last = PARTS[0], PARTS[1], PARTS[-1]
    assert f"{first.name:13} from   0 s, at most {first.limit_s:3} s" in lines[1]
    assert f"{second.name:13} from {first.limit_s:3} s" in lines[2]
    assert f"left out: 0 s are left, and it needs {last.least_s}" in lines[len(PARTS)]
    assert "--nanogpt: not given" in lines[-1]


def test_the_most_important_parts_fit_into_ten_minutes_at_their_slowest() -> None:
    limits = list(accumulate(part.limit_s for part in PARTS))
    assert limits[[part.name for part in PARTS].index("transformers")] <= 570
    assert all(0 < part.least_s <= part.limit_s for part in PARTS)


def test_a_part_is_killed_at_its_limit_and_the_page_says_so(tmp_path: Path) -> None:
    with contextlib.closing(Report(tmp_path, "test")) as report:
        run(Part("ceilings", 1, 1, ""), 0.1, report, ["--tiny"])
    assert "Killed at its limit" in (tmp_path / "gpu-test.md").read_text()


def test_a_row_has_its_rates_and_their_shares() -> None:
    row = Row("step", [20.0, 10.0, 11.0], tokens=5500, flops=4.4e12, ratio=1.5, predicted=9.0)
    assert cells(row, 800.0, 1000.0) == [
        *("step", "11 ms", "10 to 20", "500,000", "1.50", "400", "50%", "40%", "", "9 ms", "")
    ]
    skipped = Row("other", note="skipped: no CUDA")
    assert cells(skipped, 800.0, None) == ["other", *[""] * 9, "skipped: no CUDA"]
