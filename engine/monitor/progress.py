"""Where the time of a run goes, how long it still takes, and the live line of a terminal.

Steps, evaluations and saves are timed apart, so that the time left is right before the first
evaluation as well as after it. The live line stands below the plain lines, on a terminal only; what
is written to a file is the same without it.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from engine.monitor import console
from settings.formatting import format_duration

REFRESHES_PER_S = 4
FORECAST_AFTER_S = 5.0  # of steps, without the first one, which starts up caches


@dataclass
class Clock:
    """Seconds spent on one kind of work, and how often it was done."""

    seconds: float = 0.0
    count: int = 0
    last: float = 0.0

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.count += 1
        self.last = seconds

    @property
    def mean(self) -> float:
        """Seconds each time; 0 before the first."""
        return self.seconds / max(1, self.count)


@dataclass
class Pace:
    """The clocks of one session."""

    first: Clock = field(default_factory=Clock)
    """The first step, which starts up caches and threads."""
    steps: Clock = field(default_factory=Clock)
    evaluations: Clock = field(default_factory=Clock)
    saves: Clock = field(default_factory=Clock)
    waited_s: float = 0.0
    """Seconds of waiting for data since the last log line."""
    _logged: Clock = field(default_factory=Clock)
    _told: bool = False

    def step(self, seconds: float, waited_s: float) -> None:
        """Counts a step, `waited_s` of which it waited for data."""
        (self.steps if self.first.count else self.first).add(seconds)
        self._logged.add(seconds)
        self.waited_s += waited_s

    def take(self) -> tuple[float, float]:
        """Returns seconds per step since the last call, and the fraction spent waiting for data."""
        seconds, share = self._logged.mean, self.waited_s / max(self._logged.seconds, 1e-9)
        self._logged, self.waited_s = Clock(), 0.0
        return seconds, share

    def has_become_known(self) -> bool:
        """Returns True once: when enough steps are timed to say how long the run takes."""
        if self._told or self.steps.count < 3 or self.steps.seconds < FORECAST_AFTER_S:
            return False
        self._told = True
        return True

    @property
    def step_s(self) -> float:
        """Seconds per step; without the first one, unless there is no other."""
        return self.steps.mean or self.first.mean

    def describe(self, compile_s: float | None) -> str:
        """Returns where the time went, for the closing lines."""
        steps = format_duration(self.first.seconds + self.steps.seconds)
        evaluations, saves = (
            format_duration(self.evaluations.seconds),
            format_duration(self.saves.seconds),
        )
        compiling = "" if compile_s is None else f", compiling {format_duration(compile_s)}"
        return f"steps {steps}, evaluations {evaluations}, saves {saves}{compiling}"

    def left(self, steps: int, evaluations: int, saves: int, evaluation_steps: float) -> float:
        """Returns the seconds that steps, evaluations and saves will take.

        evaluation_steps: how many steps an evaluation is assumed to take before the first one.
        """
        evaluation = self.evaluations.mean or evaluation_steps * self.step_s
        return steps * self.step_s + evaluations * evaluation + saves * self.saves.mean


class LiveLine:
    """A bar with step, loss, speed and time left; does nothing without a terminal."""

    def __init__(self, shown: bool, steps: int) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._held = ExitStack()
        self._next = 0.0  # when it may be shown again
        if shown and sys.stdout.isatty():
            self._bar = _bar()
        if self._bar is not None:
            self._task = self._bar.add_task("", total=steps, note="")

    @property
    def due(self) -> bool:
        """Whether a terminal shows it, and its last update is long enough ago."""
        return self._bar is not None and time.monotonic() >= self._next

    def __enter__(self) -> LiveLine:
        if self._bar is not None:
            terminal = self._held.enter_context(self._bar).console
            self._held.enter_context(console.redirected(_above(terminal)))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def show(self, step: int, loss: float, tokens_per_s: float, left_s: float) -> None:
        """Shows the state after a step."""
        if self._bar is not None:
            self._next = time.monotonic() + 1 / REFRESHES_PER_S
            note = f"{format_duration(left_s)} left  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
            self._bar.update(self._task, completed=step, note=note)

    def tell(self, what: str) -> None:
        """Shows what happens between steps."""
        if self._bar is not None:
            self._bar.update(self._task, note=what)


def _bar() -> Any:
    """Returns rich's bar; None if the terminal cannot redraw a line or rich is missing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        return None
    terminal = Console()
    if not terminal.is_terminal or terminal.is_dumb_terminal:
        return None
    columns = (
        MofNCompleteColumn(),
        BarColumn(24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(
        *columns,
        console=terminal,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        refresh_per_second=REFRESHES_PER_S,
    )


def _above(terminal: Any) -> Any:
    """Returns a function that prints a line above the bar: not wrapped, coloured or marked up."""
    return lambda line: terminal.print(line, soft_wrap=True, markup=False, highlight=False)
