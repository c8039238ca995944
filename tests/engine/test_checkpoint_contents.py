"""Checkpoints that are whole files of wrong content: each is refused by one message that names the
entry, by everything that opens one, or gives exactly what the undamaged one gives."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import export
import sample
from config import (
    CheckpointError,
    Config,
    ModelConfig,
    Request,
    TrainingConfig,
    UserError,
    command_line,
)
from data.loading.loader import TrainLoader
from data.run_data import batch_spec
from engine.checkpoint.load import checked_config, load_checkpoint
from engine.checkpoint.trained_model import load_model
from engine.hardware.distributed import World
from engine.run_directory.manifest import data_path, manifest_path, read_manifest, render
from engine.setup.build import build_parts, restore
from engine.setup.run_setup import prepare_run
from model import build_model
from model.gpt import GPT
from tests.conftest import TINY, write_corpus
from tests.runs import assert_equal, only_run, run_here

Damage = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Request]:
    """A checkpoint of two steps, and what resumes it."""
    folder = tmp_path_factory.mktemp("content")
    config = folder / "tiny.yaml"
    config.write_text(f"{TINY}dataset:\n  parquet_dir: {write_corpus(folder / 'text')}\n")
    words = [os.fspath(config), f"checkpoint_dir={folder / 'runs'}", "max_iters=2"]
    assert run_here(words) == 0
    run = only_run(folder / "runs")
    return data_path(run, 2), command_line([*words, f"resume_from_checkpoint={run}"])


def rewritten(path: Path, content: dict[str, Any], **facts: Any) -> None:
    """Saves the content with a manifest that vouches for it."""
    manifest = read_manifest(path)
    torch.save(content, path)
    raw = path.read_bytes()
    known = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), **facts}
    manifest_path(path).write_text(render(replace(manifest, **known)))


def resumed(request: Request) -> dict[str, Any]:
    """What a run would go on from."""
    world = World(0, 1, torch.device("cpu"))
    setup = prepare_run(request, world)
    parts = build_parts(setup, setup.planned_steps(world), world)
    state, data_state = restore(setup, parts, world)
    spec = batch_spec(setup.config, 0, 1)
    with TrainLoader(setup.dataset, spec, setup.config.dataloader, data_state) as batches:
        batch = next(batches).micro_batches[0]
    moments = parts.optimizer.state_dict()["state"]
    return {
        "model": parts.model.state_dict(),
        "moments": moments,
        "state": vars(state),
        "batch": batch,
    }


def loaded(path: Path) -> dict[str, Any]:
    model, config = load_model(path)
    return {"model": model.state_dict(), "config": config}


def put(*places: str | int, value: Any) -> Damage:
    """Puts `value` at a place; GONE removes it; a function makes it of what was there."""

    def damage(content: dict[str, Any]) -> None:
        inside: Any = content
        for place in places[:-1]:
            inside = inside[place]
        if value is GONE:
            del inside[places[-1]]
        else:
            inside[places[-1]] = value(inside[places[-1]]) if callable(value) else value

    return damage


GONE = object()
STATE = ("optimizer", "state", 0)
ENTRIES = ("model", "optimizer", "precision", "train", "cursor", "rng", "config", "data")
REFUSED: list[tuple[Damage, str]] = [
    *((put(name, value=GONE), f"{name} is missing") for name in (*ENTRIES, "tokenizer")),
    *((put(name, value=[1]), f"{name} is a list") for name in ENTRIES if name != "rng"),
    (put("extra", value=1), "'extra' is not known here"),
    (put("train", "step", value="two"), "train.step is 'two', expected a whole number"),
    (put("train", "step", value=-3), "train.step is -3, expected"),
    (put("train", "step", value=7), "step is 7, and its manifest says 2"),
    (put("train", "step", value=torch.tensor(2)), "train.step is a tensor"),
    (put("train", "tokens", value=True), "train.tokens is True"),
    (put("train", "elapsed_s", value=None), "train.elapsed_s is None, expected a number"),
    (put("train", "best_step", value=1.5), "train.best_step is 1.5"),
    (put("train", "epoch", value=GONE), "train.epoch is missing"),
    (put("train", "mood", value=1), "train.'mood' is not known here"),
    (put("cursor", "positions", value=[[0, 0, 0]]), "data state: holds lanes 0 to 0"),
    (put("cursor", "positions", 0, value=[0, 10**9, 0]), "asks for segment 1000000000 of"),
    (put("cursor", "positions", 0, value=[0, -1, 0]), "cursor.positions.0.1 is -1"),
    (put("cursor", "positions", 0, value=[0, 0]), "cursor.positions.0 is a list"),
    (put("cursor", "lanes", value=0), "data state: it has no lanes"),
    (put("cursor", "version", value=99), "data state: version 99"),
    (put("rng", value=[]), "rng is empty"),
    (put("rng", 0, "torch", value=torch.ones(3)), "rng: "),
    (put("rng", 0, "torch", value=torch.zeros(5056, dtype=torch.uint8)), "rng: "),
    (put("rng", 0, "python", 1, value=lambda keys: keys[:9]), "rng: "),
    (put("rng", 0, "numpy", 2, value=10**6), "rng: position 1000000 of 624"),
    (put("rng", 0, "numpy", 0, value="PCG64"), "rng: "),
    (put("config", "model", value=GONE), "config.model is missing"),
    (put("config", "model", "n_layer", value=10**9), "config.model.n_layer is 1000000000"),
    (put("config", "model", "n_embd", value=2**40), "does not fit this version: "),
    (put("config", "model", "vocab_size", value=10**9), "does not fit this version: "),
    (put("config", "model", "vocab_size", value=None), "config.model.vocab_size is None"),
    (put("config", "model", "n_head", value="2"), "config.model.n_head is '2'"),
    (put("config", "model", "dropout", value=torch.ones(2)), "dropout"),
    (put("config", "training", "batch_size", value="auto"), "config.training.batch_size is 'auto'"),
    (put("config", "training", "learning_rate", value=[]), "learning_rate"),
    (put("config", "optimizer", value=7), "optimizer"),
    (put("data", "fingerprint", value=7), "data.fingerprint is 7"),
    (put("data", "fingerprint", value="other"), "fingerprint is 'other', and its manifest says"),
    (put("tokenizer", value={"kind": 3}), "tokenizer.kind is 3"),
    (put("model", "encoder", value=GONE), "encoder"),
    (put("model", "more", value=torch.ones(1)), "more"),
    (put("model", "encoder", value=lambda w: w[:, :1]), "size mismatch for encoder"),
    (put("model", "encoder", value=1.0), "model.encoder is 1.0, expected a tensor"),
    (put("model", "encoder", value=lambda w: w.int()), "model.encoder holds torch.int32"),
    (put("model", "encoder", value=lambda w: w.to("meta")), "model.encoder is a tensor"),
    (put("model", "encoder", value=lambda w: w.to_sparse()), "model.encoder is a tensor"),
    (put("optimizer", "param_groups", value=[]), "optimizer.param_groups are not"),
    (put("optimizer", "param_groups", 0, "params", value=[0]), "optimizer.param_groups are not"),
    (put("optimizer", "state", value={}), "optimizer.state.0 is not of these"),
    (put(*STATE, value=GONE), "optimizer.state.0 is not of these"),
    (put(*STATE, "exp_avg", value=torch.ones(3)), "optimizer.state.0.exp_avg is torch.float32 [3]"),
    (put(*STATE, "exp_avg_sq", value=GONE), "optimizer.state.0.exp_avg_sq is missing"),
    (put(*STATE, "step", value="ten"), "optimizer.state.0.step is 'ten'"),
    (put(*STATE, "step", value=torch.tensor(-1.0)), "optimizer.state.0.step is -1.0, of 2 steps"),
    (put("precision", "scaler", value=None), "precision.scaler is None"),
]
TOKENIZERS = (
    ({"kind": "char", "characters": 7}, ": not the description of a tokenizer"),
    ({"kind": "runes"}, ": a tokenizer of the unknown kind 'runes'"),
    ({"kind": "ids", "vocab_size": 10**9}, " has 1000000000 tokens, its model 256"),
)
SAME: list[Damage] = [
    put("optimizer", "param_groups", 0, "lr", value="much"),  # the config says it
    put("optimizer", "param_groups", 0, "later", value=1),
    put("data", "later", value=[1]),
    put("cursor", "later", value=1),
    put("model", "frequencies", value=GONE),  # of a time when they were not saved
]


@pytest.mark.slow
# torch 2.11 warns of a sparse tensor, one of the faults, when it reads one.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_wrong_content_is_refused_by_one_message_that_names_it(
    saved: tuple[Path, Request],
) -> None:
    path, request = saved
    content = load_checkpoint(path)
    right, faults = loaded(path), []
    for damage, message in REFUSED:
        damaged = copy.deepcopy(content)
        damage(damaged)
        rewritten(path, damaged)
        for resume in (True, False):
            try:
                found = resumed(request) if resume else loaded(path)
                if resume:
                    faults.append(f"accepted: {message}")
                else:  # a model is right also where it is only resuming that fails
                    assert_equal(found, right, message)
            except UserError as error:
                if error.exit_code != 3 or message not in str(error) or "\n" in str(error):
                    faults.append(f"{message}: {error.exit_code} {error}")
            except Exception as error:  # what would be a traceback
                faults.append(f"{message}: {error!r}")
    rewritten(path, content)
    assert faults == []


def test_content_that_is_not_read_changes_nothing(saved: tuple[Path, Request]) -> None:
    path, request = saved
    content = load_checkpoint(path)
    right, damaged = resumed(request), copy.deepcopy(content)
    for damage in SAME:
        damage(damaged)
    rewritten(path, damaged)
    assert_equal(resumed(request), right, "resumed")
    damaged["model"]["encoder"][0, 0, 0] = math.nan
    rewritten(path, damaged)
    assert math.isnan(load_model(path)[0].state_dict()["encoder"][0, 0, 0])
    rewritten(path, content)


def test_the_weights_bound_the_number_of_layers_unless_layers_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = ModelConfig(name="gpt", n_layer=1, n_embd=8, n_head=2, vocab_size=256)
    config = Config(model=shape, training=TrainingConfig(block_size=8))
    content = {"model": build_model(config).state_dict(), "config": config.to_dict()}
    assert checked_config(Path("x.pt"), content) == config
    content["config"]["model"]["n_layer"] = 100
    with pytest.raises(CheckpointError, match="n_layer is 100, with"):
        checked_config(Path("x.pt"), content)
    monkeypatch.setattr(GPT, "layers_share_weights", True)
    with pytest.raises(CheckpointError, match="Missing key"):
        checked_config(Path("x.pt"), content)


@pytest.mark.slow
def test_every_command_ends_with_exit_code_3(
    saved: tuple[Path, Request],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, request = saved
    content = load_checkpoint(path)
    monkeypatch.setattr(sys, "argv", ["sample.py", os.fspath(path)])
    for tokenizer, message in TOKENIZERS:
        rewritten(path, content | {"tokenizer": tokenizer})
        assert sample.main() == 3
        assert f"{path}: its tokenizer{message}" in capsys.readouterr().err
    parquet = {"parquet_dir": content["data"]["parquet_dir"]}
    for data, message in (({}, "of an unknown kind"), (parquet, "does not say which data")):
        rewritten(path, content | {"data": {"fingerprint": "x", **data}}, fingerprint="x")
        assert run_here([*request.files, f"resume_from_checkpoint={path.parent}"]) == 3
        assert message in capsys.readouterr().err
    known = content["data"]["fingerprint"]
    rewritten(path, content | {"config": []}, fingerprint=known)
    commands: tuple[Callable[[], int], ...] = (
        lambda: run_here([*request.files, f"resume_from_checkpoint={path.parent}"]),
        sample.main,
        lambda: export.main([os.fspath(path), os.fspath(tmp_path / "out")]),
    )
    for command in commands:
        capsys.readouterr()
        assert command() == 3
        assert "config is a list, expected a dict" in capsys.readouterr().err
    rewritten(path, content)
