"""CUDA graphs: work whose kernels are recorded once and launched together.

Launching a kernel costs the CPU some microseconds. Hundreds of kernels that are shorter than that
leave the GPU waiting for the CPU, unless one call launches all of them.

A replay runs no Python: kernels get the addresses, shapes and scalars that they were recorded with.
So inputs are copied into the recorded tensors, results appear in the recorded tensors, and nothing
that a kernel reads may be freed. Random numbers are drawn anew in every replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # calls before recording: they compile, and libraries make their workspaces


def record_graph(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Records the kernels of `function` on a CUDA device; returns a function that replays them and
    returns the recorded result, overwritten.

    `function` runs a few times first, and what it writes then stays; random generators are put
    back. Raises RuntimeError where it does what cannot be recorded, such as waiting for the device.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.random.fork_rng([device]), torch.cuda.device(device):
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
