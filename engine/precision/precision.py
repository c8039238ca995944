"""Number formats, wrapped around a finished model from outside; models know nothing of them.

The order, written once: `Precision` checks the device; `prepare` freezes weights and adds adapters
(so before the optimizer is built), then binds 8-bit products and takes charge of 4-bit weights;
then optimizer, saved state, compiler, processes.

    bfloat16, float16    autocast; master weights stay float32; float16 with a loss scaler
    FP8                  products with weights in 8 bits (engine/precision/fp8.py)
    4-bit weights        the last part of the run computes with rounded weights (quantized.py)
    adapters             trained beside frozen 4-bit weights (lora.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from config import ConfigError, Fp8Config, LowPrecisionConfig, Request
from engine.hardware.device import resolve_device, supports_fast_bfloat16
from engine.precision import tensor_4bit
from engine.precision.fp8 import Fp8Backend, bind, check_device
from engine.precision.lora import add_lora, lora_description
from engine.precision.weights_4bit import QuantizedWeights
from model.interface import LanguageModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Precision:
    """How a training step computes: `training`, `autocast`, `backward`, `unscale`, `step`.

    `note` tells of a fallback when the device cannot do what was asked, else it is None.
    """

    def __init__(
        self, config: LowPrecisionConfig, device: torch.device, fp8: Fp8Config | None = None
    ) -> None:
        """Raises ConfigError where the device or a missing library cannot do what was asked."""
        asked = DTYPES[config.compute_dtype]
        self.config, self.device = config, device
        self.dtype = asked
        self.note: str | None = None
        if asked is torch.bfloat16 and not supports_fast_bfloat16(device):
            self.dtype = torch.float16 if device.type == "cuda" else torch.float32
            self.note = f"bfloat16 is not supported by {device}; {self.name} is used instead"
        # A disabled scaler passes everything through, so that the step reads the same.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self._fp8_config = fp8 if config.use_fp8 else None
        if self._fp8_config is not None:
            check_device(self._fp8_config, device)
        self.fp8: Fp8Backend | None = None
        self.quantized: QuantizedWeights | None = None
        self.first_quantized = 0
        self._products = self._steps = 0

    @property
    def name(self) -> str:
        """The dtype's name, as in the config."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def matmul_format(self) -> str:
        """What most products are computed in: "fp8", else the dtype's name."""
        return self.name if self._fp8_config is None else "fp8"

    def prepare(self, model: LanguageModel, planned_steps: int, init: bool = True) -> list[str]:
        """Takes charge of a model on its device, whose weights are drawn or loaded; lines for the
        start of the run that tell what is covered. Raises ConfigError.

        planned_steps: of the whole run; 4-bit weights set in after `quantize_after` of them. init:
        whether the weights matter.
        """
        lines = []
        if apply_lora(model, self.config, init):
            lines.append(lora_description(model))
        elif self.config.use_4bit:
            self.quantized = QuantizedWeights(model, self.config)
            self.first_quantized = int(planned_steps * self.config.quantize_after) + 1
            lines.append(self.quantized.description(self.first_quantized))
        if self._fp8_config is not None:
            self.fp8 = bind(self._fp8_config, model, self.device, self.dtype)
            lines.append(self._fp8_line(model))
            if not self.fp8.compiles:
                lines.append("fp8: delayed scaling of linear layers goes without torch.compile")
        return lines

    def _fp8_line(self, model: LanguageModel) -> str:
        assert self.fp8 is not None
        covered, head = len(self.fp8.covered), model.embedding_and_head()[1]
        every = model.named_parameters(remove_duplicate=False)
        name = [name for name, parameter in every if parameter is head][-1].removesuffix(".weight")
        dtype = self.name.replace("bfloat", "bf").replace("float", "fp")
        line = f"fp8: {covered} of {covered + 1} matmuls, {self.fp8.summary}; {name} {dtype}"
        slow = " (a CPU computes it slowly: for trying)" if self.device.type == "cpu" else ""
        return line + slow

    @property
    def master_bytes(self) -> int:
        """Memory of the copies kept while weights are rounded."""
        return 0 if self.quantized is None else self.quantized.nbytes

    def verify_fp8_used(self, trial: Callable[[], object]) -> list[str]:
        """Runs `trial`, a forward and backward pass, and says how many 8-bit products it made;
        RuntimeError for none. Random generators are left as they were."""
        if self.fp8 is None:
            return []
        before = self.fp8.calls
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            trial()
        return [f"fp8: {_some(self.fp8.calls - before):,} products in a trial step"]

    def autocast(self) -> AbstractContextManager[None]:
        """The context of every forward pass, in training and evaluation."""
        enabled = self.dtype is not torch.float32
        lowered = torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)
        if self.fp8 is None:
            return lowered
        return _both(self.fp8.autocast(), lowered)

    @contextlib.contextmanager
    def training(self, step: int) -> Iterator[None]:
        """Around the forward and backward passes of a step, counted from 1."""
        before = 0 if self.fp8 is None else self.fp8.calls
        with ExitStack() as stack:
            if self.fp8 is not None:
                stack.enter_context(self.fp8.training())
            if self.quantized is not None and step >= self.first_quantized:
                stack.enter_context(self.quantized.applied())
            yield
        if self.fp8 is not None:
            self._products += self.fp8.calls - before
            self._steps += 1

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar loss, scaled for float16."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no types here

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Brings the gradients back to their true size, before clipping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, maximum: Callable[[Tensor], Tensor]) -> None:
        """The optimizer step; float16 skips it when gradients overflowed and lowers the scale.

        `maximum` makes a tensor the largest of those of all processes.
        """
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.fp8 is not None:
            self.fp8.end_step(maximum)

    @property
    def tolerates_overflow(self) -> bool:
        """Whether non-finite gradients are routine (float16 searches for its scale)."""
        return self.scaler.is_enabled()

    def metrics(self) -> dict[str, float]:
        """What 8-bit products did since the last call; RuntimeError where none was made."""
        if self.fp8 is None or not self._steps:
            return {}
        products, steps = self._products, self._steps
        self._products = self._steps = 0
        return {"train/fp8_products": _some(products) / steps, **self.fp8.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """The state of scaler and scales as plain values; empty without one."""
        scales = {} if self.fp8 is None else self.fp8.state_dict()
        return {"scaler": self.scaler.state_dict(), "fp8": scales}

    @property
    def compiles(self) -> bool:
        """Whether the model may be compiled."""
        return self.fp8 is None or self.fp8.compiles

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Restores what `state_dict` gave; a line where 8-bit scales start afresh."""
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.fp8 is None or self.fp8.load_state_dict(state["fp8"]):
            return []
        return ["fp8: scales start afresh, since the checkpoint has none of these operands"]


@contextlib.contextmanager
def _both(
    outer: AbstractContextManager[None], inner: AbstractContextManager[None]
) -> Iterator[None]:
    with outer, inner:
        yield


def _some(products: int) -> int:
    if products == 0:
        raise RuntimeError("low_precision.use_fp8=true, but no 8-bit product is made: our fault")
    return products


def apply_lora(model: LanguageModel, config: LowPrecisionConfig, init: bool) -> bool:
    """Gives a model the parameters that `low_precision` asks for in place of its own; whether it
    did. init: from the model's weights; else they are unset, for `load_state_dict`."""
    if config.lora_rank is None:
        return False
    add_lora(model, config, init)
    return True


def disable_unavailable_4bit(request: Request) -> Request:
    """The request without 4-bit weights where they cannot be had here and were not asked for, and
    with a note that says so. Raises ConfigError where they were."""
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
