"""Where a value came from, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from settings.errors import ConfigError

MAX_PROBLEMS = 100  # shown


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """The place of a value: layers count up from 0 (defaults); later layers win."""

    layer: int = 0
    line: int = 0  # 0: no line to name
    column: int = 0  # 0: the line is enough
    source: str = ""  # a file's name or 'command line'

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.source, self.line, self.column) if part)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend. `text` starts with the key it is about, where there is one."""

    origin: Origin
    text: str

    def __str__(self) -> str:
        place = f"{self.origin}: " if self.origin.source else ""
        text = self.text if self.text[-1] in ".?^]" else self.text + "."
        return place + text


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise one ConfigError with every problem, sorted by file and line; none raises nothing."""
    ordered = sorted(problems, key=lambda problem: problem.origin)
    if ordered:
        lines = list(dict.fromkeys(str(problem) for problem in ordered))
        more = len(lines) - MAX_PROBLEMS
        rest = [f"... and {more} more problems"] if more > 0 else []
        raise ConfigError("\n".join(lines[:MAX_PROBLEMS] + rest))
