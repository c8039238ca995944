"""`sample.py` as a command: limits of its arguments, a reader that leaves, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from config import TokenizerConfig
from data.tokenizer import build_tokenizer
from tests.conftest import ROOT, TINY, write_corpus
from tests.runs import run_here

LARGEST = 2**63 - 1
COMMAND = [sys.executable, os.fspath(ROOT / "sample.py")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with one run of two steps."""
    folder = tmp_path_factory.mktemp("sample")
    corpus = write_corpus(folder / "text", documents=60)
    config = folder / "tiny.yaml"
    config.write_text(f"{TINY}dataset:\n  parquet_dir: {corpus}\n")
    runs = folder / "runs"
    options = [f"checkpoint_dir={runs}", "max_iters=2", "test_freq=null"]
    assert run_here([os.fspath(config), *options]) == 0
    return os.fspath(runs)


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `python sample.py ARGUMENTS` writes, run in this process."""
    capsys.readouterr()
    sample.write_samples(sample.read_arguments(list(arguments)))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "9" * 20], f"--seed: must be in [0, {LARGEST}], got {'9' * 20}"),
        (["--seed", "-1"], "--seed: must be >= 0, got -1"),
        (["--seed", "1.5"], "--seed: invalid whole number value: '1.5'"),
        (["--max-new-tokens", "9" * 20], f"--max-new-tokens: must be in [1, {LARGEST}], got 9"),
        (["--num-samples", "0"], "--num-samples: must be >= 1, got 0"),
        (["--temperature", "nan"], "--temperature: must be >= 0, got nan"),
        (["--temperature", "inf"], "--temperature: must be in [0, "),
        (["--top-p", "1.1"], "--top-p: must be in [0, 1], got 1.1"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_limits(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        sample.read_arguments(["checkpoints", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_largest_seed_serves_several_samples(
    runs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-samples", "2", "--max-new-tokens", "4", "--device", "cpu"]
    assert "--- sample 2 of 2" in written(capsys, runs, "--seed", str(LARGEST), *options)


def test_samples_drawn_together_are_those_drawn_alone(
    runs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [runs, "--prompt", "the ", "--max-new-tokens", "12", "--device", "cpu"]
    alone = [written(capsys, *options, "--seed", str(5 + number)) for number in range(3)]
    monkeypatch.setattr(sample, "_TOGETHER", 2)
    together = written(capsys, *options, "--seed", "5", "--num-samples", "3")
    titles = [f"--- sample {number} of 3\n" for number in (1, 2, 3)]
    assert together == "".join(t + text for t, text in zip(titles, alone, strict=True))


def test_a_sample_ends_before_the_end_of_its_document(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = sample.read_arguments(["x", "--prompt", ">", "--num-samples", "2"])
    decoders = [build_tokenizer(TokenizerConfig()).stream_decoder() for _ in range(2)]
    steps = iter([[97, 98], [0, 99], [100, 0], [101, 101]])
    drawn = sample.write_together(arguments, range(2), decoders, steps, 0)
    assert drawn == 3  # neither the ends of documents nor what was drawn beside them after one
    assert capsys.readouterr().out == "--- sample 1 of 2\n>a\n--- sample 2 of 2\n>bc\n"
    assert next(steps) == [101, 101]  # nothing is drawn after the last end


def test_speed_goes_to_standard_error(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [runs, "--max-new-tokens", "7", "--num-samples", "2", "--device", "cpu"]
    sample.write_samples(sample.read_arguments(arguments))
    assert re.fullmatch(r"14 tokens in \d+\.\d s: \d+ tokens/s\n", capsys.readouterr().err)


@pytest.mark.parametrize("temperature", ["1e-42", "1e-30", "1e-7"])
def test_a_tiny_temperature_is_greedy(
    runs: str, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    options = ["--max-new-tokens", "8", "--device", "cpu", "--temperature"]
    assert written(capsys, runs, *options, temperature) == written(capsys, runs, *options, "0")


def test_a_reader_that_leaves_ends_it_quietly(runs: str) -> None:
    child = subprocess.Popen(
        [*COMMAND, runs, "--max-new-tokens", "100000", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(1) == "\n"
    child.stdout.close()
    with child.stderr:
        errors = child.stderr.read()
    assert (child.wait(timeout=60), errors) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_exit_code_5(runs: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, runs, "--device", "cpu"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 5
    assert done.stderr == "standard output: cannot be written: No space left on device\n"


def test_ctrl_c_while_torch_is_imported_leaves_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    )
    child = subprocess.Popen(
        [*COMMAND, "checkpoints"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.fspath(tmp_path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30) == ("", "\n")
    assert child.returncode == 130
