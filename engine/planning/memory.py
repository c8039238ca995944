"""The memory of a run by part, predicted before anything is allocated, and what the device has.

All parts follow from the shapes of the weights, the config, and the formulas for activations in
model/memory.py. So variants of a config can be compared on one model, which may be on the meta
device: other batch sizes, sharding, another optimizer state. batch_size.py, strategy.py and
advice.py do that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import Config, ConfigError, accumulation_steps, micro_batch, schema
from engine.hardware.device import supports_fast_bfloat16
from engine.hardware.distributed import World
from engine.hardware.memory import (
    allocated_bytes,
    can_keep_freed_memory,
    cublas_workspace_bytes,
    free_bytes,
    pinned_bytes,
)
from engine.hardware.sharding import shard_counts, shard_dim
from engine.optim.adamw_4bit import chunk_size, is_quantizable
from engine.optim.muon import batch_by_shape
from engine.optim.quantized_moments import Quantized4bit
from engine.precision.precision import Precision
from model.interface import LanguageModel
from model.memory import StepShape, activation_bytes, cached_bytes
from settings.formatting import format_bytes

_IMPOSSIBLE = 4  # times the memory there is: far beyond any error of the prediction
_ADAMW_4BIT_TEMPORARIES = 8  # float32 numbers for each parameter of the chunk in hand
_BITSANDBYTES_MIN_NUMEL, _BITSANDBYTES_BLOCK = 4096, 256  # smaller tensors stay in float32
# Of a process on a CPU, measured. Kernels and their workspaces come with the first step; compiling
# adds 36 to 93 MB to the peak of small models.
_KERNEL_BYTES, _COMPILER_BYTES = 80 << 20, 80 << 20
# Where the C library keeps freed blocks, gaps between the blocks in use are this share of all that
# is allocated and freed in a step.
_FRAGMENTATION = 0.3


@dataclass(frozen=True)
class Memory:
    """Bytes of one process of a run by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    """Its state, in the format that it has."""
    copies: int
    """The master weights, while their 4-bit values stand in their place."""
    activations: int
    """The peak of forward and backward beyond weights and gradients; with sharded weights, what is
    gathered of them too."""
    update: int
    """The temporaries of the optimizer's step."""
    cached: int
    """Tables that the model keeps between steps."""
    process: int = 0
    """On a CPU: interpreter, libraries, kernels."""
    fragmentation: int = 0
    """On a CPU: gaps that the C library keeps between blocks in use."""
    workspaces: int = 0
    """On CUDA: what cuBLAS takes from torch's allocator."""
    saving: int = 0
    """On a CPU: the copy that a checkpoint is written from. Without memory for it, training waits
    while one is written."""
    shards: int = 1
    """Processes among which weights, gradients and optimizer state are divided."""
    complete: bool = True
    """False for an architecture without a formula: `activations` is 0 then."""

    @property
    def step(self) -> int:
        """The peak of a training step, as torch counts. An evaluation needs less: it has neither
        gradients nor a backward pass."""
        kept = self.weights + self.gradients + self.optimizer + self.cached
        return kept + max(self.copies + self.activations, self.update)

    @property
    def required(self) -> int:
        """What the process cannot run without."""
        return self.step + self.process + self.fragmentation + self.workspaces

    @property
    def peak(self) -> int:
        """The peak of the run, which `train/memory_bytes` will show from the first save on."""
        return self.required + self.saving

    def parts(self) -> str:
        """Returns every part of `required` that is not 0, in words."""
        update = max(0, self.update - self.copies - self.activations)
        activations = "activations" if self.shards == 1 else "activations and gathered weights"
        counted = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "copies of rounded weights": self.copies,
            activations: self.activations,
            "more in the optimizer's step": update,
            "cached tables": self.cached,
            "the process itself": self.process,
            "fragmentation": self.fragmentation,
            "workspaces of cuBLAS": self.workspaces,
        }
        words = [f"{format_bytes(n)} {name}" for name, n in counted.items() if n]
        return ", ".join(words if self.complete else [*words, "activations not predicted"])


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of a device: what this process has allocated, and what it can still get."""

    allocated: int
    free: int | None
    """None where it is unknown."""

    @staticmethod
    def of(world: World) -> MemoryBudget:
        """Measures the device now. Processes on the CPU of one machine share what is free."""
        free = free_bytes(world.device)
        if free is not None and world.on_cpu:
            free //= world.local_size
        return MemoryBudget(allocated_bytes(world.device), free)

    @property
    def total(self) -> int | None:
        """What the process can have in all; None where it is unknown."""
        return None if self.free is None else self.allocated + self.free

    def fits(self, memory: Memory, share: float = 1.0, copy: bool = False) -> bool | None:
        """Returns whether `memory` fits into this share of what is free; None where unknown. copy:
        also what saving copies, without which a run does as well."""
        if self.free is None:
            return None
        return (memory.peak if copy else memory.required) <= self.allocated + share * self.free


@dataclass(frozen=True)
class MemoryEstimator:
    """Predicts the memory of a run and of its variants. The model may be on the meta device."""

    config: Config
    model: LanguageModel
    precision: Precision
    world: World
    compiled: bool = False
    base: int | None = None
    """Bytes that the process holds without the tensors of the run; None: what it holds now, less
    the model's."""

    def memory(self, config: Config | None = None) -> Memory:
        """Returns the memory of the run, or of a variant of it."""
        config = config or self.config
        shards, several = shard_count(config, self.world), self.world.size > 1
        accumulates = accumulation_steps(config, self.world.size) > 1
        trained = sum(shard_bytes(p, shards) for p in _trained(self.model))
        step = StepShape(
            batch=micro_batch(config),
            block=config.training.block_size,
            dtype=self.precision.dtype,
            on_cpu=self.world.on_cpu,
            # DDP's buckets hold gradients from the first step on.
            accumulates=accumulates or (several and shards == 1),
            recompute=config.training.recompute == "layer",
            shards=shards,
            gathered=self.precision.weight_dtype,
        )
        activations = activation_bytes(self.model, step)
        found = Memory(
            weights=self._weight_bytes(shards),
            # With accumulation torch makes new gradients, and copies them into DDP's buckets.
            gradients=trained * (2 if accumulates and several and shards == 1 else 1),
            optimizer=optimizer_state_bytes(self.model, config, shards),
            copies=self.precision.master_bytes // shards,
            activations=activations or 0,
            update=_update_bytes(self.model, config, self.precision, shards),
            cached=cached_bytes(self.model, step),
            shards=shards,
            complete=activations is not None,
        )
        if not self.world.on_cpu:
            return replace(found, workspaces=cublas_workspace_bytes(self.world.device))
        allocated_and_freed = found.step - found.weights - found.gradients
        keeps = can_keep_freed_memory() and shards == 1
        gaps = int(_FRAGMENTATION * allocated_and_freed) if keeps else 0
        return replace(
            found,
            process=self._process_bytes(),
            fragmentation=gaps,
            saving=self.copy_bytes(found),
        )

    def _weight_bytes(self, shards: int) -> int:
        buffers = sum(buffer.nbytes for buffer in self.model.buffers())  # never sharded
        return buffers + sum(shard_bytes(p, shards) for p in self.model.parameters())

    def copy_bytes(self, memory: Memory) -> int:
        """Returns the host memory that saving takes, from the first save on: a copy of what this
        process writes or sends and, on the main one, one sharded weight as a whole."""
        if not self.config.training.save_model:
            return 0
        kept = memory.weights + memory.optimizer
        if self.world.device.type == "cuda":  # of each tensor in pinned memory
            held = [shard_bytes(p, memory.shards) for p in self.model.parameters()]
            kept = kept * sum(map(pinned_bytes, held)) // sum(held)
        if memory.shards == 1:
            return kept if self.world.is_main else 0
        largest = max((p.nbytes for p in self.model.parameters()), default=0)
        return kept + (largest if self.world.is_main else 0)

    def _process_bytes(self) -> int:
        base = self.base
        if base is None:
            own = (*self.model.parameters(), *self.model.buffers())
            model = sum(weight.nbytes for weight in own if weight.device.type == "cpu")
            base = max(0, allocated_bytes(self.world.device) - model)
        return base + _KERNEL_BYTES + _COMPILER_BYTES * self.compiled


