"""What a sweep shows while it runs: lines of what happens and, on a terminal, a live table."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

from compare.tables.table import aligned
from settings.terminal import printable

_REFRESH_S = 0.5
_MOST_ROWS = 20
HEADINGS = ("cell", "state", "step", "loss", "left", "settings")
_FIRST = ("running", "stopping", "failed", "finished", "stopped early", "not finite")


class Display:
    """Prints lines and, below them on a terminal, a table that is drawn again."""

    def __init__(self) -> None:
        self._is_live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._drawn = 0  # lines of the table on the screen
        self._next = 0.0

    def say(self, line: str) -> None:
        """Prints a line, above the table if there is one."""
        self._draw([printable(line)], 0)

    def show(self, rows: Callable[[], Sequence[Sequence[str]]]) -> None:
        """Draws the table again, if it is time for that; rows: as `HEADINGS`."""
        if self._is_live and time.monotonic() >= self._next:
            self._next = time.monotonic() + _REFRESH_S
            lines = _table(rows())
            self._draw(lines, len(lines))

    def clear(self) -> None:
        """Removes the table."""
        self._draw([], 0)

    def _draw(self, lines: Sequence[str], drawn: int) -> None:
        """Prints lines in place of the table. drawn: how many of them are the new table."""
        # Up to the table's first line, and erase from there on.
        erase = f"\x1b[{self._drawn}A\x1b[J" if self._drawn else ""
        print(erase + "".join(f"{line}\n" for line in lines), end="", flush=True)
        self._drawn = drawn


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines that fit on the screen: a longer one would wrap, and not be erased whole."""
    width, height = shutil.get_terminal_size()
    counts = Counter(row[1] for row in rows)
    order = {state: place for place, state in enumerate(_FIRST)}
    most = max(1, min(_MOST_ROWS, height - 3))
    shown = sorted(rows, key=lambda row: order.get(row[1], len(order)))[:most]
    lines = aligned([HEADINGS, *shown], [False, True, False, False, False, True])
    title = ", ".join(f"{count} {state}" for state, count in counts.items())
    return [printable(line)[: width - 1] for line in (title, *lines)]
