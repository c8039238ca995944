"""Labels that distinguish the runs of a set: the options in which they differ, else their names.

Labels are read by people; commands take the names of runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import Any

from compare.differences import MISSING, differing_options
from compare.reading.json_values import as_float
from compare.reading.run import Run
from config import schema
from engine.run_directory.fork import OPTION as FORK_FROM

LONGEST = 32
"""Characters of a label."""
_MAX_OPTIONS = 3  # in a label
_MAX_VALUE = 16  # characters
# Options that say most about a run stand first in its label.
_FIRST = ("model.name", "tokenizer.name", "optimizer.name", "training.learning_rate")
_SHORT = {
    "learning_rate": "lr",
    "weight_decay": "wd",
    "batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "fork_from_checkpoint": "fork",
}


def names(runs: Sequence[Run]) -> list[str]:
    """Returns a unique name for each run: its directory's, else its path."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else os.path.relpath(run.path) for run in runs]


def short_names(runs: Sequence[Run]) -> list[str]:
    """Returns the names without what all begin with, such as `run_20251108_`."""
    known = names(runs)
    shared = len(shared_start(known))
    return [name[shared:] for name in known]


def shared_start(known: Sequence[str]) -> str:
    """Returns what all names begin with, up to an underscore; '' for one name."""
    return "".join(os.path.commonprefix(list(known)).rpartition("_")[:2]) if len(known) > 1 else ""


def labels(runs: Sequence[Run], longest: int = LONGEST, without: Collection[str] = ()) -> list[str]:
    """Returns a unique label for each run, such as `llama, lr 0.004`.

    The short name of a run is added if another run has the same options, and stands alone if no
    option differs. Options in `without` are left out, as those over which runs are grouped.
    """
    described = descriptions(runs, longest, without)
    counts = Counter(described)
    return [
        ", ".join(filter(None, (text, name if counts[text] > 1 or not text else "")))
        for text, name in zip(described, short_names(runs), strict=True)
    ]


def descriptions(
    runs: Sequence[Run], longest: int = LONGEST, without: Collection[str] = ()
) -> list[str]:
    """Returns the options in which each run differs, in at most `longest` characters.

    Options are chosen one after the other: each time the one that splits the runs into the most
    groups. Of equal ones, an option that always changes together with a chosen one, as the options
    of a model do with its name, comes last.
    """
    rows = differing_options(runs)
    keys = sorted((key for key in rows if key not in without), key=_place)
    phrases = {key: [_phrase(key, value) for value in rows[key]] for key in keys}
    groups = {key: _group_numbers(phrases[key]) for key in keys}
    chosen, left, described = list[str](), list(keys), [""] * len(runs)

    def gain(key: str) -> tuple[int, bool]:
        split = {*zip(described, groups[key], strict=True)}
        return len(split), groups[key] not in [groups[other] for other in chosen]

    while left and len(chosen) < _MAX_OPTIONS:
        best = max(left, key=gain)
        left.remove(best)
        # A label lists options in the order of `keys`, not in that in which they were chosen.
        candidate = [key for key in keys if key in chosen or key == best]
        longer = [_joined(row) for row in zip(*(phrases[key] for key in candidate), strict=True)]
        # An option that makes one label too long is left out of all: labels must stay comparable.
        if max(map(len, longer)) <= longest:
            chosen, described = candidate, longer
    return described


def _place(key: str) -> int:
    """Returns where an option stands in a label; of a source, its weight before its path."""
    if key in _FIRST:
        return _FIRST.index(key)
    return len(_FIRST) + (schema().list_of(key) is not None and not key.endswith(".weight"))


def _group_numbers(values: Sequence[Hashable]) -> list[int]:
    """Returns equal numbers for equal values."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _joined(phrases: Sequence[tuple[str, bool]]) -> str:
    """Returns the phrases without those of options that are off, unless all are."""
    on = [text for text, is_off in phrases if text and not is_off]
    return ", ".join(on or [text for text, _ in phrases if text])


def _phrase(key: str, value: Any) -> tuple[str, bool]:
    """Returns an option in a word or two, and whether it is off."""
    listed, option = schema().list_of(key), schema().find(key)
    section, _, name = key.partition(".")
    name = key.removeprefix(f"{listed.key}.") if listed else section if name == "name" else name
    name = _SHORT.get(name.removeprefix("use_"), name.removeprefix("use_"))
    if value is MISSING:
        return "", True
    if key == FORK_FROM and value is not None:
        step = os.path.basename(str(value)).removeprefix("checkpoint_").removesuffix(".pt")
        return f"fork at {step[:_MAX_VALUE]}", False
    if value is None or value is False:
        return f"no {name}", True
    if value is True:
        return name, False
    amount = as_float(value)
    if amount is not None:
        return f"{name} {amount:.6g}".replace("e-0", "e-").replace("e+0", "e"), False
    text = " ".join(str(value).split())
    text = os.path.basename(text.rstrip("/")) or text
    text = text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}..."
    return (text if option is not None and option.choices else f"{name} {text}"), False
