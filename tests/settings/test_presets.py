"""Other trainers' names: presets, flat files, flags and sections as their documents write them.

S0 is a flat YAML reference, S1 nanoGPT's Python presets, S2 a script with flags, S4 TMRC's YAML.
"""

from __future__ import annotations

import re
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, ConfigError, accumulation_steps, command_line, warmup_steps
from settings.foreign.preset_file import MAX_PRESET_BYTES, PRESETS, read_preset
from tests.settings.conftest import ROOT, Ask, Complain, check, differences, options

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def reference_file(ask: Ask) -> None:
    """The config.yaml of the folder is the reference file: nothing but defaults."""
    Path("config.yaml").write_bytes((ROOT / "config.yaml").read_bytes())


def write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


# --- S0: flat names ---------------------------------------------------------------------------

S0_FILE = """\
out_dir: 'out'
log_interval: 1
eval_interval: 2000
eval_iters: 200
eval_only: False
always_save_checkpoint: True
init_from: 'scratch'
wandb_log: False
wandb_project: 'austen-gpt'
wandb_run_name: 'gpt2-austen-12layer'
dataset: 'austen'
batch_size: 12
block_size: 1024
gradient_accumulation_steps: 40
n_layer: 12
n_head: 12
n_embd: 768
dropout: 0.0
bias: False
learning_rate: 6e-4
max_iters: 600000
weight_decay: 1e-1
beta1: 0.9
beta2: 0.95
grad_clip: 1.0
decay_lr: True
warmup_iters: 2000
lr_decay_iters: 600000
min_lr: 6e-5
backend: 'nccl'
device: 'cuda'
dtype: 'bfloat16'
compile: True
"""


def test_the_flat_reference_file_gives_the_values_it_documents(ask: Ask) -> None:
    write("train_config.yaml", S0_FILE)
    config = ask("train_config.yaml").config
    check(config, checkpoint_dir="out", log_freq=1, test_freq=2000, eval_iters=200)
    check(config, eval_only=False, always_save_checkpoint=True, init_from="scratch")
    check(config, wandb_log=False, wandb_project="austen-gpt", wandb_run_name="gpt2-austen-12layer")
    check(config, dataset__name="austen", batch_size=12, block_size=1024)
    check(config, tokens_per_step=491520, gradient_accumulation_steps=1)
    check(config, model__name="gpt", n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False)
    check(config, learning_rate=6e-4, max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95)
    check(config, grad_clip=1.0, decay_lr=True, schedule__name="cosine", warmup_iters=2000)
    check(config, lr_decay_iters=600000, min_lr=6e-5, device="cuda")
    check(config, distributed__backend="nccl")
    check(config, compute_dtype="bfloat16", compile=True, checkpoint_freq=2000)
    check(config, tokenizer__name="auto", vocab_size=None, optimizer__name="adamw")


def test_the_base_holds_the_values_of_the_flat_reference_file(ask: Ask) -> None:
    """The text of S0 is of austen, and "these defaults are designed to train ... OpenWebText"."""
    write("train_config.yaml", S0_FILE)
    base = ask("dataset=austen").config
    different = differences(ask("train_config.yaml").config, base)
    assert different == {"system.device", "distributed.backend"}  # ours find out
    check(base, device="auto", distributed__backend="auto")


S0_COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("batch_size=128 compile=False", {"batch_size": 128, "compile": False}),
    ("learning_rate=1e-3 dataset=openwebtext", {"learning_rate": 1e-3, "model__name": "gpt"}),
    ("n_layer=6 n_head=6 n_embd=384", {"n_layer": 6, "n_head": 6, "n_embd": 384}),
    (
        "wandb_log=True wandb_project=my-project wandb_run_name=experiment-1",
        {"wandb_log": True, "wandb_project": "my-project", "wandb_run_name": "experiment-1"},
    ),
    (
        "batch_size=32 learning_rate=1e-3 max_iters=100000 compile=False",
        {"batch_size": 32, "learning_rate": 1e-3, "max_iters": 100000, "compile": False},
    ),
    ("grad_clip=0.0 decay_lr=False", {"grad_clip": 0.0, "decay_lr": False}),
    (
        "dtype=float16 device=cuda:1 backend=gloo",
        {"compute_dtype": "float16", "distributed__backend": "gloo"},
    ),
    ("device=mps eval_only=True", {"device": "mps", "eval_only": True}),
    ("init_from=resume out_dir=out", {"init_from": "resume", "checkpoint_dir": "out"}),
    ("init_from=gpt2-large", {"init_from": "gpt2-large", "model__name": "gpt"}),
]


@pytest.mark.parametrize(("line", "expected"), S0_COMMANDS)
def test_commands_of_the_flat_reference_work(ask: Ask, line: str, expected: dict[str, Any]) -> None:
    write("train_config.yaml", S0_FILE)
    for config in (ask(line).config, ask(f"train_config.yaml {line}").config):
        check(config, **expected)
        assert type(config.training.learning_rate) is float


def test_heads_that_do_not_divide_the_width_are_an_error(complaint: Complain) -> None:
    write("train_config.yaml", S0_FILE)
    found = complaint("train_config.yaml n_head=7")
    assert found == (
        "command line: model.n_embd=768 is not divisible by model.n_head=7; nearest: 763, 770 "
        "[model.n_embd: train_config.yaml:17]"
    )


# --- the base ---------------------------------------------------------------------------------

NANOGPT, TOKEN_FILES = (
    str(ROOT / "configs" / f"{n}.yaml") for n in ("nanogpt", "cs336-tinystories")
)
ON_NANOGPT = [  # files, command line
    ({"a.py": "n_layer = 6"}, "a.py"),
    ({"a.py": "n_layer = 6"}, "--config a.py"),
    ({"a.py": "n_layer = 6", "b.yaml": "system: {device: cpu}"}, "b.yaml a.py"),
    ({"a.yaml": "dataset: x"}, "a.yaml"),
    ({"a.yaml": "bias: true"}, "a.yaml"),
    ({"a.yaml": "bias: true", "b.yaml": "seed: 3"}, "b.yaml a.yaml"),
    ({"config.yaml": "dataset: x"}, ""),
    ({}, "dataset=openwebtext"),
    ({}, "--dataset openwebtext"),
    ({"config.yaml": "training: {seed: 1337}"}, "dataset=openwebtext"),
]
NOT_ON_NANOGPT = [
    ({}, ""),
    ({"a.yaml": "n_layer: 6"}, "a.yaml"),
    ({"a.yaml": "model: {name: gpt, bias: true}"}, "a.yaml"),
    ({"a.yaml": "model: {name: gpt}\ndataset: {name: x}"}, "a.yaml"),
    ({"a.yaml": "model:\ndataset: x"}, "a.yaml"),
    ({"a.yaml": "dataset: x", "b.yaml": "system: {device: cpu}"}, "b.yaml a.yaml"),
    ({"a.yaml": "seed: 3"}, "a.yaml dataset=openwebtext"),
    ({"config.yaml": "training: {seed: 3}"}, "dataset=openwebtext"),
    ({}, "dataset.name=openwebtext"),
    ({}, "dataset=null"),
    ({}, "--train_data_path a.ids"),
    ({}, "--train_data_path a.bin --val_data_path b.bin"),
    ({}, "dataset.train_data_path=a.ids dataset.val_data_path=b.ids"),
]


