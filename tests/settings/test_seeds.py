"""The users of other trainers: their files, flags and data, run to the end here."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import sample
from data.sources.tokens.meta import write_meta
from data.tokenizers.bpe import train_bpe
from data.tokenizers.simple import char_tokenizer
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.trained_model import load_model
from tests.conftest import ROOT, TEXT
from tests.runs import assert_equal, metrics, only_run, run_here
from tests.settings.test_dialects import TMRC

pytestmark = pytest.mark.slow  # each trains, or loads weights

SMALL = ["n_layer=2", "n_head=2", "n_embd=16", "block_size=16", "batch_size=4", "device=cpu"]
DRAGON = [*SMALL, "model.name=gpt", "dataset.name=dragon"]
TIMES = ["max_iters=20", "lr_decay_iters=20", "warmup_iters=2", "eval_interval=10", "eval_iters=2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with data/dragon as nanoGPT's prepare.py leaves it: characters."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "config.yaml", tmp_path)
    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choices(TEXT.split(), k=9)) for _ in range(200))
    tokenizer = char_tokenizer(text)
    folder = tmp_path / "data" / "dragon"
    folder.mkdir(parents=True)
    ids = tokenizer.encode(text).astype(np.uint16)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    write_meta(
        folder / "meta.json", tokenizer, np.dtype(np.uint16), {"train": cut, "val": len(ids) - cut}
    )
    return tmp_path


PRESET = """
# train a miniature character-level model
out_dir = 'out-dragon'
log_interval = 5
always_save_checkpoint = False
dataset = 'dragon'
gradient_accumulation_steps = 2 * 1
dropout = 0.2
learning_rate = 1e-2
min_lr = 1e-3
beta2 = 0.99
"""


def test_a_preset_of_nanogpt_trains_and_its_words_come_back(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "train_dragon.py").write_text(PRESET)
    words = [f"--{word}" for word in (*SMALL, *TIMES, "compile=False")]
    assert run_here(["train_dragon.py", *words]) == 0
    output = capsys.readouterr().out
    assert "Tokens per step: 4 sequences x 16 tokens x 2 accumulation x 1 process = 128" in output
    assert re.search(r"Vocabulary: \d\d \(the tokenizer's\)", output)
    run = only_run(here / "out-dragon")
    losses = [record["train/loss"] for record in metrics(run) if "train/loss" in record]
    assert losses[-1] < losses[0]
    monkeypatch.setattr(sys, "argv", ["sample.py", str(run), "--prompt", "the ", "--seed", "3"])
    assert sample.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("the ") and set(said) <= set(TEXT + "\n")


FLAGS = shlex.split("""
    --train_data_path data/train.ids --val_data_path data/valid.ids --vocab_size 500
    --context_length 16 --d_model 16 --num_heads 2 --d_ff 32 --num_layers 2 --lr 6e-3 --min_lr 6e-4
    --batch_size 4 --warmup_iters 2 --log_interval 5 --eval_interval 10 --eval_iters 2
    --checkpoint_dir checkpoints/my_run --checkpoint_interval 10 --device cpu
