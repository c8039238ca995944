"""Whole runs in each mode of low precision: it takes effect, is told, is measured, and resumes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from config import Config
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.trained_model import load_model
from engine.precision.lora import apply_lora
from model import build_model
from tests.engine.test_distributed import processes
from tests.runs import assert_equal, metrics, only_run, run_here

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow
MODES: dict[str, tuple[list[str], list[str]]] = {  # options, and what a run with them tells
    "fp8": (
        ["use_fp8=true"],
        ["fp8: 3 of 4 matmuls, native, current scaling; lm_head ", "matmuls in a trial step"],
    ),
    "fp8 delayed": (
        ["use_fp8=true", "fp8.amax_history_len=8", "fp8.format=e4m3"],
        ["fp8: 3 of 4 matmuls, native, delayed scaling; lm_head "],
    ),
    "fp8 gpt": (
        ["use_fp8=true", "model.name=gpt", "fp8.recipe=delayed"],
        ["fp8: 8 of 9 matmuls, native, delayed scaling; lm_head "],
    ),
    "4-bit weights": (
        ["use_4bit=true", "quantize_after=0.4"],
        [
            "4-bit weights: 3 of 5 tensors, 49,152 of 65,536 parameters (nf4, double "
            "quantization, from step 5); embedding and head left out",
            " | in 4 bits: ",
        ],
    ),
    "4-bit weights llama": (
        ["use_4bit=true", "model.name=llama", "quantization_type=fp4"],
        ["4-bit weights: 8 of 15 tensors", "(fp4, double quantization, from "],
    ),
    "4-bit optimizer": (
        ["use_4bit_optimizer=true"],
        ["AdamW with 4-bit moments: 1.01", " bytes for each of 65,536 parameters; 0 "],
    ),
    "8-bit optimizer": (
        ["optimizer.name=adamw_8bit", "model.name=gpt"],
        ["AdamW with 8-bit moments: 2.1", " bytes for each of "],
    ),
    "all": (
        ["use_fp8=true", "use_4bit=true", "use_4bit_optimizer=true", "quantize_after=0.5"],
        ["AdamW with 4-bit moments", "4-bit weights: 3 of 5", "fp8: 3 of 4 matmuls"],
    ),
}


@pytest.fixture
def small(tiny: list[str], tmp_path: Path) -> list[str]:
    """A run of 10 steps whose matrices are large enough for moments in few bits."""
    shape = ["n_embd=32", "n_head=2", "n_layer=2"]
    return [*tiny, *shape, "max_iters=10", "test_freq=4", "checkpoint_freq=4", "log_freq=2"]


def changed(words: list[str], *changes: str) -> list[str]:
    """The words with other values for the options of `changes`."""
    keys = {word.split("=")[0] for word in changes}
    return [*(word for word in words if word.split("=")[0] not in keys), *changes]


def words_of(mode: str, small: list[str]) -> list[str]:
    words = [*small, *MODES[mode][0]]
    if not any(word.startswith("model.name") for word in words):
        return [*words, "mlp_internal_dim_multiplier=16"]
    config = Path(small[0])
    config.write_text(config.read_text().replace(", mlp_internal_dim_multiplier: 4", ""))
    return words


def resumed_from_step_4(words: list[str], straight: Path, folder: Path) -> Path:
    """A copy of a run of 10 steps that lost its later checkpoints and was resumed."""
    run = folder / straight.name
    shutil.copytree(straight, run)
    for step in (8, 10):
        for end in ("pt", "json"):
            (run / f"checkpoint_{step}.{end}").unlink()
    assert run_here([*words, f"checkpoint_dir={folder}", f"resume_from_checkpoint={run}"]) == 0
    return run


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_told_and_an_interrupted_run_equals_the_straight_one(
    small: list[str], tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(mode, small)
    assert run_here([*words, f"checkpoint_dir={tmp_path / 'straight'}"]) == 0
    output = capsys.readouterr().out
    for line in MODES[mode][1]:
        assert line in output, line
    straight = only_run(tmp_path / "straight")
    run = resumed_from_step_4(words, straight, tmp_path / "stopped")
    assert "Resumed from checkpoint_4.pt" in capsys.readouterr().out
    one, other = (load_checkpoint(each / "checkpoint_10.pt") for each in (run, straight))
    for state in (one, other):
        state["config"]["training"] = state["train"]["elapsed_s"] = None
    assert_equal(one, other, "checkpoint")
    assert metrics(run) == metrics(straight)


def test_what_low_precision_did_is_in_the_metrics(small: list[str], tmp_path: Path) -> None:
    words = changed(words_of("all", small), "fp8.recipe=delayed")
    assert run_here([*words, f"checkpoint_dir={tmp_path}"]) == 0
    records = metrics(only_run(tmp_path))
    steps = [record for record in records if "train/loss" in record]
    assert {record["train/fp8_products"] for record in steps} == {2 * 2 * 11}
    assert "train/fp8_clipped" not in steps[0]  # the first step scales by itself
    assert all(0 <= record["train/fp8_clipped"] <= 1 for record in steps[1:])
    rounded = [record for record in records if "eval/val_loss" in record]
    assert all(record["eval/val_loss_4bit"] != record["eval/val_loss"] for record in rounded)


def test_training_sees_4_bits_from_the_step_that_was_told(small: list[str], tmp_path: Path) -> None:
    words = words_of("4-bit weights", small)
    losses = []
    for name, more in (("plain", ["use_4bit=false"]), ("rounded", [])):
        assert (
            run_here([*changed(words, "log_freq=1", *more), f"checkpoint_dir={tmp_path / name}"])
            == 0
        )
        records = metrics(only_run(tmp_path / name))
        losses.append([record["train/loss"] for record in records if "train/loss" in record])
    same = [one == other for one, other in zip(*losses, strict=True)]
    assert same == [True] * 4 + [False] * 6


def test_where_4_bits_were_asked_for_and_cannot_be_had_the_run_stops(
    small: list[str],
    tmp_path: Path,
    without_bitsandbytes: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*words_of("4-bit weights llama", small), f"checkpoint_dir={tmp_path / 'runs'}"]
    assert run_here(words) == 2
    message = capsys.readouterr().err
    assert "4-bit weights need bitsandbytes" in message
    assert "pip install 'bitsandbytes>=0.50,<1', or set low_precision.use_4bit: false." in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "low_precision: {use_4bit: true}\n"])
def test_where_4_bits_are_only_the_default_the_run_says_so_and_goes_on(
    small: list[str],
    text: str,
    tmp_path: Path,
    without_bitsandbytes: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = Path(small[0])
    config.write_text(config.read_text().replace("low_precision: {use_4bit: false}\n", text))
    assert run_here([*changed(small, "max_iters=2"), f"checkpoint_dir={tmp_path / 'runs'}"]) == 0
    output = capsys.readouterr().out
    line = "low_precision.use_4bit: off, since 4-bit weights need bitsandbytes, which cannot be "
    assert output.count(line) == 1
    run = only_run(tmp_path / "runs")
    assert not Config.from_yaml(run / "config.yaml").low_precision.use_4bit  # what it really did


def test_where_4_bits_do_not_run_on_the_device_it_is_said_before_anything_else(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    elsewhere = torch.device("mps")  # torch has none here, as bitsandbytes may not
    monkeypatch.setattr("engine.precision.precision.resolve_device", lambda name: elsewhere)
    words = [*words_of("4-bit weights llama", small), f"checkpoint_dir={tmp_path / 'runs'}"]
    assert run_here(words) == 2
    assert "4-bit weights: bitsandbytes does not run on mps" in capsys.readouterr().err


def test_another_format_of_moments_is_refused_at_resume(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of("4-bit optimizer", small), f"checkpoint_dir={tmp_path}"]
    assert run_here(changed(words, "max_iters=2")) == 0
    resume = changed(words, "use_4bit_optimizer=false")
    assert run_here([*resume, f"resume_from_checkpoint={only_run(tmp_path)}"]) == 3
    assert "low_precision.use_4bit_optimizer was True, is False" in capsys.readouterr().err


def test_fp8_may_be_switched_at_resume(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of("fp8 delayed", small), f"checkpoint_dir={tmp_path}"]
    assert run_here(changed(words, "max_iters=4")) == 0
    words.append(f"resume_from_checkpoint={only_run(tmp_path)}")
    assert run_here(changed(words, "max_iters=6", "use_fp8=false")) == 0
    assert "low_precision.use_fp8: True -> False" in capsys.readouterr().out
    assert run_here(changed(words, "max_iters=8")) == 0


@pytest.mark.parametrize("mode", ["fp8 delayed", "4-bit weights", "4-bit optimizer"])
def test_a_dry_run_tells_the_same_cover_and_makes_nothing(
    small: list[str], tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(mode, small), f"checkpoint_dir={tmp_path / 'runs'}"]
    assert run_here([*words, "--dry-run"]) == 0
    assert MODES[mode][1][0] in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_two_processes_train_in_low_precision_as_one_does(small: list[str], tmp_path: Path) -> None:
    words = changed(words_of("all", small), "fp8.recipe=delayed", "max_iters=8", "dropout=0")
    words += ["tokens_per_step=256", "batch_size=4"]
    assert run_here([*words, f"checkpoint_dir={tmp_path / '1'}"]) == 0
    processes(2, [*words, f"checkpoint_dir={tmp_path / '2'}"])
    saved = [load_checkpoint(only_run(tmp_path / n) / "checkpoint_8.pt") for n in "12"]
    maxima, others = (state["precision"]["fp8"] for state in saved)
    for place, operand in enumerate(maxima["operands"]):
        if not operand.startswith("d"):  # gradients are as many times as large as processes are
            one, two = (each["history"][:, place] for each in (maxima, others))
            torch.testing.assert_close(one, two, rtol=0.1, atol=0, msg=operand)
    records = (metrics(only_run(tmp_path / name)) for name in "12")
    for mine, theirs in zip(*records, strict=True):
        if "train/loss" in mine:
            assert theirs["train/loss"] == pytest.approx(mine["train/loss"], abs=2e-2)
            assert theirs["train/fp8_products"] == mine["train/fp8_products"] / 2


# ---- adapters


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A GPT of nanoGPT with random weights, as it saves them."""
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 256}
    config = {"model": {"name": "gpt", "dropout": 0.0, **shape}, "training": {"block_size": 32}}
    torch.manual_seed(3)
    weights = build_model(Config.from_dict(config)).state_dict()
    arguments = shape | {"block_size": 32, "bias": False, "dropout": 0.0}
    path = tmp_path / "ckpt.pt"
    torch.save({"model": weights, "model_args": arguments, "iter_num": 0}, path)
    return path


