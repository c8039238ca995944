"""What a run holds in memory, by part; what there is; what would fit.

The one idea: all parts follow from the shapes of a model's weights, from the config and from the
model's own count of its activations. So a config can be asked what it needs before anything is
allocated, and so can its variants, on the same model: other batch sizes, another optimizer state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from config import (
    FP8_MULTIPLE,
    Config,
    ConfigError,
    MemoryShortError,
    accumulation_steps,
    micro_batch,
    schema,
)
from engine.hardware.device import supports_fast_bfloat16
from engine.hardware.distributed import World
from engine.hardware.memory import allocated_bytes, can_keep_freed_memory, free_bytes
from engine.optim.adamw_4bit import CHUNK, is_quantizable
from engine.optim.quantized_moments import Quantized4bit
from model.interface import LanguageModel
from settings.formatting import format_bytes

SHARE = 0.9  # of the free memory that `batch_size: auto` fills
MOST_SEQUENCES = 10**9  # of a step whose divisors `batch_size: auto` tries
IMPOSSIBLE = 4  # times the memory there is: far beyond any error of the prediction
_GENERAL = "Lower training.batch_size, and raise gradient_accumulation_steps with it."
_EIGHT_BIT = (4096, 256)  # bitsandbytes: numbers of the smallest tensor in 8 bits, and of a block
_PIECES = 8  # float32 numbers beside each that the 4-bit step has in hand
# Of a process on a CPU, measured. Kernels and their workspaces come with the first step. And where
# freed blocks are kept, the holes between those that stay are this share of what comes and goes.
_KERNELS, _HOLES = 80 << 20, 0.3
_COMPILER = 80 << 20  # torch.compile: 36 to 93 MB more at the peak of small models


class Formats(Protocol):
    """What number formats (engine/precision) tell of theirs."""

    dtype: torch.dtype
    """Of matrix products."""
    device: torch.device

    @property
    def master_bytes(self) -> int:
        """Memory of the copies kept while weights are rounded."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process of a run by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    """Its state, in the format that it has."""
    copies: int
    """The weights themselves, while rounded ones stand in their place."""
    activations: int
    """What forward and backward hold at their peak, beside all this."""
    update: int
    """What the optimizer's step holds for a moment."""
    cached: int
    """Tables that the model keeps."""
    process: int = 0
    """On a CPU: interpreter, libraries, kernels."""
    holes: int = 0
    """On a CPU: what the C library keeps between blocks in use."""

    @property
    def step(self) -> int:
        """At the peak of a training step, by torch's count. An evaluation needs less: it has
        neither gradients nor a backward pass."""
        held = self.weights + self.gradients + self.optimizer + self.cached
        return held + max(self.copies + self.activations, self.update)

    @property
    def peak(self) -> int:
        """What `train/memory_bytes` will show."""
        return self.step + self.process + self.holes

    def parts(self) -> str:
        """Every part that is there, in words."""
        update = max(0, self.update - self.copies - self.activations)
        counted = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "copies of rounded weights": self.copies,
            "activations": self.activations,
            "more in the optimizer's step": update,
            "cached tables": self.cached,
            "the process itself": self.process,
            "between blocks": self.holes,
        }
        return ", ".join(
            f"{format_bytes(count)} {name}" for name, count in counted.items() if count
        )


@dataclass(frozen=True)
class Room:
    """Memory of a device, in bytes: what this process holds, and what it can still get."""

    held: int
    free: int | None
    """None where nobody tells."""

    @staticmethod
    def of(world: World) -> Room:
        """As it is now; processes on one CPU share what is free."""
        free = free_bytes(world.device)
        if free is not None and world.on_cpu:
            free //= world.size
        return Room(allocated_bytes(world.device), free)

    def fits(self, memory: Memory, share: float = 1.0) -> bool | None:
        """Whether a run that needs `memory` fits into this share of what is free; None: unknown."""
        return None if self.free is None else memory.peak <= self.held + share * self.free