def write_all(files: dict[str, str]) -> None:
    for name, text in files.items():
        write(name, text)


@pytest.mark.parametrize(("files", "line"), ON_NANOGPT)
def test_names_of_nanogpt_stand_on_its_defaults(ask: Ask, files: dict[str, str], line: str) -> None:
    write_all(files)
    request = ask(line)
    assert request.files[0] == NANOGPT
    assert [note for note in request.notes if NANOGPT in note] == [request.notes[0]]
    check(request.config, model__name="gpt", n_embd=768)


@pytest.mark.parametrize(("files", "line"), NOT_ON_NANOGPT)
def test_other_files_and_names_stand_on_our_defaults(
    ask: Ask, files: dict[str, str], line: str
) -> None:
    write_all(files)
    request = ask(line)
    assert not {NANOGPT, TOKEN_FILES} & set(request.files)
    check(request.config, n_embd=256)


def test_the_line_on_the_base_says_how_to_choose_another(ask: Ask) -> None:
    assert ask("dataset=x").notes[0] == (
        f"dataset=x without a file starts from {NANOGPT}; to start from another file: --config FILE"
    )
    assert (
        ask("--train_data_path a.ids --val_data_path b.ids")
        .notes[0]
        .startswith(
            f"train_data_path=*.ids without a file starts from {TOKEN_FILES}; to start from another"
        )
    )
    write("a.py", "n_layer = 6")
    assert ask("a.py").notes[0] == f"a.py stands on nanoGPT's own defaults, {NANOGPT}"


def test_the_base_may_be_named_or_copied_and_is_shown_as_the_user_would_write_it(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(f"--config {NANOGPT} max_iters=50 dataset=x")
    assert request.files == (NANOGPT,)
    assert request.config == ask("max_iters=50 dataset=x").config
    write("my.yaml", Path(NANOGPT).read_text())
    assert ask("my.yaml").config == ask("dataset=openwebtext").config
    monkeypatch.chdir(ROOT)
    assert command_line(["dataset=x"]).files == ("configs/nanogpt.yaml",)


def test_a_saved_config_reads_back_equal_without_a_base(ask: Ask) -> None:
    write("a.py", "dataset = 'x'\nmax_iters = 50")
    saved = ask("a.py learning_rate=1e-5").config
    write("saved.yaml", saved.to_yaml())
    again = ask("saved.yaml")
    assert (again.config, again.files, again.notes) == (saved, ("saved.yaml",), ())


YIELDING = [
    ("max_iters=50", {"max_iters": 50, "warmup_iters": 1, "lr_decay_iters": None, "min_lr": 6e-5}),
    ("max_iters=100000", {"warmup_iters": 2000, "lr_decay_iters": None}),
    ("max_iters=700000", {"warmup_iters": 2000, "lr_decay_iters": 600000}),
    ("max_iters=900000 warmup_iters=700000", {"warmup_iters": 700000, "lr_decay_iters": None}),
    ("lr_decay_iters=1000", {"warmup_iters": 30, "lr_decay_iters": 1000}),
    ("learning_rate=3e-5", {"min_lr": None, "learning_rate": 3e-5}),
    ("max_iters=50 warmup_iters=7", {"warmup_iters": 7}),
    ("keep_last=null", {"keep_last": None}),
    ("", {"keep_last": 3}),
    ("train_data_path=a.bin", {"dataset__name": None, "train_data_path": "a.bin"}),
    ("parquet_dir=a", {"dataset__name": None, "parquet_dir": "a", "tokenizer__name": "bytes"}),
    ("tokens_per_step=24576", {"tokens_per_step": 24576, "gradient_accumulation_steps": 1}),
]


@pytest.mark.parametrize(("line", "expected"), YIELDING)
def test_the_base_yields_to_what_is_said(ask: Ask, line: str, expected: dict[str, Any]) -> None:
    write("a.py", "n_layer = 6")
    check(ask(f"a.py {line}").config, **expected)


def test_the_base_says_what_it_yields(ask: Ask) -> None:
    notes = ask("dataset=x max_iters=50 learning_rate=1e-5").notes
    assert notes[-3:] == (
        f"schedule.lr_decay_iters=600000 of {NANOGPT} yields to training.max_iters=50: null",
        f"schedule.warmup_iters=2000 of {NANOGPT} yields to training.max_iters=50: 1",
        f"schedule.min_lr=6e-5 of {NANOGPT} yields to training.learning_rate=1e-5: null",
    )
    assert ask("dataset=x lr_decay_iters=1000").notes[-1] == (
        f"schedule.warmup_iters=2000 of {NANOGPT} yields to schedule.lr_decay_iters=1000: 30"
    )
    assert ask("dataset=x tokens_per_step=12288").notes[-1] == (
        "training.tokens_per_step takes the place of gradient_accumulation_steps=40"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_iters = 50\nwarmup_iters = 60", "schedule.warmup_iters=60 is above training.max_it"),
        ("learning_rate = 1e-4\nmin_lr = 1e-3", "schedule.min_lr=1e-3 is above training.learning"),
        (
            "warmup_iters = 600001",
            "schedule.warmup_iters=600001 is above training.max_iters=600000",
        ),
        ("n_embd = 100", "model.n_embd=100 is not divisible by model.n_head=12; nearest: 96, 108"),
    ],
)
def test_what_a_file_says_itself_keeps_our_rules(
    complaint: Complain, text: str, message: str
) -> None:
    write("a.py", text)
    assert complaint("a.py").startswith(f"a.py:{len(text.splitlines())}: {message}")


