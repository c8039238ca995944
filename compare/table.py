"""Runs as rows: what `list` shows of each, sorted and filtered by any column, option or metric.

Values read as in a config (`1e-3`, `null`), and the same words are understood in a filter.
"""

from __future__ import annotations

import difflib
import operator
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from compare.differences import MISSING
from compare.labels import LONGEST, descriptions, short_names
from compare.records import number
from compare.run import Run
from config import ConfigError, schema
from settings.formatting import format_count
from settings.names import resolve
from settings.terminal import printable
from settings.values import FALSE_WORDS, NULL_WORDS, TRUE_WORDS, RefusedError, one_line, to_text

WIDTH = 100
STATES = ("done", "stopped", "crashed", "running")
_CONDITION = re.compile(r"\s*([^\s=!<>]+)\s*(!=|<=|>=|==|=|<|>)\s*(.*?)\s*", re.DOTALL)
_SIZE = re.compile(r"([0-9.]+)\s*([kMBT])")
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
_NONE_SHOWN = "-"


@dataclass(frozen=True)
class Column:
    """One value of a run: under which name, above which column, and how it is shown."""

    name: str
    head: str
    value: Callable[[Run], Any]
    show: Callable[[Any], str] = str


def _loss(value: float) -> str:
    return f"{value:.4f}"


COLUMNS = (
    Column("name", "run", lambda run: run.name),
    Column("state", "state", lambda run: run.state),
    Column("model", "model", lambda run: run.model or None),
    Column("parameters", "params", lambda run: run.parameters, format_count),
    Column("step", "step", lambda run: run.step),
    Column("planned_steps", "planned", lambda run: run.planned_steps),
    Column("tokens", "tokens", lambda run: run.tokens, format_count),
    Column("best_loss", "best", lambda run: run.best_loss, _loss),
    Column("last_loss", "last", lambda run: run.last_loss, _loss),
    Column("bits_per_byte", "bits/B", lambda run: run.bits_per_byte, _loss),
    Column("tokens_per_sec", "tok/s", lambda run: run.tokens_per_sec, format_count),
    Column("precision", "precision", lambda run: run.precision or None),
)
_BY_NAME = {name: column for column in COLUMNS for name in (column.name, column.head)}
_DIFFERS = "differs in"
_NARROWEST = 16  # of what runs differ in
_LEFT = {"run", _DIFFERS, "state", "model", "precision"}


def summary(run: Run) -> dict[str, Any]:
    """All that is known of a run in plain values, for JSON."""
    columns = {column.name: column.value(run) for column in COLUMNS}
    others = {"path": str(run.path), "reason": run.reason or None, "best_step": run.best_step}
    return others | columns | {"config": dict(run.config), "problems": list(run.problems)}


