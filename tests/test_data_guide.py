"""docs/data.md: what it tells somebody to type works, in its order, on text that is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import prepare
import runs
from config import command_line
from tests.conftest import ROOT, TEXT
from tests.runs import run_here

GUIDE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SMALL = ["n_layer=1", "n_embd=16", "n_head=1", "block_size=32", "batch_size=2", "device=cpu"]
SMALL += ["max_iters=2", "test_freq=2", "eval_iters=1", "compile=false"]


@pytest.mark.slow
def test_the_commands_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "config.yaml", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    texts = [f"{n} {TEXT}. " * (1 + n % 7) for n in range(200)]
    Path("input.txt").write_text("\n".join(texts))
    Path("essays.jsonl").write_text("\n".join(json.dumps({"content": text}) for text in texts))
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.M | re.S):
        if language == "yaml":
            Path(block.split()[1]).write_text(block)
            continue
        for line in block.splitlines():
            _, script, *words = shlex.split(line, comments=True)
            if script == "train.py" and "# needs a network" in line:
                command_line(words)
            elif script == "train.py":
                assert run_here([*words, *SMALL]) == 0, line
            elif script == "runs.py":
                assert runs.main(words) == 0, line
            elif script == "prepare.py" and "# needs a network" not in line:
                assert prepare.main(words) == 0, line


def test_the_guide_is_one_page_of_facts() -> None:
    assert len(GUIDE.split()) < 1100
