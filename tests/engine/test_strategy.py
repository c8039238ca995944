"""What `distributed.strategy: auto` and `training.recompute: auto` become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from config import Config, DistributedConfig
from engine.checkpoint.load import load_checkpoint
from engine.hardware.distributed import World
from engine.planning.memory import MemoryBudget, MemoryEstimator
from engine.planning.strategy import first_that_fits, strategy_choices
from model import LanguageModel, build_model
from tests.engine.planned_runs import CPU, configured, estimator_of
from tests.runs import only_run, run_here

TRAINING = {"recompute": "auto", "batch_size": 4}
GPT = {"name": "gpt", "n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 512}


def gpt(**sections: dict[str, Any]) -> Config:
    return configured(**{"model": GPT, "training": TRAINING} | sections)


def pair(config: Config) -> tuple[str, str]:
    return config.distributed.strategy, config.training.recompute


def pairs(config: Config, processes: int) -> list[tuple[str, str]]:
    return [pair(choice) for choice in strategy_choices(config, processes)]


ALL = [("ddp", "none"), ("fsdp", "none"), ("ddp", "layer"), ("fsdp", "layer")]


def test_only_what_is_auto_varies_and_one_process_has_nothing_to_shard() -> None:
    assert pairs(gpt(), 2) == ALL
    assert pairs(gpt(), 1) == [ALL[0], ALL[2]]
    sharded = replace(gpt(), distributed=DistributedConfig(strategy="fsdp"))
    assert pairs(sharded, 2) == [ALL[1], ALL[3]]
    training = {"recompute": "layer", "batch_size": 4}
    assert pairs(gpt(training=training), 2) == [ALL[2], ALL[3]]


def test_what_cannot_be_sharded_is_not() -> None:
    refused: list[dict[str, Any]] = [
        {"low_precision": {"use_4bit_optimizer": True, "use_4bit": False}},
        {"optimizer": {"name": "adamw_8bit"}},
    ]
    for sections in refused:
        assert pairs(gpt(**sections), 2) == [ALL[0], ALL[2]], sections


def of_processes(config: Config, count: int) -> MemoryEstimator:
    world = World(0, count, CPU.device)
    return replace(estimator_of(config, base=10 << 20), world=world)


@pytest.fixture
def agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that all see what this one does."""
    monkeypatch.setattr(World, "any_rank", lambda self, flag: flag)
    monkeypatch.setattr(World, "all_reduce_min", lambda self, value: value)


def test_the_first_that_fits_is_taken_and_the_last_where_none_does(agreed: None) -> None:
    config = gpt()
    estimator, choices = of_processes(config, 2), strategy_choices(config, 2)
    peaks = [estimator.memory(choice).required for choice in choices]
    assert peaks[1] < peaks[0]
    for place, peak in enumerate(peaks):
        budget = MemoryBudget(0, int(peak / 0.9) + 1)
        cheaper = next(n for n, each in enumerate(peaks) if each <= peak)
        chosen, lines = first_that_fits(choices, estimator, budget)
        assert pair(chosen) == ALL[cheaper] and len(lines) == (cheaper > 0), place
    chosen, (line,) = first_that_fits(choices, estimator, MemoryBudget(0, 1 << 20))
    assert pair(chosen) == ALL[3]
    assert line.startswith("Sharded over 2 processes and layers recompute their activations: a rep")
    assert pair(first_that_fits(choices, estimator, MemoryBudget(0, None))[0]) == ALL[0]
    sharded = [choices[1], choices[3]]  # what fsdp leaves open
    _, (line,) = first_that_fits(sharded, estimator, MemoryBudget(0, 1 << 20))
    assert line.startswith("Layers recompute their activations: all activations kept would need ")


def test_a_process_follows_the_one_with_the_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(World, "any_rank", lambda self, flag: next(answers))
    monkeypatch.setattr(World, "all_reduce_min", lambda self, value: 5 * 10**6)
    estimator, choices = of_processes(gpt(), 2), strategy_choices(gpt(), 2)
    chosen, (line,) = first_that_fits(choices, estimator, MemoryBudget(0, 1 << 50))
    assert pair(chosen) == ALL[1]
    assert line.startswith("Sharded over 2 processes: a replica would need ")
    assert line.endswith(" of 5 MB")


def test_with_an_automatic_batch_size_one_sequence_at_a_time_decides(agreed: None) -> None:
    training = {"recompute": "auto", "batch_size": "auto", "tokens_per_step": 8 * 128}
    config = gpt(training=training)
    estimator, choices = of_processes(config, 2), strategy_choices(config, 2)
    smallest = replace(choices[0], training=replace(choices[0].training, batch_size=1))
    budget = MemoryBudget(0, int(estimator.memory(smallest).required / 0.9) + 1)
    assert pair(first_that_fits(choices, estimator, budget)[0]) == ALL[0]


def test_a_run_uses_what_auto_became_and_saves_auto(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built: list[bool] = []

    def noted(config: Config) -> LanguageModel:
        model = build_model(config)
        built.append(model.recompute)
        return model

    monkeypatch.setattr("engine.setup.build.build_model", noted)
    words = [*tiny, "max_iters=2", "log_freq=1", "test_freq=2", "recompute=auto", "dropout=0"]
    assert run_here([*words, f"checkpoint_dir={tmp_path / 'enough'}"]) == 0
    assert not built[-1] and "recompute their" not in capsys.readouterr().out
    monkeypatch.setattr("engine.planning.memory.free_bytes", lambda device: 10 << 20)
    assert run_here([*words, f"checkpoint_dir={tmp_path / 'short'}"]) == 0
    assert built[-1]
    assert "Layers recompute their activations: all activations kept" in capsys.readouterr().out
    enough, short = only_run(tmp_path / "enough"), only_run(tmp_path / "short")
    assert Config.from_yaml(short / "config.yaml").training.recompute == "auto"
    saved = [load_checkpoint(run / "checkpoint_2.pt") for run in (enough, short)]
    assert saved[1]["config"]["training"]["recompute"] == "auto"
    weights = [each["model"] for each in saved]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
