"""One optimizer step: its data, and its loss and gradient norm, which the host may read late."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data import StepBatch


@dataclass
class Step:
    """The data of a step, and its loss and gradient norm once they are read."""

    number: int
    """Counted from 1."""
    batch: StepBatch
    """The rows of this process."""
    targets: int
    """Tokens that the loss is the mean over, in all processes."""
    batch_hash: int
    """Of the rows of all processes and the number of the step (data/loading/batch_hash.py)."""
    epoch: int
    """Epochs completed after this step, in all processes."""
    save_time_over: bool
    """Whether some process found that `training.save_every` seconds had passed."""
    began_s: float
    """`time.monotonic()` before the wait for data."""
    waited_s: float
    """Time waited for data."""
    loss: float = math.nan
    grad_norm: float = math.nan
    _values: Tensor | None = None
    _copied: torch.cuda.Event | None = None

    @property
    def micro_batches(self) -> tuple[Tensor, ...]:
        """Rows (B, T+1) that this process computes at once."""
        return self.batch.micro_batches

    def start_reading(self, values: Tensor) -> None:
        """Starts to copy loss and gradient norm, values (2,), to the host without waiting."""
        if values.is_cuda:
            pinned = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values = pinned.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
            self._copied.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values

    def read(self) -> None:
        """Sets `loss` and `grad_norm`; waits until the device has computed and copied them."""
        assert self._values is not None, "start_reading comes first"
        if self._copied is not None:
            self._copied.synchronize()
        self.loss, self.grad_norm = self._values.tolist()
