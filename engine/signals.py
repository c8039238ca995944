"""Signals set a flag that the training loop polls: it finishes the step, saves and ends.

Ctrl-C (SIGINT), SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP request a stop; a second Ctrl-C ends the
process at once. Before training there is nothing to save, so a signal raises SystemExit.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from config import STOP_EXIT_CODES


class StopRequest:
    """Context that handles the signals; true once a stop was requested.

    From `training_started` on a signal only sets the flag; before, it raises SystemExit with its
    exit code. Signals that the process was started to ignore (nohup) stay ignored.

    Args:
        note: what is said of a signal, and second: of the second Ctrl-C.
    """

    def __init__(
        self, note: str = "finishing the step and saving", second: str = "stopped without saving"
    ) -> None:
        self._note, self._second = note, second
        self.signal: signal.Signals | None = None
        self.training_started = False
        self.quiet = False  # ranks other than 0 print nothing
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
        """The exit code of a process stopped by the signal; 0 without a signal."""
        return 0 if self.signal is None else STOP_EXIT_CODES[self.signal]

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM; empty without a signal."""
        return "" if self.signal is None else self.signal.name

    def follow(self) -> None:
        """Takes over a stop that was requested of another process, as if this one got SIGTERM."""
        self.signal = self.signal or signal.SIGTERM

    def _print(self, text: str) -> None:
        if not self.quiet:
            # Not `print`: the signal may have interrupted one, and buffers cannot be entered twice.
            os.write(2, text.encode())

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if not self.training_started:
            self._print("Stopped before training began; nothing was saved.\n")
            raise SystemExit(STOP_EXIT_CODES[signal.Signals(number)])
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2:
            self._print(f"\nSecond Ctrl-C: {self._second}.\n")
            os._exit(STOP_EXIT_CODES[signal.SIGINT])
        self.signal = signal.Signals(number)
        note = f"\n{self.signal.name}: {self._note}"
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        self._print(f"{note}{again}.\n")
