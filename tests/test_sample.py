"""`sample.py` as a command: limits of its arguments, a reader that leaves, Ctrl-C."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from config import CheckpointError, DataError, TokenizerConfig
from data.tokenizers.bpe import train_bpe
from data.tokenizers.build import build_tokenizer
from tests.conftest import ROOT, TINY, write_corpus
from tests.model.test_pretrained import published_weights, write_published
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
    monkeypatch.setattr(sample, "_MAX_BATCH", 2)
    together = written(capsys, *options, "--seed", "5", "--num-samples", "3")
    titles = [f"--- sample {number} of 3\n" for number in (1, 2, 3)]
    assert together == "".join(t + text for t, text in zip(titles, alone, strict=True))


def test_a_sample_ends_before_the_end_of_its_document(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(name="bytes"))
    samples = [sample.Sample(tokenizer.stream_decoder(), [title, ">"]) for title in ("1:", "2:")]
    steps = iter([[97, 98], [0, 99], [100, 0], [101, 101]])
    drawn = sample.write_batch(samples, steps, 0)
    assert drawn == 3  # neither the ends of documents nor what was drawn beside them after one
    assert capsys.readouterr().out == "1:>a\n2:>bc\n"
    assert next(steps) == [101, 101]  # nothing is drawn after the last end


def test_speed_goes_to_standard_error(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [runs, "--max-new-tokens", "7", "--num-samples", "2", "--device", "cpu"]
    sample.write_samples(sample.read_arguments(arguments))
    assert re.fullmatch(r"14 tokens in \d+\.\d s: \d+ tokens/s\n", capsys.readouterr().err)


def test_a_tiny_temperature_is_greedy(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "8", "--device", "cpu", "--temperature"]
    greedy = written(capsys, runs, *options, "0")
    assert written(capsys, runs, *options, "1e-42") == greedy
    assert written(capsys, runs, *options, "1e-7") == greedy


@pytest.mark.slow
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
    assert (child.wait(), errors) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_exit_code_5(runs: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, runs, "--device", "cpu"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 5
    assert done.stderr == "standard output: cannot be written: No space left on device\n"


@pytest.mark.slow
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
    assert child.communicate() == ("", "\n")
    assert child.returncode == 130


# --- nanoGPT's command lines --------------------------------------------------------------------

PRESET = """\
out_dir = 'out-x' # of a training
eval_interval = 250
dataset = 'shakespeare_char'
init_from = 'scratch'
num_samples = 3
top_k = 2 * 4
device = 'cpu'
"""
NANOGPT: list[tuple[str, dict[str, object]]] = [
    ("--out_dir=out-x", {"path": "out-x", "num_samples": 10, "top_k": 200, "published": False}),
    ("--out-dir out-x --num-samples 2", {"path": "out-x", "num_samples": 2, "top_k": 200}),
    ("--init_from=resume --out_dir=out-x --top_k=7", {"path": "out-x", "top_k": 7}),
    ("--init_from=resume", {"path": "out"}),
    ("--start=FILE:prompt.txt", {"path": "out", "prompt": "FILE:prompt.txt", "from_file": True}),
    (
        "--init_from=gpt2-xl --start='What is?' --num_samples=5 --max_new_tokens=100",
        {"path": "gpt2-xl", "published": True, "prompt": "What is?", "from_file": False}
        | {"num_samples": 5, "max_new_tokens": 100, "top_k": 200},
    ),
    (
        "runs --device=cpu --seed=1 --temperature=0.5 --max_new_tokens=9",
        {"path": "runs", "device": "cpu", "seed": 1, "temperature": 0.5, "max_new_tokens": 9}
        | {"num_samples": 1, "top_k": None},
    ),
    ("x.py", {"path": "out-x", "num_samples": 3, "top_k": 8, "device": "cpu"}),
    ("x.py --num_samples=2 --out_dir=b", {"path": "b", "num_samples": 2, "top_k": 8}),
    ("--num_samples=2 x.py", {"num_samples": 3}),  # in the order of the words
    ("x.py --init_from=gpt2", {"path": "gpt2", "published": True}),
]


@pytest.mark.parametrize(("line", "expected"), NANOGPT)
def test_command_lines_of_nanogpt_are_understood(
    line: str, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.py").write_text(PRESET)
    found = vars(sample.read_arguments(shlex.split(line)))
    assert {name: found[name] for name in expected} == expected


def test_names_of_nanogpt_without_a_meaning_are_ignored_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.py").write_text(PRESET)
    line = "x.py --init_from=gpt2 --dtype=bfloat16 --compile=False"
    assert sample.read_arguments(line.split()).notes == [
        "x.py: ignored, of training: eval_interval, dataset",
        "--out-dir is ignored beside --init-from=gpt2",
        "--dtype is ignored: text is computed in float32, on CUDA as in training",
        "--compile is ignored: text is computed in float32, on CUDA as in training",
    ]
    assert sample.read_arguments(["--out_dir=a"]).notes == [
        "--num-samples is 10, as in nanoGPT's sample.py",
        "--top-k is 200, as in nanoGPT's sample.py",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "RUN_OR_CHECKPOINT is missing: a checkpoint, a run or a folder of runs"),
        ("runs --out_dir=out", "runs and --out-dir: two models to sample from. Keep one"),
        ("runs --init_from=gpt2", "runs and --init-from: two models to sample from. Keep one"),
        ("runs --start=a --prompt=b", "--prompt and --start: two texts to continue. Keep one"),
        ("--init_from=scratch", "--init-from=scratch: random weights write no text."),
        ("missing.py", "missing.py: not found."),
        ("bad.py", "bad.py:1: 'import os': presets are read, not run"),
        ("--out_dir=out --num_smaples=2", "unrecognized arguments: --num-smaples=2"),
    ],
)
def test_mistakes_in_names_of_nanogpt_are_one_line(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text("import os")
    with pytest.raises(SystemExit) as caught:
        sample.read_arguments(line.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_sampled_by_the_command_of_nanogpt(
    runs: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the \u00e9")
    options = ["--device=cpu", "--max_new_tokens=6", "--seed=3"]
    theirs = [f"--out_dir={runs}", f"--start=FILE:{prompt}", "--num_samples=2", *options]
    ours = [runs, "--prompt", "the \u00e9", "--num-samples", "2", "--top-k", "200", *options]
    assert written(capsys, *theirs) == written(capsys, *ours)
    prompt.unlink()
    with pytest.raises(DataError, match=r"^--start: .*prompt.txt: cannot be read: No such file"):
        written(capsys, *theirs)


def test_published_weights_write_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_bpe("small", ["a text of a few words, a few words of a text"], 262)
    folder = write_published(tmp_path, published_weights(vocabulary=262), vocab_size=262)
    (folder / "tokenizer.json").write_text(tokenizer.to_dict()["json"])
    options = ["--start=a few", "--num_samples=1", "--max_new_tokens=20", "--device=cpu"]
    text = written(capsys, f"--init_from={folder}", *options)
    assert text.startswith("a few") and len(text) > 10
    monkeypatch.setattr("model.pretrained._published", lambda name: folder)
    assert written(capsys, "--init_from=gpt2-xl", *options) == text
    write_published(folder)  # 19 tokens
    with pytest.raises(CheckpointError, match="its tokenizer has 262 tokens, its model 19"):
        written(capsys, f"--init_from={folder}", *options)


def test_published_weights_that_cannot_be_had_are_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--init_from=gpt2-xl", "--device=cpu"])
    assert sample.main() == 3
    message = capsys.readouterr().err
    assert "--init-from: gpt2-xl is not on this machine and could not be downloaded (no" in message
    assert "Or give a folder: --init-from=path/to/folder with config.json" in message
