"""Signals become a flag that the loops poll: finish the step, save, leave.

Ctrl-C (SIGINT), SIGTERM and SIGUSR1 ask for a stop; a second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class StopRequest:
    """Context in which signals only set a flag; truth value: whether a stop was asked for."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 when none came."""
        return 0 if self.signal is None else EXIT_CODES[self.signal]

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM; empty when none came."""
        return "" if self.signal is None else self.signal.name

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os.write(2, b"\nSecond Ctrl-C: stopped without saving.\n")
            os._exit(EXIT_CODES[signal.SIGINT])
        self.signal = signal.Signals(number)
        note = f"\n{self.signal.name}: finishing the step and saving"
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        os.write(2, f"{note}{again}.\n".encode())