def list_lines(runs: Sequence[Run]) -> list[str]:
    """A table of one line per run, with the options in which they differ where there is room."""
    heads = [column.head for column in COLUMNS if column.name != "planned_steps"]
    heads[heads.index("step")] = "steps"
    rows = [heads, *(_row(run, name) for run, name in zip(runs, short_names(runs), strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = width() - sum(widths) - len(widths)
    told = descriptions(runs, min(LONGEST, max(_NARROWEST, room)))
    if any(told):
        for row, text in zip(rows, [_DIFFERS, *told], strict=True):
            row.insert(1, text)
    return aligned(rows, [head in _LEFT for head in heads])


def _row(run: Run, name: str) -> list[str]:
    cells = {column.name: cell(column, run) for column in COLUMNS}
    planned = cells.pop("planned_steps")
    cells["step"] += "" if planned == _NONE_SHOWN else f"/{planned}"
    cells["precision"] = cells["precision"].replace(" weights", "")
    return list((cells | {"name": name}).values())


def width() -> int:
    """Columns to fill: those of the terminal, and as many as `WIDTH` where there is none."""
    return max(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def cell(column: Column, run: Run) -> str:
    """A column's value as text; `-` if it is not known."""
    value = column.value(run)
    return _NONE_SHOWN if value is None else column.show(value)


def aligned(rows: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    """Lines of columns, close together where they would be too wide."""
    rows = [[printable(text.replace("\n", "\\n")) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width() else " "
    return [
        gap.join(
            text.ljust(size) if is_left else text.rjust(size)
            for text, size, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


# ---- sorting and filtering


def sort_runs(runs: Sequence[Run], key: str) -> list[Run]:
    """Ascending by `key`, descending by `-key`; runs without a value come last.

    Raises ConfigError for an unknown key.
    """
    values = value_getter(runs, key.removeprefix("-"))
    known = [(_rank(value), run) for run in runs if (value := values(run)) not in (None, MISSING)]
    known.sort(key=lambda pair: pair[0], reverse=key.startswith("-"))
    placed = {id(run) for _, run in known}
    return [run for _, run in known] + [run for run in runs if id(run) not in placed]


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers before words."""
    amount = number(value)
    return (amount is None, amount or 0.0, "" if amount is not None else str(value))


def filter_runs(runs: Sequence[Run], condition: str) -> list[Run]:
    """The runs for which `key=value` holds (also != < <= > >=); raises ConfigError.

    A run that does not know the value meets no condition.
    """
    parts = _CONDITION.fullmatch(condition)
    if not parts:
        raise ConfigError(
            f"--filter {one_line(condition)}: expected KEY, one of = != < <= > >=, and a value, "
            "in quotes: 'training.learning_rate>1e-4'."
        )
    key, sign, text = parts.groups()
    values, wanted = value_getter(runs, key), _read(key, text)
    if sign[0] in "<>" and number(wanted) is None:
        raise ConfigError(f"--filter {one_line(condition)}: {sign} takes a number, got {text!r}.")
    holds = _OPERATORS[sign]

    def meets(run: Run) -> bool:
        value = values(run)
        if value is MISSING or (sign[0] in "<>" and number(value) is None):
            return False
        if isinstance(value, str):
            return holds(value, text if wanted is not None else None)
        same_kind = isinstance(value, bool) == isinstance(wanted, bool)  # true is not 1 here
        return holds(value, wanted) if same_kind else sign == "!="

    return [run for run in runs if meets(run)]


def _read(key: str, text: str) -> Any:
    """What a word of a filter means; raises ConfigError for one that the key never is."""
    choices = STATES if key == "state" else _choices(key)
    word = text.lower()
    if choices and word in choices:
        return word
    if word in NULL_WORDS:
        return None
    if word in TRUE_WORDS | FALSE_WORDS:
        return word in TRUE_WORDS
    try:
        sized = _SIZE.fullmatch(text)
        return float(sized[1]) * _UNITS[sized[2]] if sized else float(text)
    except ValueError:
        pass
    if choices:
        near = difflib.get_close_matches(word, choices, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}: expected one of {', '.join(choices)}, got {text!r}.{hint}")
    return text


def _choices(key: str) -> tuple[str, ...]:
    try:
        name = "model.name" if key == "model" else key
        keys = () if name in _BY_NAME else resolve(schema(), name).keys
    except RefusedError:
        keys = ()
    options = schema().options
    return options[keys[0]].choices if len(keys) == 1 and keys[0] in options else ()


def value_getter(runs: Sequence[Run], key: str) -> Callable[[Run], Any]:
    """Reads the value of a column, an option or a metric from a run; raises ConfigError.

    A bare name means a column first, then the one option of that name.
    """
    if key in _BY_NAME:
        return lambda run: run_value(_BY_NAME[key].value(run))
    if any(key in run.last for run in runs):
        return lambda run: run_value(run.last.get(key))
    if any(key in run.config for run in runs):  # of another version too
        return lambda run: run.config.get(key, MISSING)
    try:
        keys = resolve(schema(), key).keys
    except RefusedError as error:
        raise ConfigError(_unknown(key, runs, str(error))) from None
    if len(keys) != 1 or keys[0] not in schema().options:
        raise ConfigError(f"{key}: is not one option of a run. Write {_example(keys)}.")
    return lambda run: run.config.get(keys[0], MISSING)


def _example(keys: Sequence[str]) -> str:
    known = [key for key in keys if key in schema().options]
    return " or ".join(known) or "one that python train.py --help names"


def run_value(value: Any) -> Any:
    """A value that a run does not know is `MISSING`, not null."""
    return MISSING if value is None else value


def _unknown(key: str, runs: Iterable[Run], refusal: str) -> str:
    names = {name: name for run in runs for name in run.last}
    names |= {option.name: full for full, option in schema().options.items()}
    names |= {name: name for name in _BY_NAME}
    near = [names[name] for name in difflib.get_close_matches(key, names, 2, 0.7)]
    if "." in key:
        return refusal if refusal[-1] in ".?" else f"{refusal}."
    if not near:
        return f"{key}: no column, option or metric. Columns: {', '.join(c.name for c in COLUMNS)}."
    return f"{key}: no column, option or metric. Did you mean {' or '.join(near)}?"


# ---- a table of differences


def shown(value: Any) -> str:
    """A value as a config writes it, or `?`."""
    if value == MISSING:
        return MISSING
    plain = value is None or isinstance(value, (str, bool, int, float))
    return to_text(value) if plain else one_line(str(value))
