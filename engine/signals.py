"""Signals become a flag that the loops poll: finish the step, save, leave.

Ctrl-C (SIGINT), SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP ask for a stop; a second Ctrl-C ends the
process at once. Before training there is nothing to save, and a signal ends the start as an
exception does.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from config import STOP_EXIT_CODES


class StopRequest:
    """Context that takes the signals; truth value: whether a stop was asked for.

    Once `armed`, a signal only sets the flag. Until then it raises SystemExit with its exit code.
    Signals that the process was started to ignore (nohup) stay ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.armed = False
        self.quiet = False  # of several processes one speaks
        self._interrupts = 0
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_EXIT_CODES:
            if signal.getsignal(number) != signal.SIG_IGN:
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
        return 0 if self.signal is None else STOP_EXIT_CODES[self.signal]

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM; empty when none came."""
        return "" if self.signal is None else self.signal.name

    def join(self) -> None:
        """Takes part in a stop that another process was asked for."""
        self.signal = self.signal or signal.SIGTERM

    def _say(self, text: str) -> None:
        if not self.quiet:
            os.write(2, text.encode())

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if not self.armed:
            self._say("Stopped before training began; nothing was saved.\n")
            raise SystemExit(STOP_EXIT_CODES[signal.Signals(number)])
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2:
            self._say("\nSecond Ctrl-C: stopped without saving.\n")
            os._exit(STOP_EXIT_CODES[signal.SIGINT])
        self.signal = signal.Signals(number)
        note = f"\n{self.signal.name}: finishing the step and saving"
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        self._say(f"{note}{again}.\n")