def _trained(model: LanguageModel) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def shard_count(config: Config, world: World) -> int:
    """Returns among how many processes `distributed.strategy` divides each weight."""
    return shard_counts(config.distributed.strategy, world)[1]


def shard_bytes(weight: Tensor, shards: int) -> int:
    """Returns the largest part of a weight that one of so many processes holds, in bytes."""
    length = weight.shape[shard_dim(weight.shape, shards)]
    return weight.nbytes // length * -(-length // shards)


def optimizer_state_bytes(model: LanguageModel, config: Config, shards: int = 1) -> int:
    """Returns the memory of the optimizer's state after its first step; shards: processes among
    which it is divided."""
    trained = _trained(model)
    if config.optimizer.name == "muon":
        hidden = {id(weight) for weight, _ in model.hidden_weights()}
        return sum(shard_bytes(p, shards) * (1 if id(p) in hidden else 2) for p in trained)
    if config.low_precision.use_4bit_optimizer:
        return sum(_adamw_4bit_bytes(p) if is_quantizable(p) else 2 * p.nbytes for p in trained)
    if config.optimizer.name == "adamw_8bit":
        return sum(_adamw_8bit_bytes(p.numel()) for p in trained)
    return sum(2 * shard_bytes(p, shards) for p in trained)


def _adamw_4bit_bytes(parameter: Tensor) -> int:
    moment = Quantized4bit.zeros(parameter.numel(), torch.device("meta"))
    return 2 * sum(part.nbytes for part in moment)


