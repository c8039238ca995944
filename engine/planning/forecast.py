"""How long a run will take, from measured times of its parts.

The run's own model computes micro-steps, an optimizer step and an evaluation's forward pass, for
about a second each; the run is that many times as long. Micro-steps of more than a second are timed
in a smaller size and scaled by FLOPs. The trainer's own loop would need whole steps for that, which
take minutes for a large model on a CPU, and it cannot tell the steps of a run from its start.

Not counted: starting, reading data, and the exchange of gradients between processes. Saves are
assumed to write 500 MB/s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import (
    FP8_MULTIPLE,
    Config,
    accumulation_steps,
    eval_batch,
    eval_batches,
    micro_batch,
    source_datasets,
)
from engine.evaluation import evaluating
from engine.loss import DocumentIds, next_token_loss
from engine.optim.build import clip_gradients, gradient_norm
from engine.planning.memory import (
    MemoryBudget,
    MemoryEstimator,
    optimizer_state_bytes,
    shard_count,
)
from engine.planning.stopwatch import Stopwatch
from engine.precision.precision import Precision
from engine.train_state import saves_due, times_due
from model.interface import LanguageModel
from settings.formatting import format_duration, format_plural, format_si

BUDGET_S = 8.0  # of measuring all parts; what is under way then is finished
TRIAL_S = 1.0  # micro-steps grow until one takes so long
_EACH_S = 0.3  # of timing one size on the way there
_LEAST_TOKENS = 256  # of a trial: fewer take hardly less time, which would be multiplied
_ROUGH = 1 / 20  # of a micro-step's work: a forecast from less is called rough
_MAX_PARAMETERS = 50_000_000  # of a trial on a CPU: one is drawn in 10 ns and updated in 5
_DISK_RATE = 500e6  # bytes per second; nothing is written to find it out


@dataclass(frozen=True)
class PartTimes:
    """Seconds of each part of a run."""

    micro_step: float
    """Forward and backward of one micro-batch."""
    update: float
    """Gradient norm, clipping and the optimizer's step."""
    evaluation_batch: float
    rounding: float
    """Quantizing the weights to 4 bits and restoring them, once; 0 in a run without them."""
    matmul_flops: float
    """FLOP/s of plain matrix products in the run's dtype."""
    tokens: int
    """Tokens of the micro-step that was timed."""
    sample: float = 0.0
    """Continuing `training.sample_prompt`."""


@dataclass(frozen=True)
class Forecast:
    """Predicted times of a run, in seconds."""

    steps: int
    step: float
    """Mean over the run: the last steps of one with 4-bit weights take longer."""
    evaluations: int
    evaluation: float
    saves: int
    save: float
    flops: float
    """FLOP/s that the model reaches in its steps."""
    share: float
    """Of what plain products reach."""

    @property
    def total(self) -> float:
        """Of the whole run."""
        evaluations, saves = self.evaluations * self.evaluation, self.saves * self.save
        return self.steps * self.step + evaluations + saves

    def line(self, world_size: int = 1, note: str = "") -> str:
        """What a dry run prints."""
        parts = []
        if self.steps:
            parts.append(
                f"{self.steps:,} steps of {_seconds(self.step)} "
                f"({format_si(self.flops, 'FLOP/s')}, {self.share:.0%} of a plain product's rate)"
            )
        if self.evaluations:
            parts.append(
                f"{format_plural(self.evaluations, 'evaluation')} of {_seconds(self.evaluation)}"
            )
        if self.saves:
            parts.append(f"{format_plural(self.saves, 'save')} of {_seconds(self.save)}")
        alone = "; exchange between processes not counted" if world_size > 1 else ""
        total = format_duration(self.total)
        return f"Time: about {total} on this device{note}: {', '.join(parts)}{alone}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else format_duration(value)


