"""Sorts and filters runs by any column, option or metric: `runs.py list --sort ... --filter ...`.

Values are written as in a config (`1e-3`, `null`).
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from compare.differences import MISSING
from compare.groups import RunGroup, Spread
from compare.reading.json_values import as_float
from compare.reading.run import Run
from compare.tables.table import COLUMN_BY_NAME, COLUMNS
from config import ConfigError, schema
from settings.names import resolve
from settings.values import FALSE_WORDS, NULL_WORDS, TRUE_WORDS, RefusedError, one_line

T = TypeVar("T")
STATES = ("done", "stopped", "crashed", "running")
_CONDITION = re.compile(r"\s*([^\s=!<>]+)\s*(!=|<=|>=|==|=|<|>)\s*(.*?)\s*", re.DOTALL)
_WITH_UNIT = re.compile(r"([0-9.]+)\s*([kMBT])")
_UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def sort_runs(runs: Sequence[Run], key: str) -> list[Run]:
    """Returns the runs ascending by `key`, or descending by `-key`; runs without a value last.

    Raises ConfigError for an unknown key.
    """
    return _sorted(runs, value_getter(runs, key.removeprefix("-")), key.startswith("-"))


def sort_groups(groups: Sequence[RunGroup], key: str) -> list[RunGroup]:
    """Returns the groups sorted as `sort_runs` sorts runs, by the mean of the runs' values."""
    every = [run for group in groups for run in group.runs]
    value_of = value_getter(every, key.removeprefix("-"))

    def mean_of(group: RunGroup) -> Any:
        values = [value_of(run) for run in group.runs]
        spread = Spread.of([number for each in values if (number := as_float(each)) is not None])
        return spread.mean if spread else values[0]

    return _sorted(groups, mean_of, key.startswith("-"))


def _sorted(items: Sequence[T], value_of: Callable[[T], Any], descending: bool) -> list[T]:
    def sort_key(item: T) -> tuple[bool, float, str]:
        value = value_of(item)
        amount = as_float(value)
        return (True, 0.0, str(value)) if amount is None else (False, amount, "")  # numbers first

    known = [item for item in items if value_of(item) not in (None, MISSING)]
    unknown = [item for item in items if value_of(item) in (None, MISSING)]
    return sorted(known, key=sort_key, reverse=descending) + unknown


def filter_runs(runs: Sequence[Run], condition: str) -> list[Run]:
    """Returns the runs for which `key=value` holds (also != < <= > >=); raises ConfigError.

    A run without this value meets no condition, not even `!=`.
    """
    parts = _CONDITION.fullmatch(condition)
    if not parts:
        raise ConfigError(
            f"--filter {one_line(condition)}: expected KEY, one of = != < <= > >=, and a value, "
            "in quotes: 'training.learning_rate>1e-4'."
        )
    key, sign, text = parts.groups()
    value_of, wanted = value_getter(runs, key), _parse(key, text)
    if sign[0] in "<>" and as_float(wanted) is None:
        raise ConfigError(f"--filter {one_line(condition)}: {sign} takes a number, got {text!r}.")
    holds = _OPERATORS[sign]

    def meets(run: Run) -> bool:
        value = value_of(run)
        if value is MISSING or (sign[0] in "<>" and as_float(value) is None):
            return False
        if isinstance(value, str):
            # Compared with the text as typed: a run named `100` or an option `1e-3` of another
            # version must not be taken for a number.
            return holds(value, text if wanted is not None else None)
        same_kind = isinstance(value, bool) == isinstance(wanted, bool)  # in Python True == 1
        return holds(value, wanted) if same_kind else sign == "!="

    return [run for run in runs if meets(run)]


def value_getter(runs: Sequence[Run], key: str) -> Callable[[Run], Any]:
    """Returns a function from a run to the value of a column, a metric or an option.

    A name is looked up as a column, then as a metric, then as an option of the runs, and last as an
    alias of an option. Raises ConfigError if it is none of these.
    """
    if key in COLUMN_BY_NAME:
        column = COLUMN_BY_NAME[key]
        return lambda run: _or_missing(column.value(run))
    if any(key in run.newest for run in runs):
        return lambda run: _or_missing(run.newest.get(key))
    if any(key in run.config for run in runs):  # also an option that only another version has
        return lambda run: run.config.get(key, MISSING)
    try:
        keys = resolve(schema(), key).keys
    except RefusedError as error:
        raise ConfigError(_unknown_key(key, runs, str(error))) from None
    known = [key for key in keys if schema().find(key) and key not in schema().extra]
    if len(keys) != 1 or not known:
        example = " or ".join(known) or "one that python train.py --help names"
        raise ConfigError(f"{key}: is not one option of a run. Write {example}.")
    return lambda run: run.config.get(known[0], MISSING)


def _or_missing(value: Any) -> Any:
    """Returns MISSING for a column or metric that is None: only an option can be null."""
    return MISSING if value is None else value


def _parse(key: str, text: str) -> Any:
    """Returns the value that a filter's text means; raises ConfigError if `key` never has it."""
    choices = STATES if key == "state" else _choices(key)
    word = text.lower()
    # Choices come first: an option may have one that reads as null or a switch, such as `none`.
    if choices and word in choices:
        return word
    if word in NULL_WORDS:
        return None
    if word in TRUE_WORDS | FALSE_WORDS:
        return word in TRUE_WORDS
    try:
        sized = _WITH_UNIT.fullmatch(text)
        return float(sized[1]) * _UNITS[sized[2]] if sized else float(text)
    except ValueError:
        pass
    if choices:
        near = difflib.get_close_matches(word, choices, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}: expected one of {', '.join(choices)}, got {text!r}.{hint}")
    return text


def _choices(key: str) -> tuple[str, ...]:
    """Returns the values that an option can have, if they are few words."""
    try:
        name = "model.name" if key == "model" else key
        keys = () if name in COLUMN_BY_NAME else resolve(schema(), name).keys
    except RefusedError:
        keys = ()
    options = schema().options
    return options[keys[0]].choices if len(keys) == 1 and keys[0] in options else ()


def _unknown_key(key: str, runs: Iterable[Run], refusal: str) -> str:
    if "." in key:
        return refusal if refusal[-1] in ".?" else f"{refusal}."
    names = {name: name for run in runs for name in run.newest}
    names |= {option.name: full for full, option in schema().options.items()}
    names |= {name: name for name in COLUMN_BY_NAME}
    near = [names[name] for name in difflib.get_close_matches(key, names, 2, 0.7)]
    if not near:
        return f"{key}: no column, option or metric. Columns: {', '.join(c.name for c in COLUMNS)}."
    return f"{key}: no column, option or metric. Did you mean {' or '.join(near)}?"
