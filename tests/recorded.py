"""A stand-in for CUDA graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Keeps every call of an operator, with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Aliases: `unsqueeze_` and its like change the shape of the tensors themselves.
        inputs, named = tree_map(_alias, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, inputs, named, tree_map(_alias, result)))
        return result


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def record_operators(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """As `engine.hardware.cuda_graph.record_graph`. A replay runs operators and no Python of the
    function: numbers are those of the recording, and so are the tensors that are read and written.
    """
    recording = _Calls()
    with torch.random.fork_rng([]):
        function()
        with recording:
            result = function()

    @torch.no_grad()
    def replay() -> Tensor:
        for func, args, kwargs, recorded in recording.calls:
            for old, new in zip(
                tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return result

    return replay
