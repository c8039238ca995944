"""What a sweep will cost: predicted time and memory of each cell, and of all. Imports torch.

Cells that differ only in numbers that cost nothing, such as the learning rate, share one model on
the meta device and one measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compare.tables.table import aligned
from config import Request
from engine.hardware.distributed import enter_world
from engine.monitor import console
from engine.planning.memory import MemoryBudget
from engine.setup.run_plan import plan_run, time_parts
from settings.formatting import format_bytes, format_duration, format_plural
from sweeps.cells import Cell
from sweeps.state import State

_FREE = ("training.learning_rate", "training.weight_decay", "training.seed", "training.debug")
_FREE_SECTIONS = ("schedule.", "optimizer.")
MEASURING_S = 12.0
"""Of all shapes together, each at least `_LEAST_S`."""
_LEAST_S, _MOST_S = 0.2, 4.0

Cost = tuple[int, float | None]
"""Bytes of a step, and seconds of the run; None where not even a micro-step fits."""


def cost_lines(
    cells: Sequence[Cell], states: Sequence[State], jobs: int, measuring_s: float = MEASURING_S
) -> Iterator[str]:
    """Yields a table of the cells with their costs, and the sums over those that are not done.

    Raises UserError where a cell cannot run.
    """
    shapes = [_shape(cell) for cell in cells]
    budget_s = min(_MOST_S, max(_LEAST_S, measuring_s / len(set(shapes))))
    known = dict[str, Cost]()
    left = list[Cost]()
    rows = [["cell", "settings", "state", "time", "memory"]]
    for cell, shape, state in zip(cells, shapes, states, strict=True):
        if shape not in known:
            known[shape] = _cost(cell, budget_s)
        memory, seconds = known[shape]
        time = "unknown" if seconds is None else format_duration(seconds)
        rows.append([str(cell.number), cell.name, state.value, time, format_bytes(memory)])
        left += [known[shape]] if state in (State.WAITING, State.INTERRUPTED) else []
    yield from aligned(rows, [False, True, True, False, False])
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
    kept = {k: v for k, v in cell.options.items() if not k.startswith(_FREE_SECTIONS)}
    return f"{cell.config.optimizer.name} { {k: v for k, v in kept.items() if k not in _FREE} }"


def _cost(cell: Cell, budget_s: float) -> Cost:
    request = Request(cell.config, dry_run=True)
    with enter_world(cell.config.system, cell.config.distributed) as world:
        budget = MemoryBudget.of(world)
        with console.redirected(lambda line: None):
            plan = plan_run(request, world, budget)
        timed = time_parts(plan, budget, budget_s)
    seconds = None if timed is None else timed.forecast(plan).total
    return plan.estimator.memory().required, seconds