def _adamw_8bit_bytes(count: int) -> int:
    if count < _BITSANDBYTES_MIN_NUMEL:
        return 8 * count
    return 2 * count + 8 * -(-count // _BITSANDBYTES_BLOCK)  # two codes, and two scales of a block


def _update_bytes(model: LanguageModel, config: Config, precision: Precision, shards: int) -> int:
    """Returns what the optimizer's step takes beside weights, gradients and state."""
    if config.optimizer.name == "muon":
        return _muon_bytes(model, precision.device, shards)
    if config.low_precision.use_4bit_optimizer:
        largest = max((p.numel() for p in _trained(model) if is_quantizable(p)), default=0)
        return _ADAMW_4BIT_TEMPORARIES * 4 * min(chunk_size(precision.device), largest)
    return 0


def _muon_bytes(model: LanguageModel, device: torch.device, shards: int) -> int:
    itemsize = 2 if supports_fast_bfloat16(device) else 4
    groups = defaultdict[int, list[Tensor]](list)
    for weight, n_fused in model.hidden_weights():
        groups[n_fused].append(weight)
    largest = 0
    for n_fused, weights in groups.items():
        for batch in batch_by_shape(weights, device):
            # The direction in float32; x, the next x and a third; the square of the shorter side.
            numel = batch[0].numel()
            rows, columns = numel // batch[0].shape[-1] // n_fused, batch[0].shape[-1]
            square = n_fused * min(rows, columns) ** 2
            needed = len(batch) * (4 * numel + itemsize * (3 * numel + square))
            if shards > 1:  # the shard of one direction at a time, and what it is gathered into
                needed += 4 * numel + shard_bytes(batch[0], shards)
            largest = max(largest, needed)
    return largest


def refuse_impossible(
    config: Config, precision: Precision, world: World, build: Callable[[Config], LanguageModel]
) -> None:
    """Raises ConfigError for a config that needs many times the memory of this machine.

    A smaller lack is only warned of: the prediction may be off, and other programs may end.
    """
    total = MemoryBudget.of(world).total
    if total is None:
        return
    small = config
    if config.training.batch_size == "auto":
        small = replace(config, training=replace(config.training, batch_size=1))
    # What a layer adds is the difference between two layers and one, so that a billion layers are
    # refused as quickly as two.
    peaks = list[int]()
    try:
        for layers in (1, 2):
            shallow = replace(small, model=replace(small.model, n_layer=layers))
            with torch.device("meta"):
                model = build(shallow)
            memory = MemoryEstimator(shallow, model, precision, world, base=0).memory()
            peaks.append(memory.required)
    except (RuntimeError, OverflowError, TypeError):  # how torch says it differs by operator
        sizes = _size_options(config)
        raise ConfigError(f"{sizes}: no machine holds tensors of such sizes.") from None
    needed = peaks[0] + (config.model.n_layer - 1) * (peaks[1] - peaks[0])
    if needed > _IMPOSSIBLE * total:
        raise ConfigError(
            f"{_size_options(config)}: a step takes about {format_bytes(needed)} of memory, and "
            f"{world.device} has {format_bytes(total)}. Lower the largest of them."
        )


def _size_options(config: Config) -> str:
    """Returns the options that make a run large, with their values."""
    model, training = config.model, config.training
    own = [o.name for o in schema().in_section("model") if model.name in o.models and o.kind is int]
    named = {f"model.{k}": getattr(model, k) for k in ("n_layer", "n_embd", "vocab_size", *own)}
    named |= {f"training.{k}": getattr(training, k) for k in ("batch_size", "block_size")}
    return ", ".join(f"{key}={value}" for key, value in named.items() if value is not None)
