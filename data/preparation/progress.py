"""Progress of a download or a conversion on standard error."""

from __future__ import annotations

import sys
import time

LINE_EVERY_S = 5.0
"""Between plain lines, where standard error is no terminal."""
REDRAW_EVERY_S = 0.2
"""Between updates of the line on a terminal."""


class ProgressLine:
    """One line that is redrawn on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, stage: str, start_bytes: int = 0) -> None:
        self._stage, self._start_bytes = stage, start_bytes
        self._start = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._is_drawn = False

    def show(self, done: int, total: int, tokens: int = 0) -> None:
        """Shows bytes done, of how many (0: unknown), and the tokens they became (0: not shown)."""
        now = time.monotonic()
        if now - self._shown < (REDRAW_EVERY_S if self._is_terminal else LINE_EVERY_S):
            return
        self._shown = now
        rate = (done - self._start_bytes) / max(now - self._start, 1e-9)
        parts = [self._stage]
        parts.append(
            f"{100 * done / total:.0f} % of {total / 1e6:.1f} MB"
            if total
            else f"{done / 1e6:.1f} MB"
        )
        if tokens:
            parts.append(f"{tokens:,} tokens")
        parts.append(f"{rate / 1e6:.1f} MB/s")
        if total:
            minutes, seconds = divmod(int((total - done) / max(rate, 1)), 60)
            parts.append(f"ETA {minutes}m{seconds:02d}s")
        self._is_drawn = self._is_terminal
        frame = "\r{}\033[K" if self._is_terminal else "{}\n"
        print(frame.format(" | ".join(parts)), end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Moves to the next line."""
        if self._is_drawn:
            print(file=sys.stderr)