""")


def test_flags_of_the_cs336_script_train_a_llama_and_print_its_lines(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 4000), ("valid", 1000)):
        (np.arange(count) * 7 % 500).astype(np.uint16).tofile(here / "data" / f"{name}.ids")
    assert run_here([*FLAGS, "--max_iters", "20"]) == 0
    output = capsys.readouterr().out
    run = only_run(here / "checkpoints" / "my_run")
    expected = [
        r"Loading data with memory mapping\.\.\.",
        r"Train data size: 4,000 tokens",
        r"Validation data size: 1,000 tokens",
        r"Initializing model\.\.\.",
        r"Total parameters: [\d,]+",
        r"Trainable parameters: [\d,]+",
        r"Starting training from iteration 0\.\.\.",
        r"Device: cpu",
        r"Max iterations: 20\b",
        "-" * 80,
        r"Iter     10 \| Loss: \d\.\d{4} \| LR: \d\.\d\de-\d\d \| .*Time: .*ms \| Tokens/sec: \d+",
        r"Evaluating at iteration 10\.\.\.",
        r"Train loss: \d\.\d{4} \| Val loss: \d\.\d{4}",
        re.escape(f"Saved checkpoint to checkpoints/my_run/{run.name}/checkpoint_10.pt"),
    ]
    assert re.search(".*".join(expected), output, re.DOTALL), output
    model, config = load_model(run)
    assert (config.model.name, config.model.d_ff) == ("llama", 32)
    names = {key for record in metrics(run) for key in record}
    assert {"final/train_loss", "final/val_loss", "eval/train_loss", "eval/val_loss"} <= names

    # its own name of a checkpoint finds the run
    again = ["--resume_from", "checkpoints/my_run/checkpoint_iter_20.pt", "--max_iters", "25"]
    assert run_here([*FLAGS, *again]) == 0
    assert "Starting training from iteration 20..." in capsys.readouterr().out
    assert (run / "checkpoint_25.pt").exists()


def test_sections_of_tmrc_train_on_parquet_with_a_tokenizer_of_their_own(
    here: Path, corpus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.json").write_text(train_bpe("own", [TEXT] * 20, 300).to_dict()["json"])
    small = {"t5-base": "own.json", "32128": "320", "d_model: 512": "d_model: 16"}
    small |= {"n_head: 4": "n_head: 2", "n_layer: 8": "n_layer: 2", "length: 512": "length: 16"}
    small |= {"bfloat16": "float32", "lr: 0.0001": "lr: 0.01", "100000": "12", "256": "8"}
    small |= {"/path/to/data": str(corpus_dir), "/path/to/artifacts": "artifacts", "20,": "4,"}
    text = TMRC.replace("wandb_log:", "logging:").replace("name: tmrc_log", "wandb_log: false")
    for theirs, ours in small.items():
        text = text.replace(theirs, ours)
    (here / "tmrc.yaml").write_text(text)
    assert run_here(["tmrc.yaml", "device=cpu", "test_freq=6", "eval_iters=2"]) == 0
    output = capsys.readouterr().out
    assert "model.attention=flex runs on CUDA only" in output
    assert "Vocabulary: 320 (of which the tokenizer uses " in output
    assert "Bits/byte: " in output
    assert len(list((here / "artifacts").glob("run_*"))) == 1


@pytest.mark.parametrize(("model", "optimizer"), [("gpt", "muon"), ("llama", "adamw")])
def test_an_interrupted_run_of_a_transformer_equals_the_straight_one(
    here: Path, model: str, optimizer: str
) -> None:
    words = [*SMALL, *TIMES, f"model.name={model}", "dataset.name=dragon", "dropout=0.1"]
    words += [f"optimizer.name={optimizer}", "log_freq=1", "checkpoint_freq=10"]
    assert run_here([*words, "checkpoint_dir=straight"]) == 0
    assert run_here([*words, "checkpoint_dir=parts", "num_workers=2"]) == 0
    parts, straight = only_run(here / "parts"), only_run(here / "straight")
    (parts / "checkpoint_20.json").unlink()
    assert run_here([*words, "checkpoint_dir=parts", "resume_from=auto"]) == 0
    one, other = (load_checkpoint(run / "checkpoint_20.pt") for run in (straight, parts))
    for part in ("model", "optimizer", "cursor", "rng", "tokenizer"):
        assert_equal(one[part], other[part], part)
    assert metrics(straight) == metrics(parts)


def test_with_an_oracle_one_batch_is_learnt_by_heart_and_resumes_equal(here: Path) -> None:
    words = [*DRAGON, "use_oracle=true", "test_freq=null"]
    words += ["learning_rate=3e-2", "decay_lr=false", "warmup_iters=0", "log_freq=10"]
    assert run_here([*words, "checkpoint_dir=straight", "max_iters=60"]) == 0
    straight = only_run(here / "straight")
    losses = [record["train/loss"] for record in metrics(straight)]
    assert losses[-1] < 0.3 * losses[0], losses
    for steps in (30, 60):
        again = ["checkpoint_dir=parts", f"max_iters={steps}", "resume_from=auto"]
        assert run_here([*words, *again]) == 0
    last = [run / "checkpoint_60.pt" for run in (straight, only_run(here / "parts"))]
    one, other = map(load_checkpoint, last)
    assert_equal(one["model"], other["model"], "model")


def test_without_saving_nothing_is_left(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DRAGON, "save_model=false", "max_iters=3", "test_freq=null"]
    assert run_here([*words, "checkpoint_dir=runs"]) == 0
    assert not (here / "runs").exists()
    assert "sample.py" not in capsys.readouterr().out


def test_what_the_text_cannot_give_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, message in (
        (
            "vocab_size=10",
            r"model.vocab_size=10: 10 tokens, but the text has \d\d \(tokenizer char\)",
        ),
        ("mask=causal_document", "no token of tokenizer char ends a document"),
    ):
        assert run_here([*DRAGON, word]) == 2
        assert re.search(message, capsys.readouterr().err)
