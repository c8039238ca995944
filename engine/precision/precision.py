"""Number formats of a run, wrapped around a finished model from outside; models know none of them.

The order: `Precision(...)` checks the device; the model may be sharded; `prepare` adds adapters,
which freeze the weights (hence before the optimizer is built), then attaches FP8 matmuls and takes
charge of 4-bit weights; then come the optimizer, saved state, the compiler and DDP.

    bfloat16, float16    autocast; master weights stay float32; float16 with a loss scaler
    residual stream      of gpt and llama in bfloat16: cast after the embedding
    FP8                  products with hidden weights from 8-bit operands (fp8.py)
    4-bit weights        the last part of the run computes with rounded weights (weights_4bit.py)
    adapters             trained beside frozen 4-bit weights (lora.py)
    optimizer state      engine/optim/: not a matter of this file

How to add a format
    1. An option in `config.LowPrecisionConfig`, where its rules of resuming are declared; what it
       excludes in `settings/constraints.py`, where also `use_4bit: auto` is decided. If a library
       is missing or the device cannot compute it, raise ConfigError: in `Precision.__init__`, so
       that it is refused before data is read.
    2. One class, made in `Precision.prepare`:
       rounded weights       has the public members of `QuantizedWeights`; it is assigned to
                             `self.quantized`, whose type becomes the union of both classes
       products              a subclass of `Fp8Backend`, returned by `fp8.attach_fp8`
       replaced layers       a subclass of `model.matmul.Linear`, swapped in like `LoraLinear`
       optimizer state       an optimizer, returned by `optim.build.build_optimizer`, and its size
                             in `planning.memory`
    3. Nothing in the trainer: training, evaluation (also with rounded weights, by their `metric`
       and `label`), checkpoints, memory and the lines at the start go through `Precision`.
    4. Where it is shown: the precision of a run in `compare/read.py`, the metric's title in
       `compare/plot/curves.py`.
    5. `_covering` in `engine/setup/check_resume.py`, if the format starts late in a run: it makes
       `--check-resume` start 4-bit weights early enough to be checked, and knows no other format.
    6. Only for files in that format: `export.py --format`, from `packed_tensors`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from config import ConfigError, Fp8Config, LowPrecisionConfig, Request
from engine.hardware.device import resolve_device, supports_fast_bfloat16
from engine.precision import tensor_4bit
from engine.precision.fp8 import attach_fp8, check_device
from engine.precision.fp8_backend import Fp8Backend
from engine.precision.lora import apply_lora, lora_description
from engine.precision.weights_4bit import QuantizedWeights
from model import LanguageModel
from model.matmul import Linear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Precision:
    """How a run computes. A step uses, in this order:

        with precision.training(step):
            with precision.autocast():
                loss = ...
            precision.backward(loss)
        precision.unscale(optimizer)
        precision.step(optimizer, all_reduce_max)

    note: a line about the fallback if the device cannot compute in the configured dtype, else None.
    quantized: the rounded weights, for evaluations with them; None without such a format.
    """

    def __init__(
        self, config: LowPrecisionConfig, device: torch.device, fp8: Fp8Config | None = None
    ) -> None:
        """Raises ConfigError if the device or a missing library cannot do what is configured."""
        asked = DTYPES[config.compute_dtype]
        self.config, self.device = config, device
        self.dtype = asked
        self.note: str | None = None
        if asked is torch.bfloat16 and not supports_fast_bfloat16(device):
            self.dtype = torch.float16 if device.type == "cuda" else torch.float32
            self.note = f"bfloat16 is not supported by {device}; {self.name} is used instead"
        # A disabled scaler passes everything through, so that every dtype takes the same step.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self._fp8_config = fp8 if config.use_fp8 else None
        if self._fp8_config is not None:
            check_device(self._fp8_config, device)
        self.fp8: Fp8Backend | None = None
        self.quantized: QuantizedWeights | None = None
        self._first_quantized_step = 0
        self._in_step = False

    @property
    def name(self) -> str:
        """The dtype's name, as in the config."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def matmul_format(self) -> str:
        """The format of most matmuls: "fp8", or the dtype's name."""
        return self.name if self._fp8_config is None else "fp8"

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype in which products read hidden weights; 8-bit operands are cast from float32."""
        return torch.float32 if self._fp8_config is not None else self.dtype

    def prepare(self, model: LanguageModel, planned_steps: int, init: bool = True) -> list[str]:
        """Attaches the formats to a model on its device, whose weights are drawn or loaded; returns
        lines for the start of the run that count what is covered. Raises ConfigError.

        planned_steps: of the whole run; weights are rounded after `quantize_after` of them. init:
        whether adapters quantize the model's weights; False if a checkpoint replaces them.
        """
        lines = []
        if self.config.residual_dtype == "bfloat16":
            lines.append(self._narrow_residual_stream(model))
        if apply_lora(model, self.config, init):
            lines.append(lora_description(model))
        elif self.config.use_4bit:
            self.quantized = QuantizedWeights(model, self.config)
            self._first_quantized_step = int(planned_steps * self.config.quantize_after) + 1
            lines.append(self.quantized.description(self._first_quantized_step))
        if self._fp8_config is not None:
            self.fp8 = attach_fp8(self._fp8_config, model, self.device, self.dtype)
            lines.append(self._fp8_description(self.fp8, model))
            if not self.fp8.compiles:
                lines.append("fp8: delayed scaling of linear layers goes without torch.compile")
        return lines

    def _narrow_residual_stream(self, model: LanguageModel) -> str:
        if self.dtype is not torch.bfloat16:  # the sum of both types would be float32 again
            return f"low_precision.residual_dtype=bfloat16: float32, as products are {self.name}"
        model.residual_dtype = torch.bfloat16
        return "Residual stream in bfloat16, norms in float32"

    def _fp8_description(self, fp8: Fp8Backend, model: LanguageModel) -> str:
        # By weights: BDH uses each of its weights in every layer. The one more is the head, which
        # stays in the dtype of autocast.
        covered, head = len(fp8.covered), model.embedding_and_head()[1]
        every = model.named_parameters(remove_duplicate=False)
        name = [name for name, parameter in every if parameter is head][-1].removesuffix(".weight")
        dtype = self.name.replace("bfloat", "bf").replace("float", "fp")
        line = f"fp8: {covered} of {covered + 1} matmuls, {fp8.summary}; {name} {dtype}"
        slow = " (a CPU computes it slowly: for trying)" if self.device.type == "cpu" else ""
        return line + slow

    @property
    def master_bytes(self) -> int:
        """Memory of the master weights that are kept while weights are rounded."""
        return 0 if self.quantized is None else self.quantized.nbytes

    @property
    def compiles(self) -> bool:
        """Whether the model may be compiled."""
        return self.fp8 is None or self.fp8.compiles

    def verify_fp8_used(self, trial: Callable[[], object]) -> list[str]:
        """Runs `trial`, a forward and backward pass; returns a line that counts its FP8 matmuls.

        Raises RuntimeError for none. Leaves random generators as they were.
        """
        if self.fp8 is None:
            return []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return [f"fp8: {self.fp8.count_matmuls(trial):,} matmuls in a trial step"]

    def autocast(self) -> AbstractContextManager[None]:
        """Encloses every forward pass, in training and evaluation."""
        enabled = self.dtype is not torch.float32
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)
        return autocast if self.fp8 is None else self._fp8_autocast(self.fp8, autocast)

    @contextlib.contextmanager
    def _fp8_autocast(
        self, fp8: Fp8Backend, autocast: AbstractContextManager[None]
    ) -> Iterator[None]:
        with self._frozen_scales_outside_steps(fp8), fp8.autocast(), autocast:
            yield

    def _frozen_scales_outside_steps(self, fp8: Fp8Backend) -> AbstractContextManager[None]:
        """Keeps evaluations and trial steps, forward and backward, from changing later scales: runs
        would otherwise depend on how often they are evaluated. Does nothing within `training`."""
        return contextlib.nullcontext() if self._in_step else fp8.frozen_scales()

    @contextlib.contextmanager
    def training(self, step: int) -> Iterator[None]:
        """Encloses the forward and backward passes of a step, counted from 1."""
        with ExitStack() as stack:
            if self.fp8 is not None:
                stack.enter_context(self.fp8.training())
            if self.quantized is not None and step >= self._first_quantized_step:
                stack.enter_context(self.quantized.applied())
            self._in_step = True
            stack.callback(setattr, self, "_in_step", False)
            yield

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar loss, scaled for float16."""
        fp8 = self.fp8
        with contextlib.nullcontext() if fp8 is None else self._frozen_scales_outside_steps(fp8):
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the loss scale, before clipping."""
        self.scaler.unscale_(optimizer)

    def step(
        self, optimizer: torch.optim.Optimizer, all_reduce_max: Callable[[Tensor], Tensor]
    ) -> None:
        """Takes the optimizer's step; float16 skips it if gradients overflowed, and lowers the loss
        scale. all_reduce_max: replaces a tensor by the maximum over all processes."""
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.fp8 is not None:
            self.fp8.end_step(all_reduce_max)

    @property
    def tolerates_overflow(self) -> bool:
        """Whether non-finite gradients are routine (float16 searches for its loss scale)."""
        return self.scaler.is_enabled()

    def metrics(self) -> dict[str, float]:
        """Returns what FP8 did since the last call; raises RuntimeError if it was not used."""
        return {} if self.fp8 is None else self.fp8.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Returns the loss scaler and the FP8 scales as plain values; each may be empty."""
        scales = {} if self.fp8 is None else self.fp8.state_dict()
        return {"scaler": self.scaler.state_dict(), "fp8": scales}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Restores what `state_dict` gave; returns a line if FP8 scales start afresh."""
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.fp8 is None or self.fp8.load_state_dict(state["fp8"]):
            return []
        return ["fp8: scales start afresh, because the checkpoint has none for these operands"]


def round_linear_weights(
    model: LanguageModel, config: LowPrecisionConfig, device: torch.device
) -> AbstractContextManager[None]:
    """Rounds the weights of linear layers to the dtype of training, in place, for generation;
    returns the autocast to generate in, whose products are then those of training.

    Each token reads all weights, which takes most of its time on a GPU. Autocast alone would round
    them again for each token. Without linear layers (BDH) nothing changes: it would round the state
    as well.
    """
    dtype = Precision(config, device).dtype
    if dtype is torch.float32 or not model.hidden_linears():
        return contextlib.nullcontext()
    for module in model.modules():
        if type(module) is Linear:  # not those of adapters, whose weights are in 4 bits
            # A new parameter: an embedding that shares the head's weights keeps them exact.
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    return torch.autocast(device.type, dtype=dtype)


def disable_unavailable_4bit(request: Request) -> Request:
    """Returns the request, with 4-bit weights switched off and a note if they cannot be computed
    here and are only a default. Raises ConfigError if the user asked for them."""
    low, switch = request.config.low_precision, "low_precision.use_4bit"
    if not low.use_4bit:
        return request
    try:
        tensor_4bit.check_device(resolve_device(request.config.system.device))
    except ConfigError as error:
        if switch in request.given or low.lora_rank is not None:
            raise
        config = replace(request.config, low_precision=replace(low, use_4bit=False))
        note = f"{switch}: off, since {error}"
        return replace(request, config=config, notes=(*request.notes, note))
    return request
