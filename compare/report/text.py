"""Values of runs as text of the page."""

from __future__ import annotations

import json
from typing import Any

from compare.reading.run import Run


def utf8_text(text: str) -> str:
    """Returns text with `?` for each byte of a file name that is not UTF-8.

    Python holds such bytes as lone surrogates, which cannot be encoded into the page.
    """
    return text.encode("utf-8", "replace").decode()


def value_text(value: Any) -> str:
    """Returns a value of YAML or JSON as one writes it; a list has a line per item."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "\n".join(map(value_text, value))
    return utf8_text(value) if isinstance(value, str) else json.dumps(value)


def progress_text(run: Run) -> str:
    """Returns the state of a run and its steps."""
    planned = run.planned_steps
    complete = planned is None or planned <= run.step
    steps = f"{run.step:,} steps" if complete else f"{run.step:,} of {planned:,} steps"
    return f"{run.state}, {steps}"
