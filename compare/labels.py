"""Labels that tell the runs of a set apart: what they differ in, in a few words, else their names.

`labels` is for people; the names of runs are what commands take.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from compare.differences import MISSING, differing
from compare.records import number
from compare.run import Run
from config import schema

LONGEST = 32
_PARTS = 3  # options in a label
_LONGEST_VALUE = 16
_FIRST = ("model.name", "tokenizer.name", "optimizer.name", "training.learning_rate")
_SHORT = {
    "learning_rate": "lr",
    "weight_decay": "wd",
    "batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
}


def names(runs: Sequence[Run]) -> list[str]:
    """A name for each run that no other has: its folder's, else its path."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else os.path.relpath(run.path) for run in runs]


def short_names(runs: Sequence[Run]) -> list[str]:
    """Names without what all of them begin with, such as `run_20251108_`: often the time."""
    known = names(runs)
    return [name[len(shared_start(known)) :] for name in known]


def shared_start(known: Sequence[str]) -> str:
    """What all names begin with, up to an underscore; empty for one name."""
    return "".join(os.path.commonprefix(list(known)).rpartition("_")[:2]) if len(known) > 1 else ""


def labels(runs: Sequence[Run], longest: int = LONGEST) -> list[str]:
    """A label for each run that no other has: `llama, lr 0.004`; its short name where nothing
    differs, and after the options where theirs are those of another run."""
    told, times = descriptions(runs, longest), short_names(runs)
    counts = Counter(told)
    return [
        ", ".join(filter(None, (text, time if counts[text] > 1 or not text else "")))
        for text, time in zip(told, times, strict=True)
    ]


def descriptions(runs: Sequence[Run], longest: int = LONGEST) -> list[str]:
    """The options in which runs differ, of each run in at most `longest` characters.

    Those that tell most runs apart are taken first, those that only follow one of them, as options
    of a model do, last. A switch that is off is said where it is all
    there is to say.
    """
    rows = differing(runs)
    keys = sorted(rows, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
    parts = {key: [_part(key, value) for value in rows[key]] for key in keys}
    groups = {key: _numbered(parts[key]) for key in keys}
    chosen, left, told = list[str](), list(keys), [""] * len(runs)
    while left and len(chosen) < _PARTS:
        gains = [_gain(told, groups[key], [groups[each] for each in chosen]) for key in left]
        best = left[gains.index(max(gains))]
        left.remove(best)
        wanted = [key for key in keys if key in chosen or key == best]
        longer = [_joined(row) for row in zip(*(parts[key] for key in wanted), strict=True)]
        if max(map(len, longer)) <= longest:
            chosen, told = wanted, longer
    return told


def _gain(told: Sequence[str], own: list[int], known: list[list[int]]) -> tuple[int, bool]:
    """Groups of runs that an option makes beside those told apart, and whether they are its own."""
    return len({*zip(told, own, strict=True)}), own not in known


def _numbered(values: Sequence[Hashable]) -> list[int]:
    """Equal values as equal numbers."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _joined(parts: Sequence[tuple[str, bool]]) -> str:
    loud = [text for text, silent in parts if text and not silent]
    return ", ".join(loud or [text for text, _ in parts if text])


def _part(key: str, value: Any) -> tuple[str, bool]:
    """An option in a word or two, and whether it goes without saying."""
    name = key.partition(".")[2].removeprefix("use_")
    name = _SHORT.get(name, name)
    option = schema().options.get(key)
    if value is MISSING:
        return "", True
    if value is None or value is False:
        return f"no {name}", True
    if value is True:
        return name, False
    amount = number(value)
    if amount is not None:
        return f"{name} {amount:.6g}".replace("e-0", "e-").replace("e+0", "e"), False
    text = " ".join(str(value).split())
    text = os.path.basename(text.rstrip("/")) or text
    text = text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
    alone = name == "name" or (option is not None and bool(option.choices))
    return (text if alone else f"{name} {text}"), False
