"""Configs of other trainers: the same run under native names, each translation said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config import Config, Request, command_line
from tests.settings.conftest import ROOT, check, differences
from tests.settings.test_presets import S4_FILE

PATHS = {"dataset.parquet_dir", "training.checkpoint_dir"}


def read(text: str, *words: str) -> Request:
    Path("theirs.yaml").write_text(text, encoding="utf-8")
    return command_line(["theirs.yaml", *words])


def complaint(capsys: pytest.CaptureFixture[str], text: str, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        read(text, *words)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- TMRC: its default file has names that its documentation leaves out -------------------------

TMRC_FILE = "defaults:\n  - _self_\n\n" + S4_FILE.replace(
    "  shuffle:", "  val_interval: 100\n  shuffle:"
).replace("  mask: causal_document\n", "  mask: causal_document\n  compile_flex: True\n").replace(
    "n_layer: 8", "n_layer: 6"
)


def test_the_file_of_tmrc_is_the_run_of_our_preset() -> None:
    ours = command_line([str(ROOT / "configs/tmrc-default.yaml")]).config
    theirs = read(TMRC_FILE)
    assert differences(read(S4_FILE).config, ours) == PATHS
    assert differences(theirs.config, ours) == PATHS | {"model.n_layer", "training.test_freq"}
    check(theirs.config, tie_embeddings=False, decay_lr=False, warmup_iters=0, grad_clip=0.0)
    check(theirs.config, checkpoint_freq=None, save_every=3600.0, test_freq=100, attention="flex")
    for note in (
        "theirs.yaml is read as a config of TMRC",
        "defaults is ignored: there is no Hydra here; name several files on the command line",
        "model.compile_flex is ignored: attention with FlexAttention is always compiled",
        "training.val_interval is read as training.test_freq",
        "model.tie_embeddings=false: its head has weights of its own",
        "schedule.decay_lr=false, schedule.warmup_iters=0: its learning rate is constant",
        "optimizer.grad_clip=0.0: it does not clip gradients",
        "training.checkpoint_freq=null: it saves by training.save_every alone",
    ):
        assert note in theirs.notes


def test_what_a_file_of_tmrc_says_itself_stands() -> None:
    text = TMRC_FILE + "schedule: {name: wsd}\n"
    text = text.replace("eps: 1e-8", "eps: 1e-8\n  grad_clip: 2.0")
    request = read(text, "tie_embeddings=true", "checkpoint_freq=70")
    check(request.config, schedule__name="wsd", decay_lr=True, grad_clip=2.0)
    check(request.config, tie_embeddings=True, checkpoint_freq=70)


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: gpt, d_model: 64}",
        "model: {name: llama, d_model: 64}\noptimizer: {lr: 1e-3}",
        "datasets: {name: a}\ntokenizer: {name: gpt2}",
    ],
)
def test_a_few_names_do_not_make_a_file_one_of_tmrc(text: str) -> None:
    request = read(text)
    assert not any("read as a config of" in note for note in request.notes)
    check(request.config, tie_embeddings=True, decay_lr=True, checkpoint_freq=500)


# --- fivezeroes/bdh -----------------------------------------------------------------------------

NATIVE = """\
model: {n_layer: 6, n_embd: 256, n_head: 4, mlp_internal_dim_multiplier: 128, vocab_size: 256}
dataloader: {num_workers: 4, pin_memory: true, prefetch_factor: 2}
low_precision: {use_4bit: true, quantization_type: "nf4", compute_dtype: "bfloat16"}
fp8: {format: "hybrid", amax_history_len: 1024, amax_compute_algo: "max"}
"""
TRAINING = """\
training:
  block_size: 512
  batch_size: 8
  max_iters: {max_iters}
  learning_rate: 3.0e-4
  weight_decay: 0.01
  log_freq: 100
  test_freq: 1000
  checkpoint_freq: 10000
  resume_from_checkpoint: null
"""
TENSORBOARD = """\
tensorboard:
  enabled: true
  log_dir: "runs"
  log_gradients: true
  log_weights: true
"""
TOKENIZER = """\
tokenizer:
  type: "tiktoken"
  name: "gpt2"
  pad_token_id: null
  eos_token_id: null
  bos_token_id: null
"""
SCHEDULER = """\
scheduler:
  type: "{type}"
  warmup_steps: {warmup}
  warmup_type: "linear"
  min_lr: 0.0
  T_max: {period}
  gamma: 0.95
  patience: 10
  factor: 0.1
  threshold: 1e-4
