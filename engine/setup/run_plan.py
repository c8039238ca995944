"""The plan of a run that is not made: its config, model and memory on the meta device, and the
times of its parts, measured here on a model that is thrown away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from config import Config, Request
from data import open_dataset
from data.run_data import document_id_function, missing_corpus
from data.tokenizers.build import build_tokenizer
from engine.graphed_step import check_graphs
from engine.hardware.distributed import World
from engine.kernels import check_kernels
from engine.planning.batch_size import predict_batch_sizes, with_batch
from engine.planning.forecast import (
    BUDGET_S,
    Forecast,
    PartTimes,
    TrialStep,
    choose_trial,
    forecast,
    measure,
)
from engine.planning.memory import MemoryBudget, MemoryEstimator
from engine.planning.stopwatch import Stopwatch, stopwatch
from engine.planning.summary import planned_steps, resolve_vocab_size
from engine.precision.precision import Precision
from engine.setup.build import new_optimizer, open_precision, resolve_auto, wants_compiler
from engine.setup.run_setup import EVAL_BATCH, RunSetup, prepare_run
from model import LanguageModel, build_model

TimeSample = Callable[[Config, LanguageModel, Precision, Stopwatch], float]


@dataclass(frozen=True)
class Plan:
    """What a run would be."""

    config: Config
    """With everything decided that is `auto`."""
    setup: RunSetup | None
    """None while the embedded corpus is not built."""
    missing: Path | None
    """Where it will be."""
    steps: int
    """Of the whole run."""
    estimator: MemoryEstimator
    """Has the model, on the meta device."""
    optimizer: torch.optim.Optimizer
    covered: list[str]
    """What the number formats cover, as lines."""
    batch_lines: list[str]
    """How `training.batch_size: auto` was decided."""

    @property
    def span(self) -> range:
        """The steps that this run makes: those after a resumed checkpoint."""
        resume = self.setup.start.resume if self.setup else None
        first = 0 if resume is None else resume.step
        return range(first, max(first, self.steps))


def plan_run(request: Request, world: World, budget: MemoryBudget) -> Plan:
    """Checks everything that a user can have wrong and plans the run; raises UserError."""
    check_graphs(request.config, world)
    check_kernels(request.config, world.device)
    missing = missing_corpus(request.config)
    setup = None if missing else prepare_run(request, world)
    config = _with_vocabulary(request.config, missing) if setup is None else setup.config
    done, saved = (setup.done, setup.start.saved) if setup else ((0, 0), {})
    steps = planned_steps(config, world.size, setup.epoch_tokens if setup else 0, done)
    config = resolve_auto(config, steps, world, budget)
    precision = open_precision(config, world)
    with torch.device("meta"):
        model = build_model(config)
    covered = precision.prepare(model, steps, init=False)
    optimizer = new_optimizer(model, config)
    before = saved["train"]["compiled"] if saved else None
    wanted = wants_compiler(config, model, steps, world, before)
    estimator = MemoryEstimator(config, model, precision, world, wanted and precision.compiles)
    lines = []
    if config.training.batch_size == "auto":
        sizes, line = predict_batch_sizes(estimator, budget)
        config = with_batch(config, sizes[0], EVAL_BATCH)
        estimator, lines = replace(estimator, config=config), [line]
    return Plan(config, setup, missing, steps, estimator, optimizer, covered, lines)


def _with_vocabulary(config: Config, missing: Path | None) -> Config:
    """Returns the config with the vocabulary that a run will have which builds its corpus first:
    that of the other texts or of the tokenizer. Characters and weights would have to be read."""
    known = config.model.vocab_size is not None or config.tokenizer.name == "char"
    if known or config.training.init_from not in ("scratch", "resume"):
        return config
    mixture = config.dataset.mixture
    others = tuple(source for source in mixture if Path(source.parquet_dir or "") != missing)
    if others:
        dataset = replace(config.dataset, mixture=others)
        tokenizer = open_dataset(dataset, config.tokenizer).tokenizer
    else:
        tokenizer = build_tokenizer(config.tokenizer)
    return resolve_vocab_size(config, tokenizer.vocab_size, tokenizer.name)[0]


@dataclass(frozen=True)
class Timed:
    """What was measured of a plan."""

    times: PartTimes
    trial: TrialStep
    precision: str
    busy: float
    """Cores that other programs used."""

    def forecast(self, plan: Plan) -> Forecast:
        """Returns the times of the whole run."""
        estimator = plan.estimator
        size = estimator.world.size
        return forecast(plan.config, self.times, estimator.model, plan.span, size)


def time_parts(
    plan: Plan,
    budget: MemoryBudget,
    budget_s: float = BUDGET_S,
    sample: TimeSample | None = None,
) -> Timed | None:
    """Times the parts of a run on a model that is thrown away; None if not even the smallest
    micro-step fits into memory.

    Nothing is compiled: that alone would take longer than all trials together.

    Args:
        budget_s: seconds after which no further trial begins.
        sample: returns the seconds of continuing `training.sample_prompt`.
    """
    estimator, world, setup = plan.estimator, plan.estimator.world, plan.setup
    documents = None if setup is None else document_id_function(setup.dataset, plan.config)
    trial = choose_trial(estimator, budget, build_model)
    if not trial.sizes:
        return None
    precision = open_precision(plan.config, world)
    model = build_model(trial.config).to(world.device)
    precision.prepare(model, plan.span.stop)
    optimizer = new_optimizer(model, trial.config)
    with stopwatch(world.device, budget_s) as watch:
        times = measure(model, optimizer, precision, trial, watch, documents)
        if sample is not None:
            seconds = sample(trial.config, model, precision, watch)
            times = replace(times, sample=seconds * trial.flops_ratio)
    return Timed(times, trial, precision.name, watch.busy)