def test_a_base_that_is_missing_or_broken_is_an_error(
    complaint: Complain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("settings.foreign.nanogpt.DEFAULTS", str(tmp_path / "base.yaml"))
    assert complaint("dataset=x") == "base.yaml: not found. Pass --config FILE."
    write("base.yaml", "n_layer: x")
    assert complaint("dataset=x").startswith("base.yaml:1: model.n_layer: expected a")


# --- gradient accumulation, saving, constant rate as nanoGPT means them -------------------------

ACCUMULATION = [  # files, command line, tokens per step or micro-steps per process
    ({"a.py": "gradient_accumulation_steps = 5 * 8"}, "a.py", 40 * 12 * 1024),
    ({"a.py": "gradient_accumulation_steps = 32\nbatch_size = 1"}, "a.py", 32 * 1024),
    ({"a.py": "batch_size = 8"}, "a.py gradient_accumulation_steps=16", 16 * 8 * 1024),
    ({"a.py": "gradient_accumulation_steps = 40"}, "a.py --batch_size=16", 40 * 16 * 1024),
    ({"a.yaml": "dataset: x"}, "a.yaml", 40 * 12 * 1024),
    ({"a.yaml": "dataset: x\ngradient_accumulation_steps: 3"}, "a.yaml", 3 * 12 * 1024),
    ({"a.yaml": "dataset: x", "b.yaml": "gradient_accumulation_steps: 3"}, "a.yaml b.yaml", 36864),
    ({}, "dataset=x gradient_accumulation_steps=2 block_size=64", 2 * 12 * 64),
    ({}, "dataset=x tokens_per_step=null", 40 * 12 * 1024),
    ({"a.py": "tokens_per_step = 24576"}, "a.py gradient_accumulation_steps=4", 4 * 12 * 1024),
    ({"a.yaml": "seed: 3"}, "a.yaml gradient_accumulation_steps=4", 4),
    ({"a.yaml": "training: {gradient_accumulation_steps: 4}"}, "a.yaml", 4),
    (
        {"a.yaml": "training: {gradient_accumulation_steps: 4}", "b.py": "seed = 3"},
        "a.yaml b.py",
        4,
    ),
]


@pytest.mark.parametrize(("files", "line", "count"), ACCUMULATION)
def test_accumulation_counts_over_all_processes_in_names_of_nanogpt_only(
    ask: Ask, files: dict[str, str], line: str, count: int
) -> None:
    write_all(files)
    training = ask(line).config.training
    found = training.tokens_per_step, training.gradient_accumulation_steps
    assert found == ((None, 4) if count == 4 else (count, 1))


def test_the_formula_of_a_step_is_told(ask: Ask) -> None:
    write("a.py", "gradient_accumulation_steps = 5 * 8")
    request = ask("a.py batch_size=16")
    assert (
        "gradient_accumulation_steps=40 is over all processes, as in nanoGPT: "
        "training.tokens_per_step = 40 * 16 * 1024 = 655360"
    ) in request.notes
    assert [accumulation_steps(request.config, world) for world in (1, 4, 8)] == [40, 10, 5]


def test_a_preset_that_says_nothing_of_accumulation_takes_one_micro_step(ask: Ask) -> None:
    write("a.py", "batch_size = 4\nblock_size = 8\nmax_iters = 5000\n")
    request = ask("a.py")
    assert request.config.training.tokens_per_step == 4 * 8
    warmup = f"schedule.warmup_iters=2000 of {NANOGPT} yields to training.max_iters=5000: 150"
    assert warmup in request.notes


def test_accumulation_is_refused_with_tokens_per_step_in_one_file_and_if_too_large(
    complaint: Complain,
) -> None:
    write("a.py", "gradient_accumulation_steps = 4\ntokens_per_step = 49152")
    assert "exclude each other; set one" in complaint("a.py")
    write("a.py", "gradient_accumulation_steps = 2**62")
    assert "gradient_accumulation_steps: must be in [1, 1000000]" in complaint("a.py")


def test_evaluation_decides_about_saving_as_in_nanogpt(ask: Ask) -> None:
    check(ask("dataset=x").config, test_freq=2000, checkpoint_freq=2000)
    check(ask("dataset=x eval_interval=5").config, test_freq=5, checkpoint_freq=5)
    check(ask("dataset=x test_freq=null").config, test_freq=None, checkpoint_freq=None)
    check(ask("dataset=x checkpoint_freq=70").config, test_freq=2000, checkpoint_freq=70)
    check(ask("eval_interval=5").config, test_freq=5, checkpoint_freq=500)


def test_a_constant_rate_of_nanogpt_is_constant_from_the_start(ask: Ask) -> None:
    write("train_config.yaml", S0_FILE)
    request = ask("train_config.yaml decay_lr=False max_iters=50")
    check(request.config, warmup_iters=0, decay_lr=False)
    assert "schedule.decay_lr=false means no warm-up either, as in nanoGPT" in request.notes
    check(ask("decay_lr=False warmup_iters=9").config, warmup_iters=9)


# --- S1: Python presets -------------------------------------------------------------------------

TRAIN_GPT2 = """\
# config for training GPT-2 (124M): 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
"""
SHAKESPEARE_CHAR = """\
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200
log_interval = 10 # don't print too too often
always_save_checkpoint = False
wandb_log = False # override via command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256 # context of up to 256 previous characters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3 # with baby networks can afford to go a bit higher
max_iters = 5000
lr_decay_iters = 5000 # make equal to max_iters usually
min_lr = 1e-4 # learning_rate / 10 usually
beta2 = 0.99 # make a bit bigger because number of tokens per iter is small
warmup_iters = 100 # not super necessary potentially
# device = 'cpu'  # run on cpu only
"""
FINETUNE_SHAKESPEARE = """\
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
"""
EVAL = "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = '{}'\n"
THEIRS = {  # nanoGPT's preset -> its text
    "train_gpt2.py": TRAIN_GPT2,
    "train_shakespeare_char.py": SHAKESPEARE_CHAR,
    "finetune_shakespeare.py": FINETUNE_SHAKESPEARE,
    "eval_gpt2.py": EVAL.format("gpt2"),
    "eval_gpt2_medium.py": EVAL.format("gpt2-medium"),
    "eval_gpt2_large.py": EVAL.format("gpt2-large"),
    "eval_gpt2_xl.py": EVAL.format("gpt2-xl"),
}
# What differs between nanoGPT's preset and ours besides the words for it.
FREE = {"system.compile"}  # ours: where it pays
APART = {
    "train_gpt2.py": {"tokenizer.vocab_multiple", "training.checkpoint_dir"},
    "train_shakespeare_char.py": {"training.tokens_per_step"},
    "finetune_shakespeare.py": {"logging.wandb_project", "schedule.lr_decay_iters"},
}
OF_THE_WEIGHTS = {f"model.{name}" for name in ("n_layer", "n_head", "n_embd", "bias", "activation")}
NOT_OF_AN_EVALUATION = {
    *("training.tokens_per_step", "training.max_iters", "training.learning_rate"),
    *("training.log_freq", "training.test_freq", "training.checkpoint_freq"),
    "training.keep_last",
    *("schedule.warmup_iters", "schedule.lr_decay_iters", "schedule.min_lr"),
    *("training.checkpoint_dir", "logging.wandb_project", "logging.wandb_run_name"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_presets_of_nanogpt_mean_what_ours_mean(ask: Ask, name: str) -> None:
    write(f"config/{name}", THEIRS[name])
    theirs = ask(f"config/{name}").config
    ours = ask(str(ROOT / "configs" / PRESETS[name])).config
    free = APART.get(name, NOT_OF_AN_EVALUATION) | FREE
    free |= OF_THE_WEIGHTS if ours.training.init_from != "scratch" else set()
    assert differences(theirs, ours) <= free


def test_presets_of_nanogpt_give_the_values_of_their_documentation(ask: Ask) -> None:
    for name, text in THEIRS.items():
        write(f"config/{name}", text)
    config = ask("config/train_gpt2.py").config
    check(config, tokens_per_step=491520, max_iters=600000, weight_decay=0.1, wandb_log=True)
    check(config, wandb_project="owt", wandb_run_name="gpt2-124M", dataset__name="openwebtext")
    config = ask("config/train_shakespeare_char.py").config
    check(config, checkpoint_dir="out-shakespeare-char", n_layer=6, n_head=6, n_embd=384)
    check(config, block_size=256, batch_size=64, max_iters=5000, learning_rate=1e-3, dropout=0.2)
    check(config, always_save_checkpoint=False, dataset__name="shakespeare_char", test_freq=250)
    config = ask("config/finetune_shakespeare.py").config
    check(config, init_from="gpt2-xl", tokens_per_step=32768, max_iters=20, learning_rate=3e-5)
    check(config, decay_lr=False, test_freq=5, eval_iters=40, always_save_checkpoint=False)
    for size in ("", "-medium", "-large", "-xl"):
        config = ask(f"config/eval_gpt2{size.replace('-', '_')}.py").config
        check(config, init_from=f"gpt2{size}", batch_size=8, eval_iters=500, eval_only=True)
        check(config, wandb_log=False, model__name="gpt", block_size=1024)


S1_COMMANDS: list[tuple[str, dict[str, Any]]] = [
    (
        "config/train_shakespeare_char.py --device=cpu --compile=False",
        {"device": "cpu", "compile": False, "batch_size": 64},
    ),
    (
        "config/train_gpt2.py --batch_size=16 --learning_rate=5e-4",
        {"batch_size": 16, "learning_rate": 5e-4, "tokens_per_step": 655360},
    ),
    (
        "config/finetune_shakespeare.py --dataset=my_custom_dataset --max_iters=50",
        {"dataset__name": "my_custom_dataset", "max_iters": 50, "warmup_iters": 0, "min_lr": None},
    ),
    ("config/eval_gpt2_xl.py", {"init_from": "gpt2-xl", "eval_only": True}),
]


@pytest.mark.parametrize(("line", "expected"), S1_COMMANDS)
def test_commands_of_nanogpt_work_with_its_presets_and_ours(
    ask: Ask, line: str, expected: dict[str, Any]
) -> None:
    write_all({f"config/{name}": text for name, text in THEIRS.items()})
    check(ask(line).config, **expected)
    name, *overrides = line.removeprefix("config/").split(" ", 1)
    if name != "train_gpt2.py":  # ours fixes tokens_per_step
        ours = ask(f"{ROOT}/configs/{PRESETS[name]} {' '.join(overrides)}")
        check(ours.config, **expected)


CUSTOM = """\
# config/train_my_model.py
# Train medium-sized GPT on custom dataset

out_dir = 'out-my-model'
wandb_log = True
wandb_project = 'my-project'
wandb_run_name = 'gpt-medium-custom'

dataset = 'my_dataset'
batch_size = 8
block_size = 512
gradient_accumulation_steps = 16

# Medium model
n_layer = 8
n_head = 8
n_embd = 512
dropout = 0.1

learning_rate = 5e-4
max_iters = 50000
lr_decay_iters = 50000
warmup_iters = 1000

eval_interval = 500
"""


def test_the_custom_preset_of_the_documentation_runs_as_written(ask: Ask) -> None:
    write("config/train_my_model.py", CUSTOM)
    request = ask("config/train_my_model.py")
    assert request.files == (NANOGPT, "config/train_my_model.py")
    check(request.config, n_layer=8, n_head=8, n_embd=512, dropout=0.1, block_size=512)
    check(request.config, batch_size=8, tokens_per_step=16 * 8 * 512, learning_rate=5e-4)
    check(request.config, max_iters=50000, lr_decay_iters=50000, warmup_iters=1000, test_freq=500)
    check(request.config, checkpoint_dir="out-my-model", wandb_log=True, dataset__name="my_dataset")
    check(request.config, wandb_project="my-project", wandb_run_name="gpt-medium-custom")


def test_files_are_chained_in_order_and_the_command_line_is_last(ask: Ask) -> None:
    write("config/one.py", "batch_size = 8\nn_layer = 6\nseed = 1")
    write("config/two.py", "n_layer = 7\nseed = 2")
    write("three.yaml", "seed: 3")
    request = ask("config/one.py config/two.py three.yaml --seed=4")
    assert request.files[1:] == ("config/one.py", "config/two.py", "three.yaml")
    check(request.config, batch_size=8, n_layer=7, seed=4)


NANOGPT_NAMES = """
    out_dir wandb_log wandb_project wandb_run_name eval_interval eval_iters log_interval
    always_save_checkpoint dataset batch_size block_size gradient_accumulation_steps n_layer n_head
    n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr
    warmup_iters lr_decay_iters min_lr init_from eval_only backend device dtype compile
"""


def test_every_name_of_nanogpt_is_known(ask: Ask) -> None:
    assert set(NANOGPT_NAMES.split()) == set(re.findall(r"^(\w+):", S0_FILE, re.M))
    write("all.py", re.sub(r"^(\w+): ", r"\1 = ", S0_FILE, flags=re.M))
    write("train_config.yaml", S0_FILE)
    assert ask("all.py").config == ask("train_config.yaml").config


# --- the reader of presets ----------------------------------------------------------------------

LITERALS: list[tuple[str, dict[str, Any]]] = [
    ("max_iters = 5 * 8", {"max_iters": 40}),
    ("max_iters = 480 / 40", {"max_iters": 12}),
    ("max_iters = 2**10 - 1 + 7 // 2 % 2", {"max_iters": 1024}),
    ("max_iters = 6e5", {"max_iters": 600000}),
    ("max_iters = 0x10", {"max_iters": 16}),
    ("batch_size = 4\nmax_iters = batch_size * 10", {"max_iters": 40, "batch_size": 4}),
    ("learning_rate: float = 1e-3", {"learning_rate": 1e-3}),
    ("learning_rate = 1", {"learning_rate": 1.0}),
    ("'''text'''\nseed = +3  # comment", {"seed": 3}),
    ("seed = - -3", {"seed": 3}),
    ("betas = (0.8, 1 - 0.25)", {"beta1": 0.8, "beta2": 0.75}),
    ("betas = [0.8, 0.75]", {"beta1": 0.8, "beta2": 0.75}),
    ("dataset = 'a' 'b'", {"dataset__name": "ab"}),
    ("out_dir = 'out-' + 'x'", {"checkpoint_dir": "out-x"}),
    ("wandb_run_name = None", {"wandb_run_name": None}),
    ("compile = False; seed = 3", {"compile": False, "seed": 3}),
    ("dtype = 'float16'", {"compute_dtype": "float16"}),
    ("flash = True", {"attention": "flash"}),
    ("import time\nwandb_run_name = str(time.time())", {"wandb_run_name": None}),
    ("# -*- coding: latin-1 -*-\nout_dir = 'é'", {"checkpoint_dir": "é"}),
]


@pytest.mark.parametrize(("text", "expected"), LITERALS)
def test_a_preset_holds_literals_and_arithmetic(
    ask: Ask, text: str, expected: dict[str, Any]
) -> None:
    write("a.py", text)
    check(ask("a.py max_iters=70000" if "max_iters" not in text else "a.py").config, **expected)


def test_a_run_named_after_the_time_gets_the_name_of_its_folder(ask: Ask) -> None:
    write("a.py", FINETUNE_SHAKESPEARE)
    note = "a.py:8: wandb_run_name holds the time; the run's folder gives the name"
    assert note in ask("a.py").notes


READ_NOT_RUN = "presets are read, not run: only NAME = a literal or arithmetic on earlier names."
REFUSED = [  # text, line, statement, reason
    ("import os", 1, "'import os'", READ_NOT_RUN),
    ("x()", 1, "'x()'", READ_NOT_RUN),
    ("seed = 1\nif seed:\n    seed = 2", 2, "'if seed:'", READ_NOT_RUN),
    ("out_dir = f'out'", 1, "'out_dir = f'out''", READ_NOT_RUN),
    ("out_dir = str(time.time())", 1, "'out_dir = str(time.time())'", READ_NOT_RUN),
    ("out_dir = open('pwned', 'w')", 1, "'out_dir = open('pwned', 'w')'", READ_NOT_RUN),
    ("seed = int('3')", 1, "'seed = int('3')'", READ_NOT_RUN),
    ("seed = n_layer", 1, "'seed = n_layer'", READ_NOT_RUN),
    ("seed += 1", 1, "'seed += 1'", READ_NOT_RUN),
    ("seed, n_layer = 3, 4", 1, "'seed, n_layer = 3, 4'", READ_NOT_RUN),
    ("seed = 3 if True else 4", 1, "'seed = 3 if True else 4'", READ_NOT_RUN),
    ("seed = 3 | 4", 1, "'seed = 3 | 4'", READ_NOT_RUN),
    ("out_dir = b'x'", 1, "'out_dir = b'x''", READ_NOT_RUN),
    ("betas = {0.9, 0.95}", 1, "'betas = {0.9, 0.95}'", READ_NOT_RUN),
    ("betas = ((1, 2), 3)", 1, "'betas = ((1, 2), 3)'", READ_NOT_RUN),
    ("betas = (1, 2)\nbeta1 = (betas, 3)", 2, "'beta1 = (betas, 3)'", "a list inside a list."),
    ("seed = 'a' * 3", 1, "'seed = 'a' * 3'", "arithmetic on 'a'."),
    ("seed = True + 1", 1, "'seed = True + 1'", "arithmetic on true."),
    ("seed = 1 / 0", 1, "'seed = 1 / 0'", "division by zero."),
    ("seed = 9 ** 9 ** 9", 1, "'seed = 9 ** 9 ** 9'", "larger than 2**63 - 1."),
    ("dropout = (-1) ** 0.5", 1, "'dropout = (-1) ** 0.5'", "is not a real number."),
    ("dropout = 1e999 - 1e999", 1, "'dropout = 1e999 - 1e999'", "is not a real number."),
    ("seed = " + "-" * 60 + "1", 1, f"'seed = {'-' * 53}...'", "nested more than 50 levels deep."),
    (
        "dataset = '" + "x" * 600 + "'\nout_dir = dataset + dataset",
        2,
        "'out_dir = dataset + dataset'",
        "a text of more than 1000 characters.",
    ),
]


@pytest.mark.parametrize(("text", "line", "statement", "reason"), REFUSED)
def test_anything_else_in_a_preset_is_an_error_with_its_place(
    complaint: Complain, text: str, line: int, statement: str, reason: str
) -> None:
    write("a.py", text)
    found = complaint("a.py").splitlines()
    assert f"a.py:{line}: {statement}: {reason}" in found
    assert not Path("pwned").exists()


MISTAKES = [
    ("n_layerz = 6", "a.py:1: n_layerz: unknown option. Did you mean model.n_layer?"),
    ("seed = 1\nseed = 2", "a.py:2: training.seed: given twice (first at line 1). Keep one."),
    ("compile = 'False'", "a.py:1: system.compile: expected true, false or auto, got the text"),
    ("seed = 1.5", "a.py:1: training.seed: expected a whole number, got 1.5. The default is"),
    ("dropout = None", "a.py:1: model.dropout: expected a number, got null. The default is 0.1."),
    ("dropout = (1, 2)", "a.py:1: model.dropout: expected a number, got a list of 2."),
    ("betas = 0.9", "betas: expected a list of 2 numbers (optimizer.beta1, optimizer.beta2), "),
    ("dataset = 3", "a.py:1: dataset.name (given as dataset): expected text, got 3."),
    ("training = 'gpt'", "a.py:1: training: expected a section ('option: value' lines below it)"),
    ("seed = ", "a.py:1:8: not valid Python: invalid syntax: 'seed ='."),
    ("seed = \0", "a.py: not valid Python: source code string cannot contain null bytes."),
    ("#" * (MAX_PRESET_BYTES + 1), "a.py: refused: larger than 50 KB."),
    ("seed = " + "-" * 40_000 + "1", "nested more than 50 levels deep."),
    ("seed = " + "(" * 300 + ")" * 300, "not valid Python: too many nested paren"),
    ("seed = 1" + "+1" * 20_000, "nested more than 50 levels deep."),
    ("seed = " + "9" * 5000, "a.py:1"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=lambda value: value[:30])
def test_mistakes_in_a_preset_are_named_with_their_place(
    complaint: Complain, text: str, message: str
) -> None:
    write("a.py", text)
    found = complaint("a.py")
    assert message in found and len(found.splitlines()) == 1 and len(found) < 350


def test_all_problems_of_a_preset_are_told_in_order(complaint: Complain) -> None:
    write("a.py", "import os\nseed = 'x'\nn_layrs = 3\nx()")
    found = complaint("a.py lr=off").splitlines()
    assert [line.split(": ")[0] for line in found] == [
        *(f"a.py:{n}" for n in range(1, 5)),
        "command line",
    ]


def test_a_missing_preset_of_nanogpt_has_its_like_here(complaint: Complain) -> None:
    for theirs, ours in PRESETS.items():
        assert complaint(f"config/{theirs}") == (
            f"config/{theirs}: not found. Pass --config FILE. The same in this project: "
            f"configs/{ours}."
        )
        assert (ROOT / "configs" / ours).is_file()
    assert complaint("no.py") == "no.py: not found. Pass --config FILE."


PIECES = [*"=1()[]-+,\n: \\#\t", "seed", "'a'", "**", "wandb_run_name", "f'{1}'", "None"]
PIECES += ["import time", "str(time.time())"]


@pytest.mark.slow
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_preset_is_read_or_refused_in_words(tmp_path_factory: Any, pieces: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_bytes("".join(pieces).encode("utf-8", "surrogatepass"))
    _, problems, _ = read_preset(str(path), 1)
    assert all(str(problem) for problem in problems)
    try:
        Config.from_yaml(path)
    except ConfigError as error:
        assert str(error)


# --- S2: flags ----------------------------------------------------------------------------------

IDS = (
    "--train_data_path data/TinyStoriesV2-GPT4-train.ids "
    "--val_data_path data/TinyStoriesV2-GPT4-valid.ids "
)
S2_DEFAULTS: dict[str, tuple[str, Any]] = {  # flag -> option, default of its document
    "vocab_size": ("model.vocab_size", 10000),
    "context_length": ("training.block_size", 256),
    "d_model": ("model.n_embd", 512),
    "num_heads": ("model.n_head", 8),
    "d_ff": ("model.d_ff", 2048),
    "num_layers": ("model.n_layer", 6),
    "rope_theta": ("model.rope_theta", 10000.0),
    "lr": ("training.learning_rate", 6e-4),
    "min_lr": ("schedule.min_lr", 6e-5),
    "weight_decay": ("training.weight_decay", 0.1),
    "beta1": ("optimizer.beta1", 0.9),
    "beta2": ("optimizer.beta2", 0.95),
    "eps": ("optimizer.eps", 1e-8),
    "batch_size": ("training.batch_size", 64),
    "max_iters": ("training.max_iters", 100000),
    "warmup_iters": ("schedule.warmup_iters", 2000),
    "grad_clip": ("optimizer.grad_clip", 1.0),
    "checkpoint_dir": ("training.checkpoint_dir", "checkpoints"),
    "checkpoint_interval": ("training.checkpoint_freq", 5000),
    "eval_interval": ("training.test_freq", 500),
    "log_interval": ("training.log_freq", 100),
    "eval_iters": ("training.eval_iters", 100),
    "resume_from": ("training.resume_from_checkpoint", None),
    "device": ("system.device", "auto"),
    "seed": ("training.seed", 42),
    "use_wandb": ("logging.wandb_log", False),
    "wandb_project": ("logging.wandb_project", "transformer-lm"),
    "wandb_run_name": ("logging.wandb_run_name", None),
}


def test_two_ids_files_give_the_defaults_of_the_flags(ask: Ask) -> None:
    request = ask(IDS)
    assert request.files == (TOKEN_FILES,)
    values = options(request.config)
    for flag, (key, default) in S2_DEFAULTS.items():
        assert values[key] == default, flag
    check(request.config, model__name="llama", dropout=0.0, tokenizer__name="auto")
    check(request.config, train_data_path="data/TinyStoriesV2-GPT4-train.ids")
    check(request.config, val_data_path="data/TinyStoriesV2-GPT4-valid.ids")


OTHER: dict[str, Any] = {  # half of the default would not do
    "resume_from": "a/b.pt",
    "device": "cuda",
    "use_wandb": True,
    "checkpoint_dir": "x",
    "wandb_project": "p",
    "wandb_run_name": "r",
}


def test_every_flag_is_read_at_its_default_and_at_another_value(ask: Ask) -> None:
    plain = ask(IDS).config
    for flag, (key, default) in S2_DEFAULTS.items():
        assert ask(f"{IDS} --{flag} {default}").config == plain
        other = OTHER[flag] if flag in OTHER else default / 2
        other = round(other) if isinstance(default, int) and flag not in OTHER else other
        assert options(ask(f"{IDS} --{flag} {other}").config)[key] == other


S2_COMMANDS: list[tuple[str, dict[str, Any]]] = [
    (f"{IDS} --vocab_size 10000 --max_iters 10000", {"max_iters": 10000, "warmup_iters": 2000}),
    (
        f"{IDS} --vocab_size 10000 --context_length 512 --d_model 768 --num_heads 12 --d_ff 3072 "
        "--num_layers 12 --lr 3e-4 --min_lr 3e-5 --weight_decay 0.1 --batch_size 32 "
        "--max_iters 100000 --checkpoint_dir checkpoints/my_run --use_wandb "
        "--wandb_project my-project",
        {"block_size": 512, "n_embd": 768, "n_head": 12, "d_ff": 3072, "n_layer": 12}
        | {"learning_rate": 3e-4, "min_lr": 3e-5, "weight_decay": 0.1, "batch_size": 32}
        | {
            "checkpoint_dir": "checkpoints/my_run",
            "wandb_log": True,
            "wandb_project": "my-project",
        },
    ),
    (
        f"{IDS} --resume_from checkpoints/my_run/checkpoint_iter_5000.pt --max_iters 20000",
        {
            "resume_from_checkpoint": "checkpoints/my_run/checkpoint_iter_5000.pt",
            "max_iters": 20000,
        },
    ),
    (
        f"{IDS} --vocab_size 10000 --d_model 256 --num_layers 4 --batch_size 32 --max_iters 1000",
        {"n_embd": 256, "n_layer": 4, "batch_size": 32, "max_iters": 1000, "warmup_iters": 30},
    ),
]
S2_PRODUCTION = (
    f"{IDS} --vocab_size 10000 --context_length 1024 --d_model 1024 --num_heads 16 --d_ff 4096 "
    "--num_layers 24 --lr 2e-4 --min_lr 2e-5 --batch_size 16 --max_iters 200000 "
    "--checkpoint_interval 2500 --eval_interval 250 --checkpoint_dir checkpoints/large_model "
    "--use_wandb --wandb_project cs336-final --wandb_run_name large-model-v1"
)


@pytest.mark.parametrize(("line", "expected"), S2_COMMANDS)
def test_commands_of_the_flags_work(ask: Ask, line: str, expected: dict[str, Any]) -> None:
    check(ask(line).config, model__name="llama", **expected)


def test_the_production_command_is_the_large_preset(ask: Ask) -> None:
    assert ask(S2_PRODUCTION).config == ask(str(ROOT / "configs/cs336-large.yaml")).config


# --- S4: sections -------------------------------------------------------------------------------

S4_FILE = """\
datasets:
  name: algebraic-stack
  path: "/path/to/data"
  tokenizer_used: t5-base

model:
  name: gpt
  n_head: 4
  d_model: 512
  n_layer: 8
  dropout_p: 0.0
  context_length: 512
  autocast_precision: bfloat16
  flash: False
  flex: True
  mlp_scale_factor: 4
  mlp_bias: True
  attn_bias: False
  proj_bias: True
  ln_bias: True
  cls_head_bias: True
  activation: relu
  mask: causal_document

optimizer:
  name: AdamW
  lr: 0.0001
  weight_decay: 0.01
  betas: [0.9, 0.999]
  eps: 1e-8
  precision: float32

tokenizer:
  name: t5-base
  vocab_size: 32128

training:
  epochs: 1
  train_steps: 100000
  batch_size: 256
  log_interval: 20
  shuffle: True
  save_model: True
  save_every: 3600
  artifacts_path: /path/to/artifacts
  use_oracle: False

wandb_log:
  name: tmrc_log

HydraConf:
  version_base: "1.1"
"""


def test_the_sections_of_tmrc_give_the_values_they_document(ask: Ask) -> None:
    write("tmrc.yaml", S4_FILE)
    request = ask("tmrc.yaml")
    config = request.config
    assert request.files == ("tmrc.yaml",)
    check(config, parquet_dir="/path/to/data", dataset__name=None, tokenizer__name="t5-base")
    check(config, model__name="gpt", n_head=4, n_embd=512, n_layer=8, dropout=0.0, block_size=512)
    check(config, compute_dtype="bfloat16", attention="flex", mlp_scale_factor=4, mlp_bias=True)
    check(config, attn_bias=False, proj_bias=True, ln_bias=True, cls_head_bias=True)
    check(config, activation="relu", mask="causal_document", optimizer__name="adamw")
    check(config, learning_rate=1e-4, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8)
    check(config, vocab_size=32128, epochs=1, max_iters=100000, batch_size=256, log_freq=20)
    check(config, shuffle=True, save_model=True, save_every=3600.0, use_oracle=False)
    check(config, checkpoint_dir="/path/to/artifacts", wandb_log=True, wandb_run_name="tmrc_log")
    for note in (
        "optimizer.precision=float32 changes nothing in this version",
        "HydraConf is ignored: there is no Hydra here",
        "model.flash and model.flex are read as model.attention=flex",
        "wandb_log.name turns logging.wandb_log on",
        "datasets.name=algebraic-stack is a label beside datasets.path: ignored",
    ):
        assert note in request.notes
    assert "datasets.name is read as dataset.name" not in request.notes


KERNELS = [
    ("flash: true", "", "flash"),
    ("flex: true", "", "flex"),
    ("flash: false", "", "auto"),
    ("flash: false\n  flex: false", "", "auto"),
    ("flash: true\n  flex: false", "", "flash"),
    ("flash: true\n  attention: flash", "", "flash"),
    ("flash: true", "attention=math", "math"),
    ("flash: true", "flash=false --flex", "flex"),
    ("flash: true", "flash=false", "auto"),
    ("flex: true", "flash=false", "flex"),
    ("attention: math", "--flash", "flash"),
]


def test_two_switches_choose_the_kernel(ask: Ask) -> None:
    for text, line, kernel in KERNELS:
        write("my.yaml", f"model:\n  name: gpt\n  {text}\n")
        check(ask(f"my.yaml {line}").config, attention=kernel)


TMRC_NOTES = [
    ("model: {name: gpt, flash: true}", "", "model.flash is read as model.attention=flash"),
    ("datasets: {tokenizer_used: gpt2}", "", "dataset.tokenizer_used is read as tokenizer.name"),
    (
        "dataset: {name: a}",
        "parquet_dir=b",
        "dataset.parquet_dir takes the place of dataset.name=a",
    ),
    (
        "dataset: {train_data_path: a, val_data_path: b}",
        "parquet_dir=c",
        "dataset.parquet_dir takes the place of dataset.val_data_path=b",
    ),
]


def test_what_is_translated_is_told(ask: Ask) -> None:
    for text, line, note in TMRC_NOTES:
        write("my.yaml", text)
        assert note in ask(f"my.yaml {line}").notes


TMRC_MISTAKES = [
    (
        "model: {name: gpt, flash: true, flex: true}",
        "my.yaml:1: model.flash=true and model.flex=true exclude each other; set one to false.",
    ),
    (
        "model: {name: gpt, flash: true, attention: math}",
        "my.yaml:1: model.flash: same as model.attention=flash, but model.attention=math. Keep",
    ),
    ("model: {flash: maybe}", "my.yaml:1: model.flash: expected true or false, got 'maybe'."),
    ("model: {flsh: true}", "my.yaml:1: model.flsh: unknown option. Did you mean flash?"),
    ("flsh: true", "my.yaml:1: flsh: unknown option. Did you mean model.flash?"),
    (
        "datasets: {tokenizer_used: t5-base}\ntokenizer: {name: gpt2}",
        "my.yaml:2: dataset.tokenizer_used=t5-base made the tokens, but tokenizer.name=gpt2; set",
    ),
    ("optimizer: {precision: bfloat16}", "optimizer.precision: not available in this version."),
    (
        "optimizer: {name: lion}",
        "optimizer.name: expected one of adamw, adamw_8bit, muon, got 'lion'.",
    ),
    (
        "model: {name: gpt, flash: true, mask: causal_document}",
        "model.attention=flash cannot keep documents apart, as model.mask=causal_document asks",
    ),
]


@pytest.mark.parametrize(("text", "message"), TMRC_MISTAKES)
def test_mistakes_in_the_sections_of_tmrc_name_both_keys(
    complaint: Complain, text: str, message: str
) -> None:
    write("my.yaml", text)
    found = complaint("my.yaml")
    assert message in found and len(found.splitlines()) == 1


TEXTS: list[tuple[str, str, dict[str, Any]]] = [
    ("datasets: {name: a}", "", {"dataset__name": "a", "tokenizer__name": "auto"}),
    ("datasets: {name: a, path: b}", "dataset=c", {"dataset__name": "c", "parquet_dir": "b"}),
    ("dataset: {name: a, path: b}", "", {"dataset__name": None, "parquet_dir": "b"}),
    ("dataset: {name: a, parquet_dir: b}", "", {"dataset__name": "a", "parquet_dir": "b"}),
    ("datasets: {name: a}", "datasets.path=b", {"dataset__name": None, "parquet_dir": "b"}),
    ("datasets: {tokenizer_used: gpt2}", "", {"tokenizer__name": "gpt2", "vocab_size": None}),
    (
        "datasets: {tokenizer_used: gpt2}\ntokenizer: {name: gpt2}",
        "",
        {"tokenizer__name": "gpt2"},
    ),
    (
        "datasets: {tokenizer_used: gpt2, name: a}\ntokenizer: {name: auto}",
        "",
        {"tokenizer__name": "gpt2"},
    ),
    ("datasets: {tokenizer_used: null}", "", {"tokenizer__name": "bytes"}),
]


def test_the_text_is_where_the_last_word_says(ask: Ask) -> None:
    for text, line, expected in TEXTS:
        write("my.yaml", text)
        check(ask(f"my.yaml {line}").config, **expected)


LOGS: list[tuple[str, str, bool, str | None]] = [
    ("wandb_log: {name: a}", "", True, "a"),
    ("wandb_log: {name: a}", "wandb_log=False", False, "a"),
    ("wandb_log: {name: a}\nuse_wandb: false", "", False, "a"),
    ("wandb_log: {name: null}", "", True, None),
    ("wandb_log: true", "", True, None),
    ("wandb_log: false", "wandb_log.name=a", True, "a"),
    ("wandb_run_name: a", "", False, "a"),
    ("wandb_log:", "", False, None),
]


def test_the_log_is_a_switch_or_a_section(ask: Ask) -> None:
    for text, line, on, name in LOGS:
        write("my.yaml", text)
        check(ask(f"my.yaml {line}").config, wandb_log=on, wandb_run_name=name)


# --- configs/ -----------------------------------------------------------------------------------


def head(path: Path) -> str:
    """The comment lines at the top, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] for line in takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_is_read_and_says_what_it_is(
    path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert len(CONFIGS) == 13
    config = ask(str(path)).config
    trial = ask(f"{path} max_iters=50").config
    assert trial.training.max_iters == 50 and warmup_steps(trial) <= 1
    text = head(path)
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100
    commands = re.findall(r"^ {3}(?:python|torchrun.*?) train\.py (.*)$", text, re.M)
    assert any(f"configs/{path.name}" in line for line in commands)
    for line in commands:
        ask(line)
    if path.stem == "quickstart":
        return
    words = " ".join(text.split())
    assert "Hardware" in words and re.search(r"[Tt]ime", words) and "utcome" in words
    products = re.findall(r"((?:[\d,]+ x )+[\d,]+) = ([\d,]+) tokens", words)
    training = config.training
    step = training.tokens_per_step or training.batch_size * training.block_size
    for factors, product in products:
        sizes = [int(n.replace(",", "")) for n in factors.split(" x ")]
        assert sizes[:2] == [training.batch_size, training.block_size]
        assert int(product.replace(",", "")) == step == prod(sizes)
    assert products or training.eval_only


def test_numbers_in_the_comments_of_presets_are_their_values(ask: Ask) -> None:
    def preset(name: str) -> tuple[Config, str]:
        path = ROOT / "configs" / f"{name}.yaml"
        return ask(str(path)).config, " ".join(head(path).split())

    config, words = preset("gpt2-124m")
    assert "600,000 steps are 300B tokens" in words and config.training.max_iters == 600_000
    assert 290e9 < config.training.max_iters * (config.training.tokens_per_step or 0) < 300e9
    config, words = preset("finetune-shakespeare")
    assert "20 steps are about 2.2 epochs of 301,966 tokens" in words
    assert round(config.training.max_iters * 32768 / 301_966, 1) == 2.2
    config, words = preset("tmrc-default")
    assert "one epoch or 100,000 steps" in words and "every 3,600 seconds" in words
    assert (config.training.epochs, config.training.max_iters) == (1, 100_000)
    assert config.training.save_every == 3600
    for size in ("", "-medium", "-large", "-xl"):
        config, words = preset(f"eval-gpt2{size}")
        assert "500 batches of 8 x 1,024 tokens" in words
        check(config, eval_iters=500, batch_size=8, block_size=1024, eval_only=True)


SHAPES = {
    "eval-gpt2": (12, 12, 768, "124M"),
    "eval-gpt2-medium": (24, 16, 1024, "350M"),
    "eval-gpt2-large": (36, 20, 1280, "774M"),
    "eval-gpt2-xl": (48, 25, 1600, "1558M"),
    "finetune-shakespeare": (48, 25, 1600, "1558M"),
}


def test_presets_of_pretrained_models_state_their_shape(ask: Ask) -> None:
    for name, (n_layer, n_head, n_embd, size) in SHAPES.items():
        path = ROOT / "configs" / f"{name}.yaml"
        config = ask(str(path)).config
        check(config, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        check(config, bias=True, activation="gelu_tanh")
        assert f"{size} parameters" in head(path)
        weights = 12 * n_layer * n_embd**2 + (50257 + 1024) * n_embd
        assert weights == pytest.approx(int(size[:-1]) * 1e6, rel=0.02)


def test_the_preset_of_bdh_is_the_defaults(ask: Ask) -> None:
    assert ask(str(ROOT / "configs/bdh-default.yaml")).config == Config()
