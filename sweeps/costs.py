"""What a sweep will cost: predicted time and memory of each cell, and of all. Imports torch.

Cells that differ only in numbers that cost nothing, such as the learning rate, share one model on
the meta device and one measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compare.table import aligned
from config import Request
from engine.hardware.distributed import enter_world
from engine.monitor import console
from engine.planning.memory import MemoryBudget
from engine.setup.run_plan import plan_run, time_parts
from settings.entries import flat_options
from settings.formatting import format_bytes, format_duration, format_plural
from sweeps.cells import Cell

_FREE = ("training.learning_rate", "training.weight_decay", "training.seed", "training.debug")
_FREE_SECTIONS = ("schedule", "optimizer")
MEASURING_S = 12.0
"""Of all shapes together, each at least `_LEAST_S`."""
_LEAST_S, _MOST_S = 0.2, 4.0

Cost = tuple[int, float | None]
"""Bytes of a step, and seconds of the run; None where not even a micro-step fits."""


def cost_lines(
    cells: Sequence[Cell], states: Sequence[str], jobs: int, measuring_s: float = MEASURING_S
) -> Iterator[str]:
    """Yields a table of the cells with their costs, and the sums over those that are not done.

    Raises UserError where a cell cannot run.
    """
    shapes = [_shape(cell) for cell in cells]
    budget_s = min(_MOST_S, max(_LEAST_S, measuring_s / len(set(shapes))))
    known = dict[str, Cost]()
    for cell, shape in zip(cells, shapes, strict=True):
        if shape not in known:
            known[shape] = _cost(cell, budget_s)
    costs = [known[shape] for shape in shapes]
    rows = [["cell", "settings", "state", "time", "memory"]]
    for cell, state, (memory, seconds) in zip(cells, states, costs, strict=True):
        time = "unknown" if seconds is None else format_duration(seconds)
        rows.append([str(cell.number), cell.name, state, time, format_bytes(memory)])
    yield from aligned(rows, [False, True, True, False, False])
    left = [
        cost
        for cost, state in zip(costs, states, strict=True)
        if state in ("waiting", "interrupted")
    ]
    if not left:
        yield "Nothing is left to do."
        return
    total = sum(seconds or 0.0 for _, seconds in left)
    most = sum(sorted((memory for memory, _ in left), reverse=True)[:jobs])
    yield (
        f"{format_plural(len(left), 'cell')} to run, {jobs} at once: about "
        f"{format_duration(total)} of runs, {format_duration(total / jobs)} if they do not slow "
        f"each other down, and at most {format_bytes(most)} of memory"
    )


def _shape(cell: Cell) -> str:
    """Returns text that is equal for cells of equal costs."""
    flat = flat_options(cell.config.to_dict())
    name = cell.config.optimizer.name
    kept = {
        k: v for k, v in flat.items() if k not in _FREE and k.split(".")[0] not in _FREE_SECTIONS
    }
    return f"{name} {kept}"


def _cost(cell: Cell, budget_s: float) -> Cost:
    request = Request(
        config=cell.config,
        files=(),
        overrides=(),
        dry_run=True,
        show_config=False,
        check_resume=None,
        reproduce=None,
        notes=(),
        given=frozenset(),
    )
    with enter_world(cell.config.system, cell.config.distributed) as world:
        budget = MemoryBudget.of(world)
        with console.redirected(lambda line: None):
            plan = plan_run(request, world, budget)
        timed = time_parts(plan, budget, budget_s)
    seconds = None if timed is None else timed.forecast(plan).total
    return plan.estimator.memory().required, seconds