"""
DATASET = "dataset: {parquet_dir: somewhere, max_cached_files: 5}\n"
SPLIT = "dataset: {parquet_dir: somewhere, max_cached_files: 5, val_split: 0.1, val_batches: 100}\n"
SHORT = TRAINING.format(max_iters=3000)
LONG = TRAINING.format(max_iters=1000000)
RUNS = LONG + '  runs_dir: "runs"\n'
ACCUMULATED = RUNS + "  gradient_accumulation_steps: 32\n"
COMPILED = ACCUMULATED + "  compile_model: true\n"
CONSTANT = {"decay_lr": False, "warmup_iters": 0, "beta2": 0.999, "grad_clip": 0.0}
WITH_GPT2 = {"tokenizer__name": "gpt2", "vocab_size": None}
COUNTED = {"max_iters": 31250, "log_freq": 3, "test_freq": 31, "checkpoint_freq": 312}


def scheduler(kind: str, warmup: int = 0, period: str = "null") -> str:
    return SCHEDULER.format(type=kind, warmup=warmup, period=period)


# The public file's shape, revision by revision -> what it means here.
REVISIONS: list[tuple[str, dict[str, Any]]] = [
    (
        SHORT + DATASET,
        {"decay_lr": True, "warmup_iters": None, "beta2": 0.95, "tensorboard": False},
    ),
    (SHORT + DATASET + TENSORBOARD, {"tensorboard": True, "vocab_size": 256, **CONSTANT}),
    (SHORT + DATASET + TENSORBOARD + TOKENIZER, {**WITH_GPT2, **CONSTANT}),
    (LONG + DATASET + TENSORBOARD + TOKENIZER, {"max_iters": 1000000, **WITH_GPT2, **CONSTANT}),
    (
        f"{RUNS}  gradient_accumulation_steps: 1\n{DATASET}{TENSORBOARD}{TOKENIZER}",
        {"checkpoint_dir": "runs", "max_iters": 1000000, "log_freq": 100, **CONSTANT},
    ),
    (
        COMPILED + SPLIT + TENSORBOARD + TOKENIZER + scheduler("none"),
        {"compile": True, "test_fraction": 0.1, "eval_iters": 100, **COUNTED, **CONSTANT},
    ),
]


@pytest.mark.parametrize(("text", "expected"), REVISIONS)
def test_the_config_of_fivezeroes_is_read_in_its_revisions(
    text: str, expected: dict[str, Any]
) -> None:
    check(read(NATIVE + text).config, **expected)


def test_each_translation_of_fivezeroes_is_one_line() -> None:
    text = NATIVE + COMPILED + SPLIT + TENSORBOARD + TOKENIZER + scheduler("cosine", 500, "20000")
    assert read(text).notes == (
        "theirs.yaml is read as a config of fivezeroes/bdh",
        "tensorboard.log_dir, tensorboard.log_gradients, tensorboard.log_weights: ignored, event "
        "files go into the run's directory, without histograms",
        "tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id: ignored, a "
        "tokenizer knows its own, and there nothing reads them",
        "tokenizer.type=tiktoken and name=gpt2 is read as tokenizer.name=gpt2",
        "model.vocab_size=256: null, the tokenizer's, as there",
        "after 20500 steps the rate stays low; there it rises again",
        "scheduler.type=cosine with warmup_steps + T_max = 20500 is read as "
        "schedule.warmup_iters=500, schedule.min_lr=0.0, schedule.name=cosine, "
        "schedule.lr_decay_iters=20500",
        "scheduler.warmup_type, scheduler.gamma, scheduler.factor, scheduler.threshold, "
        "scheduler.patience: ignored, no part of this schedule here",
        "max_iters=1000000, log_freq=100, test_freq=1000, checkpoint_freq=10000 count micro-steps "
        "there, 32 to an optimizer step: max_iters=31250, log_freq=3, test_freq=31, "
        "checkpoint_freq=312",
        "optimizer.beta2=0.999, optimizer.grad_clip=0.0: its AdamW has torch's betas, and it does "
        "not clip gradients",
        "training.runs_dir is read as training.checkpoint_dir",
        "training.compile_model is read as system.compile",
        "dataset.val_split is read as dataset.test_fraction",
        "dataset.val_batches is read as training.eval_iters",
        "tensorboard.enabled is read as logging.tensorboard",
    )


SCHEDULES: list[tuple[str, str, dict[str, Any]]] = [
    (SHORT, scheduler("none", 9), {"decay_lr": False, "warmup_iters": 0, "min_lr": None}),
    (SHORT, scheduler("cosine", 9), {"schedule__name": "cosine", "warmup_iters": 9, "min_lr": 0.0}),
    (SHORT, scheduler("cosine", 9, "2000"), {"lr_decay_iters": 2009, "decay_lr": True}),
    (SHORT, scheduler("linear", 9), {"schedule__name": "linear", "lr_decay_iters": None}),
    # torch's LinearLR over max_iters takes one of its steps per optimizer step
    (ACCUMULATED, scheduler("linear"), {"lr_decay_iters": 1000000, "max_iters": 31250}),
    (SHORT, "scheduler: {type: cosine}", {"warmup_iters": 0, "min_lr": 0.0}),
    (SHORT, "scheduler: {type: none}", {"decay_lr": False}),
    (SHORT + "  runs_dir: a\n", "schedule: {name: wsd}", {"schedule__name": "wsd"}),
]


@pytest.mark.parametrize(("training", "text", "expected"), SCHEDULES)
def test_a_scheduler_is_a_schedule(training: str, text: str, expected: dict[str, Any]) -> None:
    check(read(training + text).config, **expected)


TOKENIZERS: list[tuple[str, str, int | None]] = [
    ("type: byte, name: gpt2", "bytes", 256),
    ("type: huggingface, name: t5-base", "t5-base", None),
    ("type: huggingface", "gpt2", None),
    ("type: tiktoken, name: null", "gpt2", None),
]


@pytest.mark.parametrize(("text", "name", "size"), TOKENIZERS)
def test_a_type_and_a_name_are_one_tokenizer(text: str, name: str, size: int | None) -> None:
    config = read(f"{NATIVE}tokenizer: {{{text}}}\n").config
    check(config, tokenizer__name=name, vocab_size=size)


REFUSED = [
    (
        scheduler("plateau"),
        "theirs.yaml:2: scheduler.type=plateau is not available. Take another with "
        "schedule.name=cosine, linear or wsd, or schedule.decay_lr=false for a constant rate.",
        "decay_lr=false",
    ),
    (scheduler("exponential"), "theirs.yaml:2: scheduler.type=exponential is not av", "name=wsd"),
    (
        "tokenizer:\n  type: sentencepiece\n  name: a.model\n",
        "theirs.yaml:2: tokenizer.type=sentencepiece cannot be read. Take tokenizer.name=gpt2, a",
        "tokenizer.name=bytes",
    ),
    (
        "tokenizer: {type: tiktoken, name: cl100k_base}",
        "theirs.yaml:1: tokenizer.name=cl100k_base of tiktoken cannot be read, only gpt2. Take",
        "tokenizer.name=bytes",
    ),
]


@pytest.mark.parametrize(("text", "message", "remedy"), REFUSED)
def test_what_is_not_available_is_refused_until_another_is_named(
    capsys: pytest.CaptureFixture[str], text: str, message: str, remedy: str
) -> None:
    found = complaint(capsys, text)
    assert found.startswith(message) and len(found.splitlines()) == 1
    section = "schedule." if remedy.startswith("name") else ""
    assert isinstance(read(text, section + remedy).config, Config)


MISTAKES = [
    (
        "scheduler: {type: step}",
        "scheduler.type: expected one of none, cosine, linear, exponential",
    ),
    (
        "scheduler: {type: cosine, warmup_step: 3}",
        "scheduler.warmup_step: unknown option. Did you ",
    ),
    ("scheduler: {type: cosine, T_max: x}", "scheduler.T_max: expected a whole number, got 'x'"),
    (
        "scheduler: {type: cosine, type: none}",
        "scheduler.type: given twice (first at line 1). Keep one.",
    ),
    ("scheduler: {type: none}\nschedule: {name: wsd}", "section schedule sets the rate too. Keep"),
    ("scheduler: {type: cosine, warmup_steps: -1}", "scheduler.warmup_steps: must be >= 0, got -1"),
    ("tensorboard: {enabled: true, log_dirs: a}", "tensorboard.log_dirs: unknown option."),
    (
        "training: {runs_dir: a, gradient_accumulation_steps: 0, max_iters: 10}",
        "training.gradient_accumulation_steps: must be in [1, 1000000], got 0",
    ),
    (
        "training: {runs_dir: a, gradient_accumulation_steps: 2, max_iters: soon}",
        "training.max_iters: expected a whole number, got 'soon'",
    ),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_in_a_foreign_file_are_one_line_with_its_place(
    capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    found = complaint(capsys, text)
    assert found.startswith("theirs.yaml:") and message in found
    assert len(found.splitlines()) == 1


def test_their_plain_names_work_on_the_command_line_too() -> None:
    words = ["--runs_dir=a", "--val_split=0.2", "training.compile_model=false", "val_interval=7"]
    config = read(SHORT, *words, "tensorboard.enabled=true", "dataset.val_batches=3").config
    check(config, checkpoint_dir="a", test_fraction=0.2, compile=False, test_freq=7)
    check(config, tensorboard=True, eval_iters=3)
