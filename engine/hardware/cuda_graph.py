"""CUDA graphs: work whose kernels are recorded once and launched together.

Launching a kernel costs the CPU some microseconds. Work of hundreds of kernels that take less than
that leaves the GPU waiting for the CPU, unless all of them are launched by one call.

A replay knows nothing of Python: kernels run with the addresses, shapes and numbers that they were
recorded with. So inputs are copied to where the recorded ones were, results appear where they did,
and nothing that a kernel reads may have been freed. Random numbers are fresh in every replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # calls before recording: they compile, and libraries make their workspaces


def record_graph(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Records what `function` computes on a CUDA device; returns what does it again, and returns
    the same tensor each time with new numbers in it.

    `function` is called a few times, and what it writes is written. Random generators are put back.
    Raises RuntimeError where it does what cannot be recorded, such as waiting for the device.
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
