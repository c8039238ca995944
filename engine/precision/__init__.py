"""Number formats of the forward pass, wrapped around a finished model from outside.

bfloat16 and float16 by autocast (master weights stay float32), float16 with a loss scaler.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from config import LowPrecisionConfig
from engine.world import supports_fast_bfloat16

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Precision:
    """How one training step computes: `autocast`, `backward`, `unscale`, `step`.

    `note` tells of a fallback when the device cannot do what was asked, else it is None.
    """

    def __init__(self, low_precision: LowPrecisionConfig, device: torch.device) -> None:
        asked = DTYPES[low_precision.compute_dtype]
        self.device = device
        self.dtype = asked
        self.note: str | None = None
        if asked is torch.bfloat16 and not supports_fast_bfloat16(device):
            self.dtype = torch.float16 if device.type == "cuda" else torch.float32
            self.note = f"bfloat16 is not supported by {device}; {self.name} is used instead"
        # A disabled scaler passes everything through, so that the step reads the same.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    @property
    def name(self) -> str:
        """The dtype's name, as in the config."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[None]:
        """The context of every forward pass, in training and evaluation."""
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar loss, scaled for float16."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no types here

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Brings the gradients back to their true size, before clipping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer step; float16 skips it when gradients overflowed and lowers the scale."""
        self.scaler.step(optimizer)
        self.scaler.update()

    @property
    def tolerates_overflow(self) -> bool:
        """Whether non-finite gradients are routine (float16 searches for its scale)."""
        return self.scaler.is_enabled()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state as plain values; empty without one."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; a state of another dtype starts afresh."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