def test_adapters_on_4_bit_weights_train_resume_and_load(
    small: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(small[0])
    text = file.read_text().split("training:", 1)[1]  # the model comes with its weights
    file.write_text(f"training:{text}".replace("low_precision: {use_4bit: false}\n", ""))
    words = [small[0], *(word for word in small[1:] if not word.startswith("n_"))]
    words += ["model.name=gpt", f"init_from={base}", "lora_rank=4", "learning_rate=1e-2"]
    words.append("tokenizer.name=bytes")
    assert run_here([*words, f"checkpoint_dir={tmp_path / 'straight'}"]) == 0
    output = capsys.readouterr().out
    assert "Adapters of rank 4 on 8 matrices: " in output and " in nf4 (" in output
    straight = only_run(tmp_path / "straight")
    run = resumed_from_step_4(words, straight, tmp_path / "stopped")
    assert metrics(run) == metrics(straight)
    losses = [record["train/loss"] for record in metrics(run) if "train/loss" in record]
    assert losses[-1] < losses[0]
    saved = load_checkpoint(run / "checkpoint_10.pt")["model"]
    assert not any(name.endswith("c_fc.weight") for name in saved)  # only codes of it
    model, config = load_model(run)
    trained = build_model(config)
    apply_lora(trained, config.low_precision, init=False)
    trained.load_state_dict(saved)
    tokens = torch.arange(32).view(2, 16)
    torch.testing.assert_close(model(tokens), trained.eval()(tokens), rtol=1e-4, atol=1e-4)
    again = [*words, f"checkpoint_dir={tmp_path / 'stopped'}", f"resume_from_checkpoint={run}"]
    for change in ("quantization_type=fp4", "use_double_quant=false", "lora_alpha=3"):
        assert run_here([*again, change]) == 3
        assert f"low_precision.{change.split('=')[0]} was " in capsys.readouterr().err
    assert json.loads((run / "checkpoint_10.json").read_text())["step"] == 10
    assert os.path.getsize(run / "checkpoint_10.pt") < 3 * os.path.getsize(base)
