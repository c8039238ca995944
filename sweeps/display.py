"""What a sweep shows while it runs: lines of what happens and, on a terminal, a live table."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_REFRESH_S = 0.5
_MOST_ROWS = 20  # of the table; cells that run come first
_ORDER = ("running", "stopping", "failed", "finished", "stopped early", "not finite")


class Row(NamedTuple):
    """A cell of the sweep in the table."""

    number: int
    name: str
    state: str
    step: str
    loss: str
    left: str


class Display:
    """Prints lines; a context in which a terminal also shows a table that is drawn again."""

    def __init__(self) -> None:
        self._live: Any = None
        self._next = 0.0

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            self._live = _live()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """Prints a line, above the table if there is one."""
        if self._live is None:
            print(line, flush=True)
        else:
            self._live.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def show(self, rows: Callable[[], Sequence[Row]]) -> None:
        """Draws the table again, if it is time for that."""
        if self._live is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + _REFRESH_S
            self._live.update(_table(rows()), refresh=True)


def _live() -> Any:
    """Returns rich's live display; None if the terminal cannot redraw or rich is missing."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None
    terminal = Console()
    if not terminal.is_terminal or terminal.is_dumb_terminal:
        return None
    # Without a thread of its own: runs are started by fork, which threads make unsafe.
    return Live(console=terminal, auto_refresh=False, transient=True)


def _table(rows: Sequence[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    counts = Counter(row.state for row in rows)
    title = ", ".join(f"{count} {state}" for state, count in counts.items())
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("cell", "settings", "state", "step", "loss", "left"):
        table.add_column(heading, justify="left" if heading in ("settings", "state") else "right")
    order = {state: place for place, state in enumerate(_ORDER)}
    shown = sorted(rows, key=lambda row: order.get(row.state, len(order)))[:_MOST_ROWS]
    for row in shown:
        table.add_row(*(Text(str(value)) for value in row))
    return table
