"""Forward and backward of a micro-batch as one CUDA graph, for `system.compile: graphs`."""

from __future__ import annotations

import torch
from torch import Tensor

from config import Config, ConfigError, micro_batch
from engine.hardware.cuda_graph import record_graph
from engine.hardware.distributed import World
from engine.hardware.memory import ran_out
from engine.loss import DocumentIds, next_token_loss
from engine.precision.precision import Precision
from model import LanguageModel


def check_graphs(config: Config, world: World) -> None:
    """Raises ConfigError where `system.compile: graphs` meets no CUDA or several processes."""
    if config.system.compile != "graphs":
        return
    if world.device.type != "cuda":
        raise ConfigError(
            f"system.compile=graphs records CUDA graphs, but this run computes on {world.device}. "
            "Set system.compile: true or auto."
        )
    if world.size > 1:  # the exchange of gradients would have to be recorded too
        raise ConfigError(
            f"system.compile=graphs is for one process, but this run has {world.size}. "
            "Set system.compile: true or auto."
        )


class GraphedStep:
    """Forward, loss and backward of one micro-batch, recorded once.

    A graph reads its inputs and adds its gradients at fixed addresses. `optimizer.zero_grad` may
    still set gradients to None: the first micro-batch of a step puts them back, as zeros.
    """

    def __init__(
        self,
        model: LanguageModel,
        precision: Precision,
        shape: tuple[int, int],
        document_ids: DocumentIds | None,
    ) -> None:
        """shape: (B, T + 1) of a micro-batch. Gradients are None afterwards."""
        device = precision.device
        self._rows = torch.ones(shape, dtype=torch.long, device=device)
        self._step_targets = torch.ones((), device=device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = [torch.zeros_like(p) for p in self._parameters]

        def forward_backward() -> Tensor:
            with precision.autocast():
                loss_sum = next_token_loss(model, self._rows, device, document_ids)
            loss = loss_sum / self._step_targets
            precision.backward(loss)
            return loss.detach()

        self._start_step()
        self._replay = record_graph(forward_backward, device)
        model.zero_grad(set_to_none=True)
        # The graph reads tables that modules have cached (rope). An evaluation of other lengths may
        # drop them there; these references keep their memory from being reused.
        found = (value for module in model.modules() for value in vars(module).values())
        self._caches = [value.copy() for value in found if isinstance(value, dict)]

    def __call__(self, rows: Tensor, step_targets: int, first: bool) -> Tensor:
        """Adds the gradients of rows (B, T + 1); returns their part of the step's loss, (), which
        the next call overwrites.

        step_targets: tokens that the step's loss is the mean over. first: whether these are the
        first rows of the step.
        """
        if first:
            self._start_step()
        self._rows.copy_(rows.to(self._rows.device, non_blocking=True))
        self._step_targets.fill_(step_targets)
        return self._replay()

    def _start_step(self) -> None:
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


def graphed_step(
    model: LanguageModel, precision: Precision, config: Config, document_ids: DocumentIds | None
) -> tuple[GraphedStep | None, str]:
    """Returns the recorded step, or None where the config asks for none or recording failed, and
    words for the line that tells how the run computes."""
    if config.system.compile != "graphs":
        return None, ""
    shape = micro_batch(config), config.training.block_size + 1
    try:
        return GraphedStep(model, precision, shape, document_ids), ", one CUDA graph per micro-step"
    except Exception as error:  # without a graph the same kernels run
        if ran_out(error):  # train.py tells the user how to need less
            raise
        model.zero_grad(set_to_none=True)
        reason = str(error).strip().splitlines()[0]
        return None, f", no CUDA graph ({type(error).__name__}: {reason})"
