"""What the FP8 backends have in common: the weights they cover, and proof that they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from config import ConfigError, Fp8Config
from model import LanguageModel


class Fp8Backend:
    """Computes a model's products with its hidden weights in FP8, forward and backward.

    The constructor of a subclass attaches it to a finished model. Embeddings, the head, norms and
    attention keep the dtype of autocast.

    summary: such as "native, current scaling". covered: the names of the weights. compiles: whether
    the model can be compiled around the products. matmul_count: the FP8 matmuls so far; with
    Transformer Engine the calls of its modules.
    """

    summary: str
    compiles = True

    def __init__(self, fp8: Fp8Config, model: LanguageModel, multiple: int) -> None:
        """Raises ConfigError if a side of a hidden weight is not a multiple of `multiple`."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.covered: list[str] = []
        for weight, _ in model.hidden_weights():
            name, sides = names[id(weight)], tuple(weight.shape[-2:])
            if any(side % multiple for side in sides):
                raise ConfigError(
                    f"low_precision.use_fp8=true: {name} is {sides[0]} x {sides[1]}, and FP8 "
                    f"matmuls with fp8.recipe={fp8.recipe} take multiples of {multiple}. Change "
                    "the widths under model, or set low_precision.use_fp8: false."
                )
            self.covered.append(name)
        self._step_matmuls = self._steps = 0

    @property
    def matmul_count(self) -> int:
        """The FP8 matmuls so far."""
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager[None]:
        """Encloses every forward pass."""
        return contextlib.nullcontext()

    def frozen_scales(self) -> AbstractContextManager[None]:
        """Encloses passes that must not influence later scales: evaluations and trial steps."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Encloses the forward and backward passes of a step."""
        before = self.matmul_count
        yield
        self._step_matmuls += self.matmul_count - before
        self._steps += 1

    def end_step(self, all_reduce_max: Callable[[Tensor], Tensor]) -> None:
        """Updates scales after the optimizer's step; `all_reduce_max` works in place."""

    def count_matmuls(self, trial: Callable[[], object]) -> int:
        """Returns the FP8 matmuls of `trial`; raises RuntimeError for none."""
        before = self.matmul_count
        trial()
        return _nonzero(self.matmul_count - before)

    def metrics(self) -> dict[str, float]:
        """Returns means over the steps since the last call; RuntimeError if none of them computed
        in FP8."""
        if not self._steps:
            return {}
        matmuls, steps = self._step_matmuls, self._steps
        self._step_matmuls = self._steps = 0
        # Matmuls; the metric keeps the name that files of earlier versions have.
        return {"train/fp8_products": _nonzero(matmuls) / steps}

    def state_dict(self) -> dict[str, Any]:
        """Returns plain tensors and values; empty if scales do not depend on the past."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restores scales; returns False, with nothing changed, if the state does not fit."""
        return True


def _nonzero(matmuls: int) -> int:
    # Without this check a wrongly attached backend would train in bfloat16, reported as FP8.
    if matmuls == 0:
        raise RuntimeError("internal error: low_precision.use_fp8=true, but no matmul ran in FP8")
    return matmuls
