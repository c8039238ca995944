"""How long a run will take, from what its parts take here and now.

The one idea: nothing is assumed of the device, disks aside. The run's own model computes the run's
own micro-steps, an optimizer step and an evaluation's forward pass, for a second or two each; the
run is that many times as long. Beside it stands how fast plain matrix products are on this device.

Left out: starting, reading data, and the exchange of gradients between processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from config import Config, accumulation_steps, eval_batch, micro_batch
from engine.evaluate import DocumentIds, evaluating, next_token_loss
from engine.memory import Needs, Room, state_bytes, with_batch
from engine.metrics import duration, short
from engine.optimizer import clip_gradients, gradient_norm
from engine.precision import Precision
from engine.state import saves_due, times_due

ENOUGH_S = 1.5  # of measuring one thing, after a first time that does not count
_MATMUL_S = 0.3
_DISK_RATE = 500e6  # bytes per second; nothing is written to find it out


@dataclass(frozen=True)
class Rates:
    """Measured seconds of the parts of a run."""

    micro_step: float
    """Forward and backward of one micro-batch."""
    update: float
    """Gradient norm, clipping and the optimizer's step."""
    evaluation_batch: float
    rounding: float
    """Taking weights to 4 bits and back, once; 0 where they are not."""
    matmul: float
    """FLOP/s of plain products in the run's dtype."""
    sample: float = 0.0
    """Writing `training.sample_prompt` on."""


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
    compile_s: float = 0.0

    @property
    def total(self) -> float:
        """Of the whole run."""
        evaluations, saves = self.evaluations * self.evaluation, self.saves * self.save
        return self.compile_s + self.steps * self.step + evaluations + saves

    def line(self, world_size: int = 1) -> str:
        """What a dry run prints."""
        parts = []
        if self.steps:
            parts.append(
                f"{self.steps:,} steps of {_seconds(self.step)} ({_rate(self.flops)}, "
                f"{self.share:.0%} of a plain product's rate)"
            )
        if self.evaluations:
            parts.append(
                f"{_counted(self.evaluations, 'evaluation')} of {_seconds(self.evaluation)}"
            )
        if self.saves:
            parts.append(f"{_counted(self.saves, 'save')} of {_seconds(self.save)}")
        if self.compile_s:
            parts.append(f"{_seconds(self.compile_s)} to compile")
        alone = "; exchange between processes not counted" if world_size > 1 else ""
        return f"Time: about {duration(self.total)} on this device: {', '.join(parts)}{alone}"


def _rate(flops: float) -> str:
    return f"{short(flops)}FLOP/s".replace(" BFLOP", " GFLOP")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else duration(value)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def trial_config(needs: Needs, room: Room) -> Config | None:
    """The config whose micro-steps can be tried here: the run's, else with one sequence at a time;
    None where not even that fits."""
    for config in (needs.config, with_batch(needs.config, 1)):
        if room.fits(needs.memory(config)) is not False:
            return config
    return None


def measure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    config: Config,
    documents: DocumentIds | None = None,
) -> Rates:
    """The rates of a run by its own objects, on random tokens; the model is not the same after it.

    `config` may be that of `trial_config`; `scaled` makes rates of the run's own micro-batches.
    """
    shape = (micro_batch(config), config.training.block_size + 1)
    assert config.model.vocab_size is not None
    rows = torch.randint(config.model.vocab_size, shape)

    def loss() -> Tensor:
        with precision.autocast():
            total = next_token_loss(model, rows, precision.device, documents)
        return total / rows.numel()

    def forward() -> None:
        with torch.inference_mode(), evaluating(model):
            loss().item()

    def update() -> None:
        clip_gradients(model, gradient_norm(model), limit=1.0)
        precision.step(optimizer, lambda values: values)

    def rounding() -> None:
        with nullcontext() if precision.quantized is None else precision.quantized.applied():
            pass

    def micro_step() -> None:
        # 0: a step is counted from 1, and none of these is one with rounded weights
        with precision.training(0):
            precision.backward(loss())

    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step_s = seconds_of(micro_step, precision.device)
    update_s = seconds_of(update, precision.device)
    optimizer.zero_grad(set_to_none=True)
    return Rates(
        micro_step=step_s,
        update=update_s,
        evaluation_batch=seconds_of(forward, precision.device),
        rounding=0.0 if precision.quantized is None else seconds_of(rounding, precision.device),
        matmul=matmul_rate(precision.device, precision.dtype),
    )


def scaled(rates: Rates, factor: float) -> Rates:
    """The rates with micro-batches `factor` times as large as those measured."""
    return replace(
        rates,
        micro_step=rates.micro_step * factor,
        evaluation_batch=rates.evaluation_batch * factor,
    )


def seconds_of(trial: Callable[[], object], device: torch.device) -> float:
    """What `trial` takes: the median of at least two times, after one that does not count."""
    _timed(trial, device)
    taken = [_timed(trial, device), _timed(trial, device)]
    while sum(taken) < ENOUGH_S and len(taken) < 100:
        taken.append(_timed(trial, device))
    return median(taken)


def _timed(trial: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    trial()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square products, of the largest size that takes a few hundredths of a second."""
    size, began = 256, time.perf_counter()
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
        _timed(multiply, device)  # kernels are chosen
        taken = _timed(multiply, device)
        if taken > 0.02 or size == 8192 or time.perf_counter() - began > _MATMUL_S / 3:
            break
        size *= 2
    while time.perf_counter() - began < _MATMUL_S:
        taken = min(taken, _timed(multiply, device))
    return float(2 * size**3 / taken)


def forecast(
    config: Config, rates: Rates, model: nn.Module, span: range, world_size: int
) -> Forecast:
    """The times of a run that makes the steps after `span.start` until `span.stop`, by the rates of
    its parts; of none with `training.eval_only`."""
    training, low = config.training, config.low_precision
    if training.eval_only:
        span = range(span.start, span.start)
    micro_steps = accumulation_steps(config, world_size)
    tokens = micro_steps * micro_batch(config) * training.block_size  # of this process
    plain = micro_steps * rates.micro_step + rates.update
    late = max(0, span.stop - max(span.start, int(span.stop * low.quantize_after)))
    rounded = late / max(1, len(span))  # share of the steps
    splits = 2 if rates.rounding == 0 else 3
    batches = splits * math.ceil(training.eval_iters / world_size) + 1  # neurons are counted
    flops = tokens * model.flops_per_token(training.block_size) / plain  # type: ignore[operator]
    evaluated = eval_batch(config) / micro_batch(config)  # as many at a time
    found = Forecast(
        steps=len(span),
        step=plain + rounded * rates.rounding,
        evaluations=training.eval_only or times_due(span.start, span.stop, training.test_freq),
        evaluation=batches * evaluated * rates.evaluation_batch + rates.rounding + rates.sample,
        saves=0,
        save=(sum(p.nbytes for p in model.parameters()) + state_bytes(model, config)) / _DISK_RATE,
        flops=flops,
        share=flops / rates.matmul,
    )
    return replace(found, saves=saves_due(training, span.start, span.stop, found.total))
