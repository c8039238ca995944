"""What is advised where memory is short, and the batch size that `auto` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from config import Config, ConfigError
from engine.hardware.distributed import World
from engine.planning.advice import memory_lines, out_of_memory_lines, suggest_fitting_configs
from engine.planning.batch_size import (
    batch_size_candidates,
    find_batch_size_by_trial,
    predict_batch_sizes,
    with_batch,
)
from engine.planning.memory import MemoryBudget, MemoryEstimator
from engine.planning.strategy import strategy_choices
from settings.formatting import format_bytes
from tests.engine.planned_runs import CPU, configured, estimator_of


def big(**training: Any) -> MemoryEstimator:
    config = configured(
        model={"n_embd": 512, "n_layer": 6},
        training={"block_size": 512, "batch_size": 8, **training},
    )
    return estimator_of(config, base=100 << 20)


def test_the_memory_of_a_step_is_said_with_what_there_is_where_that_is_known() -> None:
    (line,) = memory_lines(big(), MemoryBudget(1 << 30, 50 << 30))
    assert line.startswith("Memory of a step: ") and " of 54.8 GB there are: " in line
    (line,) = memory_lines(big(), MemoryBudget(1 << 30, None))
    assert "there are" not in line


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7])
def test_both_suggestions_for_a_run_that_does_not_fit_would_fit_and_keep_its_tokens(
    share: float,
) -> None:
    estimator = big(gradient_accumulation_steps=2)
    budget = MemoryBudget(0, int(share * estimator.memory().required))
    variants = suggest_fitting_configs(estimator, budget)
    assert len(variants) == 2
    for config, memory in variants:
        training = config.training
        assert isinstance(training.batch_size, int)
        steps = training.gradient_accumulation_steps
        assert training.block_size * steps * training.batch_size == 512 * 8 * 2
        assert estimator.memory(config) == memory and budget.fits(memory)
    said = memory_lines(estimator, budget)[1]
    assert said.startswith("WARNING: it does not fit. What would fit: ")
    for config, _ in variants:
        for section in ("training", "low_precision"):
            before, after = estimator.config.to_dict()[section], config.to_dict()[section]
            for key in before:
                if before[key] != after[key]:
                    assert f"{section}.{key}={str(after[key]).lower()}" in said


def test_the_micro_batch_suggested_is_the_largest_that_fits() -> None:
    estimator = big(batch_size=12)
    for batch in (6, 4, 3, 2, 1):
        sized = replace(
            estimator.config.training, batch_size=batch, gradient_accumulation_steps=12 // batch
        )
        config = replace(estimator.config, training=sized)
        budget = MemoryBudget(0, estimator.memory(config).required)
        assert suggest_fitting_configs(estimator, budget)[0][0] == config


def test_sharding_and_recomputation_are_offered_before_what_changes_the_numbers() -> None:
    alone = big(batch_size=1)  # no smaller micro-batch is left
    alone = replace(alone, config=strategy_choices(alone.config, 1)[0])
    several = replace(alone, world=World(0, 4, CPU.device))
    for estimator, option in (
        (alone, "training.recompute=layer"),
        (several, "distributed.strategy=fsdp"),
    ):
        budget = MemoryBudget(0, int(0.98 * estimator.memory().required))
        line = memory_lines(estimator, budget)[1]
        assert f"What would fit: {option} (" in line, line
    (variant, memory), *_ = suggest_fitting_configs(several, budget)
    lines = out_of_memory_lines(MemoryError(), replace(several, config=variant), budget)
    assert "activations and gathered weights" in lines[1] and memory.shards == 4
    said = memory_lines(several, MemoryBudget(0, 1 << 20))[1]
    assert said.endswith("or shard it over more processes (distributed.strategy=fsdp).")
    said = memory_lines(replace(several, config=variant), MemoryBudget(0, 1 << 20))[1]
    assert said.endswith("or shard it over more processes."), "it is sharded already"


def test_what_saving_copies_is_said_and_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = big()
    memory = estimator.memory()
    state = memory.weights + memory.optimizer
    assert memory.saving == memory.peak - memory.required == state
    short = MemoryBudget(0, memory.required)
    (tight,) = memory_lines(estimator, short)
    (roomy,) = memory_lines(estimator, MemoryBudget(0, memory.peak))
    more = f"; {format_bytes(state)} more for a copy while saving"
    assert roomy.startswith(f"Memory of a step: {format_bytes(memory.required)} of ")
    assert roomy.endswith(memory.parts() + more)
    waits = ", for which there is no room: training waits while a checkpoint is written"
    assert tight.endswith(more + waits)
    unsaved = replace(estimator.config.training, save_model=False)
    config = replace(estimator.config, training=unsaved)
    unsaving = replace(estimator, config=config)
    assert unsaving.memory().saving == 0 and "copy" not in memory_lines(unsaving, short)[0]
    second = replace(estimator, world=World(1, 2, CPU.device)).memory()
    assert second.saving == 0, "of what is not sharded only the main process keeps a copy"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("engine.planning.advice.free_bytes", lambda device: state)
    on_cuda = replace(estimator, world=World(0, 1, torch.device("cuda", 0)))
    assert on_cuda.memory().saving == 0, "it is host memory there"
    _, line = memory_lines(on_cuda, MemoryBudget(0, 1 << 50))
    assert line.startswith("Saving copies ") and line.endswith(" free")
    monkeypatch.setattr("engine.planning.advice.free_bytes", lambda device: state - 1)
    _, line = memory_lines(on_cuda, MemoryBudget(0, 1 << 50))
    assert line.startswith("WARNING: Saving copies ") and "training waits" in line


def test_where_weights_alone_do_not_fit_a_smaller_model_is_what_is_left() -> None:
    estimator = big()
    said = memory_lines(estimator, MemoryBudget(0, estimator.memory().weights))
    assert said[1].endswith("lower model.n_layer or model.n_embd.")


def test_out_of_memory_names_what_used_it_and_what_would_fit() -> None:
    lines = out_of_memory_lines(MemoryError("reading"))
    assert lines[0] == "Out of memory: reading" and "training.batch_size" in lines[1]
    more_than_enough = MemoryBudget(0, 1 << 40)
    lines = out_of_memory_lines(MemoryError(), big(), more_than_enough)
    assert lines[0] == "Out of memory: MemoryError"
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert f"B {part}" in lines[1]
    assert lines[2].startswith("1.1 TB were there when the run began: something else took them")
    assert lines[3].count("training.") + lines[3].count("low_precision.") >= 2


def automatic(world_size: int = 1) -> MemoryEstimator:
    estimator = big(batch_size=1, tokens_per_step=24 * 512)
    training = replace(estimator.config.training, batch_size="auto")
    config: Config = replace(estimator.config, training=training)
    return replace(estimator, config=config, world=World(0, world_size, CPU.device))


def test_auto_takes_the_largest_micro_batch_that_fits_and_makes_up_the_step() -> None:
    estimator = automatic()
    assert batch_size_candidates(estimator.config, 1) == [24, 12, 8, 6, 4, 3, 2, 1]
    assert batch_size_candidates(estimator.config, 3) == [8, 4, 2, 1]
    peak = estimator.memory(with_batch(estimator.config, 12)).required

    def chosen(allocated: int, free: int) -> list[int]:
        return predict_batch_sizes(estimator, MemoryBudget(allocated, free))[0]

    sizes, line = predict_batch_sizes(estimator, MemoryBudget(0, int(peak / 0.9) + 1))
    assert sizes == [12, 8, 6, 4, 3, 2, 1]
    assert line.startswith("Batch size: 12 of 24 sequences") and "24 would need" in line
    assert chosen(0, int(peak / 0.9) - 1)[0] == 8
    assert chosen(0, 1 << 50)[0] == 24
    held = 200 << 20  # what the process has already counts whole, and nine tenths of the rest
    assert chosen(held, int((peak - held) / 0.9) + 1)[0] == 12


def test_auto_says_why_it_cannot_choose() -> None:
    enough = MemoryBudget(0, 1 << 50)
    cases = [
        (automatic(), MemoryBudget(0, 50 << 20), r"1 at a time need [\d.]+ .B \(.*weights.*90%"),
        (automatic(), MemoryBudget(0, None), "not known here"),
        (automatic(world_size=5), enough, r"12288 is not a multiple .*512 \* 5 processes"),
    ]
    for estimator, budget, message in cases:
        with pytest.raises(ConfigError, match=message):
            predict_batch_sizes(estimator, budget)


def test_auto_takes_only_what_8_bit_products_take() -> None:
    config = configured(
        training={"block_size": 4, "batch_size": 4, "tokens_per_step": 48},
        low_precision={"use_fp8": True},
    )
    assert batch_size_candidates(config, 1) == [12, 4]


def test_a_trial_that_runs_out_of_memory_is_repeated_with_the_next_size() -> None:
    tried = []

    def attempt(batch: int) -> None:
        tried.append(batch)
        if batch > 8:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        if batch > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert find_batch_size_by_trial([12, 8, 6, 4], attempt, CPU) == 6 and tried == [12, 8, 6]
    with pytest.raises(ConfigError, match="even 8 runs out"):
        find_batch_size_by_trial([12, 8], attempt, CPU)