@dataclass(frozen=True)
class Needs:
    """A run, as far as its memory goes. The model may be on the meta device."""

    config: Config
    model: LanguageModel
    precision: Formats
    world: World
    compiled: bool = False
    base: int | None = None
    """What the process holds without the run's tensors; None: what it holds now, less those that
    the model has."""

    def memory(self, config: Config | None = None) -> Memory:
        """Of the run, or of a variant of it."""
        config = config or self.config
        model, on_cpu = self.model, self.world.on_cpu
        trained = [p for p in self.model.parameters() if p.requires_grad]
        tokens = (micro_batch(config), config.training.block_size)
        adding = accumulation_steps(config, self.world.size) > 1
        dtype = self.precision.dtype
        found = Memory(
            weights=sum(weight.nbytes for weight in self._weights()),
            gradients=sum(p.nbytes for p in trained),
            optimizer=state_bytes(self.model, config),
            copies=self.precision.master_bytes,
            activations=model.activation_bytes(tokens, dtype, on_cpu, adding),
            update=_update_bytes(self.model, config, self.precision),
            cached=model.cached_bytes(tokens, dtype, on_cpu),
        )
        if not on_cpu:
            return found
        moving = found.step - found.weights - found.gradients if can_keep_freed_memory() else 0
        return replace(found, process=self._process(), holes=int(_HOLES * moving))

    def _weights(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()

    def _process(self) -> int:
        base = self.base
        if base is None:
            here = sum(w.nbytes for w in self._weights() if w.device.type == "cpu")
            base = max(0, allocated_bytes(self.world.device) - here)
        return base + _KERNELS + _COMPILER * self.compiled


def state_bytes(model: LanguageModel, config: Config) -> int:
    """Memory of the optimizer's state once it is there."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer.name == "muon":
        matrices = {id(matrix) for matrix, _ in model.hidden_weights()}
        return sum(p.nbytes * (1 if id(p) in matrices else 2) for p in trained)
    if config.low_precision.use_4bit_optimizer:
        return sum(_four_bit(p) if is_quantizable(p) else 2 * p.nbytes for p in trained)
    if config.optimizer.name == "adamw_8bit":
        return sum(_eight_bit(p) for p in trained)
    return sum(2 * p.nbytes for p in trained)


def _four_bit(parameter: Tensor) -> int:
    return 2 * sum(
        part.nbytes for part in Quantized4bit.zeros(parameter.numel(), torch.device("meta"))
    )


def _eight_bit(parameter: Tensor) -> int:
    fewest, block = _EIGHT_BIT
    count = parameter.numel()
    return 8 * count if count < fewest else 2 * count + 8 * -(-count // block)


def _update_bytes(model: LanguageModel, config: Config, precision: Formats) -> int:
    """What the optimizer's step takes beside weights, gradients and state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer.name == "muon":
        found = model.hidden_weights()
        return max((_muon_bytes(m, count, precision) for m, count in found), default=0)
    if config.low_precision.use_4bit_optimizer:
        most = max((p.numel() for p in trained if is_quantizable(p)), default=0)
        return _PIECES * 4 * min(CHUNK, most)
    return 0


def _muon_bytes(matrix: Tensor, count: int, precision: Formats) -> int:
    """The direction in float32; x, the next x and a third; and the square of the shorter side."""
    itemsize = 2 if supports_fast_bfloat16(precision.device) else 4
    rows, columns = matrix.numel() // matrix.shape[-1] // count, matrix.shape[-1]
    square = count * min(rows, columns) ** 2
    return 4 * matrix.numel() + itemsize * (3 * matrix.numel() + square)


def refuse_impossible(
    config: Config, precision: Formats, world: World, build: Callable[[Config], LanguageModel]
) -> None:
    """Raises ConfigError for a config that no amount of tuning fits into this machine's memory.

    Nothing is allocated to find that out: models of one and of two layers are built on the meta
    device, and what a layer adds is the difference, so a billion layers cost no more than two.
    What is short by less is only warned of: the prediction may be off, and other programs may end.
    """
    room = Room.of(world)
    if room.free is None:
        return
    small = with_batch(config, 1) if config.training.batch_size == "auto" else config
    peaks = list[int]()
    try:
        for layers in (1, 2):
            shallow = replace(small, model=replace(small.model, n_layer=layers))
            with torch.device("meta"):
                model = build(shallow)
            peaks.append(Needs(shallow, model, precision, world, base=0).memory().peak)
    except (RuntimeError, OverflowError, TypeError):  # how torch says it differs by operator
        raise ConfigError(f"{_sizes(config)}: no machine holds tensors of such sizes.") from None
    one, two = peaks
    needed, there = one + (config.model.n_layer - 1) * (two - one), room.held + room.free
    if needed > IMPOSSIBLE * there:
        raise ConfigError(
            f"{_sizes(config)}: a step takes about {format_bytes(needed)} of memory, and "
            f"{world.device} has {format_bytes(there)}. Lower the largest of them."
        )


def _sizes(config: Config) -> str:
    """Names the options that make a run large, with their values."""
    model, training = config.model, config.training
    own = [o.name for o in schema().in_section("model") if model.name in o.models and o.kind is int]
    keys = ["n_layer", "n_embd", "vocab_size", *own]
    named = {f"model.{key}": getattr(model, key) for key in keys}
    named |= {f"training.{key}": getattr(training, key) for key in ("batch_size", "block_size")}
    return ", ".join(f"{key}={value}" for key, value in named.items() if value is not None)


def memory_lines(needs: Needs, room: Room) -> list[str]:
    """What a step needs and what is free; where it does not fit, what would."""
    memory = needs.memory()
    there = "" if room.free is None else f" of {format_bytes(room.held + room.free)} there are"
    lines = [f"Memory of a step: {format_bytes(memory.peak)}{there}: {memory.parts()}"]
    if room.fits(memory) is False:
        lines.append(f"WARNING: it does not fit. {_advice(needs, room)}")
    return lines


def out_of_memory_lines(
    error: BaseException, needs: Needs | None = None, room: Room | None = None
) -> list[str]:
    """What was using the memory that ran out, and what would fit. needs, room: where known; room
    is the one from before the run."""
    lines = [f"Out of memory: {str(error).strip() or type(error).__name__}"]
    if needs is None or room is None:
        return [*lines, _GENERAL]
    memory = needs.memory()
    lines.append(f"A step needs {format_bytes(memory.peak)}: {memory.parts()}")
    there = memory.peak if room.free is None else room.held + room.free
    room = Room(0, int(SHARE * min(there, memory.peak)))  # it has just not fitted
    if memory.peak < SHARE * there:
        lines.append(
            f"{format_bytes(there)} were there when the run began: something else took them, or "
            "more is needed than was counted."
        )
        return [*lines, _advice(needs, room) if fitting(needs, room) else _GENERAL]
    return [*lines, _advice(needs, room)]


def ran_out(error: BaseException) -> bool:
    """Whether this is an error of memory, by Python, a device or torch on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def explained_memory(needs: Needs, room: Room) -> Iterator[None]:
    """Raises MemoryShortError with `out_of_memory_lines` in place of an error of memory."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise MemoryShortError("\n".join(out_of_memory_lines(error, needs, room))) from error


def _advice(needs: Needs, room: Room) -> str:
    options = fitting(needs, room)
    if not options:
        return "Only a smaller model would fit: lower model.n_layer or model.n_embd."
    said = [f"{words} ({format_bytes(memory.peak)})" for words, memory in options]
    return "What would fit: " + ", or ".join(said)


def fitting(needs: Needs, room: Room, count: int = 2) -> list[tuple[str, Memory]]:
    """The first variants that fit, the mildest first: overrides that make them, and their memory.

    All keep the tokens of a step.
    """
    found = list[tuple[str, Memory]]()
    batches = set[int]()
    for variants in (_batches, _four_bit_state, _blocks, _all_at_once):
        for words, config in variants(needs):
            memory = needs.memory(config)
            if room.fits(memory):
                combined = variants is _all_at_once and micro_batch(config) in batches
                if not combined:  # else it gives nothing more for its cost in precision
                    found.append((words, memory))
                    batches.add(micro_batch(config))
                break
        if len(found) == count:
            break
    return found


Variants = Iterator[tuple[str, Config]]


def _batches(needs: Needs) -> Variants:
    """Smaller micro-batches, and more of them."""
    config, training = needs.config, needs.config.training
    for batch in _divisors_below(micro_batch(config)):
        if _allowed(config, batch):
            yield _resized(config, needs.world.size, batch, training.block_size)


def _blocks(needs: Needs) -> Variants:
    """Shorter sequences, and more of them."""
    config, length = needs.config, needs.config.training.block_size
    while length % 2 == 0 and length > 64:
        length //= 2
        yield _resized(config, needs.world.size, micro_batch(config), length)


def _four_bit_state(needs: Needs) -> Variants:
    config = needs.config
    if config.optimizer.name == "adamw" and not config.low_precision.use_4bit_optimizer:
        low = replace(config.low_precision, use_4bit_optimizer=True)
        yield "low_precision.use_4bit_optimizer=true", replace(config, low_precision=low)


def _all_at_once(needs: Needs) -> Variants:
    """4-bit moments with smaller micro-batches."""
    for words, config in _four_bit_state(needs):
        for more, smaller in _batches(replace(needs, config=config)):
            yield f"{words} {more}", smaller


def _resized(config: Config, world_size: int, batch: int, block: int) -> tuple[str, Config]:
    training = config.training
    words = "" if batch == training.batch_size else f"training.batch_size={batch}"
    if block != training.block_size:
        words += f"training.block_size={block}"
    sized = replace(training, batch_size=batch, block_size=block)
    if training.tokens_per_step is None:
        sequences = accumulation_steps(config, world_size) * micro_batch(config)
        steps = sequences * training.block_size // (batch * block)
        words += f" gradient_accumulation_steps={steps}"
        sized = replace(sized, gradient_accumulation_steps=steps)
    return words, replace(config, training=sized)


def _divisors_below(number: int) -> list[int]:
    """Returns the divisors of a number but itself, the largest first."""
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    found = {*small, *(number // each for each in small)} - {number}
    return sorted(found, reverse=True)


def _allowed(config: Config, batch: int) -> bool:
    tokens = batch * config.training.block_size
    return not config.low_precision.use_fp8 or tokens % FP8_MULTIPLE == 0


def batch_sizes(config: Config, world_size: int) -> list[int]:
    """The micro-batches that make up `tokens_per_step` exactly, the largest first; ConfigError."""
    training = config.training
    tokens, row = training.tokens_per_step, training.block_size * world_size
    assert tokens is not None  # a rule of `auto`
    if tokens % row:
        raise ConfigError(
            f"training.tokens_per_step={tokens} is not a multiple of training.block_size="
            f"{training.block_size} * {world_size} processes, so no batch_size makes it up."
        )
    sequences = tokens // row
    if sequences > MOST_SEQUENCES:
        raise ConfigError(
            f"training.tokens_per_step={tokens} is {sequences:,} sequences of training.block_size="
            f"{training.block_size}; batch_size=auto takes at most {MOST_SEQUENCES:,}."
        )
    found = [each for each in (sequences, *_divisors_below(sequences)) if _allowed(config, each)]
    if not found:
        raise ConfigError(
            f"low_precision.use_fp8 takes multiples of {FP8_MULTIPLE} tokens, which no "
            f"training.batch_size gives with training.block_size={training.block_size}."
        )
    return found


def with_batch(config: Config, batch: int, eval_batch: int | None = None) -> Config:
    """The config with this micro-batch, and with this batch of evaluations where it says none: the
    text that is evaluated must not depend on the memory that was free."""
    given = config.training.eval_batch_size or eval_batch
    sized = replace(config.training, batch_size=batch, eval_batch_size=given)
    return replace(config, training=sized)


def largest_batch(needs: Needs, room: Room) -> tuple[list[int], str]:
    """For `training.batch_size: auto`: the micro-batches that fit by the prediction, the largest
    first, and a line that says which and why. ConfigError where none does or nobody tells."""
    config = needs.config
    if room.free is None:
        raise ConfigError(
            f"training.batch_size=auto: how much memory {needs.world.device} has free is not known "
            "here. Give a number."
        )
    sizes = batch_sizes(config, needs.world.size)
    memories = [needs.memory(with_batch(config, each)) for each in sizes]
    places = [place for place, each in enumerate(memories) if room.fits(each, SHARE)]
    if not places:
        least = memories[-1]
        raise ConfigError(
            f"training.batch_size=auto: {sizes[-1]} at a time need {format_bytes(least.peak)} "
            f"({least.parts()}), and {SHARE:.0%} of the {format_bytes(room.free)} free are to be "
            "filled. Lower training.block_size or the size of the model."
        )
    first = places[0]
    why = "a whole step at once"
    if first:
        why = f"{sizes[first - 1]} would need {format_bytes(memories[first - 1].peak)}"
    line = (
        f"Batch size: {sizes[first]} of {sizes[0]} sequences, "
        f"{format_bytes(memories[first].peak)}: the largest that fits in "
        f"{SHARE:.0%} of {format_bytes(room.free)} free ({why})"
    )
    return [sizes[place] for place in places], line


def confirmed(sizes: list[int], attempt: Callable[[int], object], world: World) -> int:
    """The first of `sizes` with which `attempt`, a trial step, does not run out of memory on any
    process; ConfigError where all do. All processes call it."""
    for batch in sizes:
        failed = False
        try:
            attempt(batch)
        except torch.OutOfMemoryError:
            failed = True  # what the error holds on to is gone only after this block
        if failed and world.device.type == "cuda":
            torch.cuda.empty_cache()
        if not world.any_rank(failed):
            return batch
    raise ConfigError(
        f"training.batch_size=auto: even {sizes[-1]} runs out of memory. Lower training.block_size "
        "or the size of the model."
    )
