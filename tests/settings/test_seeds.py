"""The users of other trainers: their files, flags and data, run to the end here."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sample
from data.sources.meta import write_meta
from data.tokenizers.bpe import train_bpe
from data.tokenizers.simple import char_tokenizer
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.trained_model import load_model
from tests.conftest import ROOT, TEXT
from tests.runs import assert_equal, metrics, only_run, run_here

pytestmark = pytest.mark.slow  # each trains, or loads weights

SMALL = ["n_layer=2", "n_head=2", "n_embd=16", "block_size=16", "batch_size=4", "device=cpu"]
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
    (here / "tmrc.yaml").write_text(
        f"""
datasets: {{name: dragons, path: {corpus_dir}, tokenizer_used: own.json}}
model:
  {{name: gpt, n_head: 2, d_model: 16, n_layer: 2, dropout_p: 0.0, context_length: 16,
   autocast_precision: float32, flash: False, flex: True, mlp_scale_factor: 4, mlp_bias: True,
   attn_bias: False, proj_bias: True, ln_bias: True, cls_head_bias: True, activation: relu,
   mask: causal_document}}
optimizer:
  {{name: AdamW, lr: 0.01, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1e-8, precision: float32}}
tokenizer: {{name: own.json, vocab_size: 320}}
training:
  {{epochs: 1, train_steps: 12, batch_size: 8, log_interval: 4, shuffle: True, save_model: True,
   save_every: 3600, artifacts_path: artifacts, use_oracle: False}}
HydraConf: {{version_base: "1.1"}}
system: {{device: cpu}}
"""
    )
    assert run_here(["tmrc.yaml", "test_freq=6", "eval_iters=2"]) == 0
    output = capsys.readouterr().out
    assert "model.attention=flex runs on CUDA only" in output
    assert "Vocabulary: 320 (of which the tokenizer uses " in output
    assert "Bits/byte: " in output
    assert len(list((here / "artifacts").glob("run_*"))) == 1


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
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


def test_init_from_resume_goes_on_with_the_newest_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SMALL,
        "model.name=gpt",
        "dataset.name=dragon",
        "checkpoint_dir=out",
        "test_freq=null",
    ]
    assert run_here([*words, "max_iters=4"]) == 0
    assert run_here([*words, "max_iters=6", "init_from=resume"]) == 0
    assert "Starting training from iteration 4..." in capsys.readouterr().out
    assert (only_run(here / "out") / "checkpoint_6.pt").exists()


def test_nanogpts_checkpoint_starts_a_run_but_does_not_continue(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "model.name=gpt", "dataset.name=dragon", "test_freq=null", "max_iters=3"]
    assert run_here([*words, "checkpoint_dir=first"]) == 0
    model, config = load_model(only_run(here / "first"))
    arguments: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
    arguments |= {"vocab_size": config.model.vocab_size, "dropout": 0.0, "bias": False}
    (here / "out").mkdir()
    content = {"model": model.state_dict(), "model_args": arguments, "iter_num": 3}
    torch.save(content, here / "out" / "ckpt.pt")
    assert run_here([*words, "init_from=resume", "checkpoint_dir=out"]) == 3
    assert "training.init_from=out/ckpt.pt starts a new run" in capsys.readouterr().err
    others = [word for word in words if word not in ("n_layer=2", "n_head=2")]  # the weights know
    assert run_here([*others, "init_from=out/ckpt.pt", "checkpoint_dir=next"]) == 0
    started = only_run(here / "next")
    assert "n_layer: 2" in (started / "config.yaml").read_text()
    # resumed, the weights' file is not needed any more
    (here / "out" / "ckpt.pt").unlink()
    saved = [f"resume_from={started}", "max_iters=5"]
    assert run_here([os.fspath(started / "config.yaml"), *saved]) == 0
    # in nanoGPT's way too, with a config that does not tell the shape
    others = [word.replace("max_iters=3", "max_iters=6") for word in others]
    assert run_here([*others, "init_from=resume", "checkpoint_dir=next"]) == 0
    assert "init_from: out/ckpt.pt" in (started / "config.yaml").read_text()


def test_with_an_oracle_one_batch_is_learnt_by_heart_and_resumes_equal(here: Path) -> None:
    words = [*SMALL, "model.name=gpt", "dataset.name=dragon", "use_oracle=true", "test_freq=null"]
    words += ["learning_rate=1e-2", "decay_lr=false", "warmup_iters=0", "log_freq=10"]
    assert run_here([*words, "checkpoint_dir=straight", "max_iters=120"]) == 0
    straight = only_run(here / "straight")
    losses = [record["train/loss"] for record in metrics(straight)]
    assert losses[-1] < 0.3 * losses[0]
    for steps in (60, 120):
        again = ["checkpoint_dir=parts", f"max_iters={steps}", "resume_from=auto"]
        assert run_here([*words, *again]) == 0
    last = [run / "checkpoint_120.pt" for run in (straight, only_run(here / "parts"))]
    one, other = map(load_checkpoint, last)
    assert_equal(one["model"], other["model"], "model")


def test_without_saving_nothing_is_left(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "model.name=gpt", "dataset.name=dragon", "save_model=false", "max_iters=3"]
    assert run_here([*words, "checkpoint_dir=runs", "test_freq=null"]) == 0
    assert not (here / "runs").exists()
    assert "sample.py" not in capsys.readouterr().out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run_here(arguments)
    return code, capsys.readouterr().err


def test_a_vocabulary_that_is_too_small_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "model.name=gpt", "dataset.name=dragon", "vocab_size=10"]
    code, error = refused(words, capsys)
    assert code == 2
    assert re.match(
        r"model.vocab_size=10: 10 tokens, but the text has \d\d \(tokenizer char\)", error
    )


def test_documents_without_a_separator_cannot_be_masked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "model.name=gpt", "dataset.name=dragon", "mask=causal_document"]
    code, error = refused(words, capsys)
    assert code == 2
    assert "no token of tokenizer char ends a document" in error


def test_a_padded_vocabulary_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[Any] = [*SMALL, "model.name=gpt", "dataset.name=dragon", "vocab_multiple=64"]
    assert run_here([*words, "--dry-run"]) == 0
    assert "Vocabulary: 64 (of which the tokenizer uses " in capsys.readouterr().out
