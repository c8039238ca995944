"""Functions compiled for many shapes stay compiled: with more variants than torch allows by itself,
and in threads other than the one that compiled them first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from model.bdh.elementwise import compiled_ops
from model.bdh.tiling import Tiling
from model.compiled import compile_shapes
from tests.model.test_bdh_fused_layers import problem, run

VARIANTS = 11  # more than the 8 that torch allows


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """The graphs that are made; they run as they are."""
    made: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled_ops.cache_clear()
    yield made
    compiled_ops.cache_clear()
    torch.compiler.reset()


def in_thread(work: Callable[[], object]) -> None:
    """Runs it as autograd runs the backward passes of a GPU."""
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(work()))
    thread.start()
    thread.join()
    assert done, "the work failed"


def increments(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize("call", [lambda work: work(), in_thread], ids=["main", "thread"])
def test_every_shape_is_compiled(
    call: Callable[[Callable[[], object]], None], graphs: list[fx.GraphModule]
) -> None:
    compiled = compile_shapes(increments)
    compiled(torch.zeros(1))
    call(lambda: [compiled(torch.zeros(n)) for n in range(2, VARIANTS + 1)])
    assert len(graphs) == VARIANTS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
def test_bdh_stays_compiled_in_the_thread_of_a_backward_pass(graphs: list[fx.GraphModule]) -> None:
    ops = compiled_ops()

    def steps() -> object:
        for length in range(1, VARIANTS + 1):
            run(problem((1, length, 4, 1, 8)), Tiling(length, 1, 4, True), ops=ops)
        return True

    in_thread(steps)
    # Rope and gate, forward and backward; sums take any shape.
    assert len(graphs) >= 4 * VARIANTS