@dataclass(frozen=True)
class TrialStep:
    """What is timed in place of the run's micro-step."""

    config: Config
    """The run's; with fewer layers where its model is too large to be built for a trial."""
    sizes: list[tuple[int, int]]
    """Sequences, and tokens of each: the smallest first, only what fits into memory."""
    flops_ratio: float = 1.0
    """FLOPs per token of the run's model / those of the trial's."""
    parameter_ratio: float = 1.0
    """Parameters that a process of the run updates / those of the trial's model."""

    def is_rough(self, tokens: int) -> bool:
        """Whether so many tokens of the trial are a small part of the run's micro-step."""
        whole = micro_batch(self.config) * self.config.training.block_size
        return tokens < _ROUGH * whole * self.flops_ratio


def choose_trial(
    estimator: MemoryEstimator, budget: MemoryBudget, build: Callable[[Config], LanguageModel]
) -> TrialStep:
    """Returns what to time: fewer layers before a smaller micro-step; `sizes` is empty where
    nothing fits. build: makes a config's model."""
    config, model, length = estimator.config, estimator.model, estimator.config.training.block_size
    whole = (micro_batch(config), length)
    shards = shard_count(config, estimator.world)
    # Each process times by itself, so its model is whole.
    config = replace(config, distributed=replace(config.distributed, strategy="ddp"))
    limit = _MAX_PARAMETERS if estimator.world.on_cpu else math.inf
    sizes = _fitting_sizes(replace(estimator, config=config), budget)
    while (_parameters(model) > limit or whole not in sizes) and config.model.n_layer > 1:
        config = replace(config, model=replace(config.model, n_layer=config.model.n_layer // 2))
        with torch.device("meta"):
            model = build(config)
        sizes = _fitting_sizes(replace(estimator, config=config, model=model), budget)
    return TrialStep(
        config,
        sizes,
        _flops(estimator.model, 1, length) / _flops(model, 1, length),
        _parameters(estimator.model) / _parameters(model) / shards,
    )


def _fitting_sizes(estimator: MemoryEstimator, budget: MemoryBudget) -> list[tuple[int, int]]:
    """Returns the sizes of a micro-step that fit into memory, the smallest first; those of few
    tokens only where no other fits."""
    config = estimator.config
    variants = [(size, _sized(config, *size)) for size in _sizes(config)]
    found = [s for s, each in variants if budget.fits(estimator.memory(each)) is not False]
    return [s for s in found if s[0] * s[1] >= _LEAST_TOKENS] or found


def _sizes(config: Config) -> Iterator[tuple[int, int]]:
    """Yields sizes of a micro-step up to the run's own, each about twice the one before."""
    whole, length = micro_batch(config), config.training.block_size
    multiple = FP8_MULTIPLE if config.low_precision.use_fp8 else 1
    shorter = [length >> shift for shift in range(length.bit_length()) if length >> shift >= 64]
    sizes = [(1, each) for each in reversed(shorter)]
    sizes += [(1 << power, length) for power in range(1, whole.bit_length())]
    for batch, each in sizes:
        if batch * each < whole * length and batch * each % multiple == 0:
            yield batch, each
    yield whole, length


def _sized(config: Config, batch: int, length: int) -> Config:
    sizes = replace(
        config.training,
        batch_size=batch,
        block_size=length,
        tokens_per_step=None,
        gradient_accumulation_steps=1,
    )
    return replace(config, training=sizes)


def _flops(model: LanguageModel, batch: int, length: int) -> int:
    """Returns the FLOPs of a micro-step."""
    per_token: int = model.flops_per_token(length)
    return batch * length * per_token


def _parameters(model: LanguageModel) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass
class StepParts:
    """The parts of a run's work, each as a function that can be timed; the weights change."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    precision: Precision
    rows: Tensor
    """Tokens (B, T + 1)."""
    document_ids: DocumentIds | None = None

    def _mean_loss(self) -> Tensor:
        with self.precision.autocast():
            device = self.precision.device
            total = next_token_loss(self.model, self.rows, device, self.document_ids)
        return total / self.rows.numel()

    def micro_step(self) -> None:
        # Steps count from 1, so that step 0 is never one with 4-bit weights.
        with self.precision.training(0):
            self.precision.backward(self._mean_loss())

    def update(self) -> None:
        clip_gradients(self.model, gradient_norm(self.model), limit=1.0)
        self.precision.step(self.optimizer, lambda values: values)

    def evaluation_batch(self) -> None:
        with torch.inference_mode(), evaluating(self.model):
            self._mean_loss().item()

    def rounding(self) -> None:
        assert self.precision.quantized is not None
        with self.precision.quantized.applied():
            pass


def measure(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    trial: TrialStep,
    watch: Stopwatch,
    document_ids: DocumentIds | None = None,
) -> PartTimes:
    """Times the parts of the run that `trial` stands for, by the run's own objects on random
    tokens; the weights change.

    Micro-steps grow until one takes long enough; a line through the last two gives the run's own,
    so at least two are timed where time allows.
    """
    vocab = trial.config.model.vocab_size
    assert vocab is not None
    whole = _flops(model, micro_batch(trial.config), trial.config.training.block_size)
    parts = StepParts(model, optimizer, precision, torch.empty(0), document_ids)
    before, flops, seconds = (0, 0.0), 0, 0.0
    for number, (batch, length) in enumerate(trial.sizes):
        parts.rows = torch.randint(vocab, (batch, length + 1))
        before, flops = (flops, seconds), _flops(model, batch, length)
        seconds = watch.fastest(parts.micro_step, _EACH_S, warm_up=number == 0)
        if watch.is_over or (number > 0 and seconds > TRIAL_S * watch.scale):
            break
    # An evaluation's forward pass is assumed to grow with the tokens as a micro-step does.
    growth = _on_line(before, (flops, seconds), whole) / seconds * trial.flops_ratio
    update_s = watch.fastest(parts.update)
    optimizer.zero_grad(set_to_none=True)
    evaluation_s = watch.fastest(parts.evaluation_batch)
    rounding_s = 0.0 if precision.quantized is None else watch.fastest(parts.rounding)
    return PartTimes(
        micro_step=seconds * growth,
        update=update_s * trial.parameter_ratio,
        evaluation_batch=evaluation_s * growth,
        rounding=rounding_s * trial.parameter_ratio,
        matmul_flops=watch.matmul_rate(precision.dtype),
        tokens=batch * length,
    )


def _on_line(first: tuple[int, float], second: tuple[int, float], flops: int) -> float:
    """Returns the seconds of so many FLOPs on the line through two measurements, FLOPs and seconds.

    Reading all weights takes as long for few tokens as for many, so time is not proportional to
    work. What is beyond the second point takes at least half as long as its average.
    """
    average = second[1] / second[0]
    slope = (second[1] - first[1]) / max(1, second[0] - first[0])
    slope = min(max(slope, average / 2), average)
    return second[1] + slope * (flops - second[0])


def forecast(
    config: Config, times: PartTimes, model: LanguageModel, span: range, world_size: int
) -> Forecast:
    """Returns the times of a run that makes the steps after `span.start` until `span.stop`, or none
    with `training.eval_only`."""
    training, low = config.training, config.low_precision
    if training.eval_only:
        span = range(span.start, span.start)
    micro_steps = accumulation_steps(config, world_size)
    tokens = micro_steps * micro_batch(config) * training.block_size  # of this process
    plain = micro_steps * times.micro_step + times.update
    late = max(0, span.stop - max(span.start, int(span.stop * low.quantize_after)))
    rounded = late / max(1, len(span))  # share of the steps with 4-bit weights
    # Both splits, the held-out one in 4 bits again, and a batch whose active neurons are counted.
    splits = 2 if times.rounding == 0 else 3
    sources = len(source_datasets(config.dataset))
    batches = splits * math.ceil(sources * eval_batches(config) / world_size) + 1
    flops = tokens * model.flops_per_token(training.block_size) / plain
    # Evaluations go through their batch in micro-batches.
    evaluated = eval_batch(config) / micro_batch(config)
    found = Forecast(
        steps=len(span),
        step=plain + rounded * times.rounding,
        evaluations=training.eval_only or times_due(span.start, span.stop, training.test_freq),
        evaluation=batches * evaluated * times.evaluation_batch + times.rounding + times.sample,
        saves=0,
        save=(sum(p.nbytes for p in model.parameters()) + optimizer_state_bytes(model, config))
        / _DISK_RATE,
        flops=flops,
        share=flops / times.matmul_flops,
    )
    return replace(found, saves=saves_due(training, span.start, span.stop, found.total))
