"""Reads the YAML file of a sweep: what all runs share, what varies, when hopeless ones are stopped.

base: configs/quickstart.yaml           a config file or a list, relative to the current folder
set: {training.max_iters: 500}          for all cells
grid:                                   every combination of these
  training.learning_rate: [3e-4, 1e-3]
  model.name: [bdh, gpt]
zip:                                    lists of one length, whose values go together
  model.n_layer: [2, 4]
  model.n_embd: [64, 128]
random:                                 draws from ranges, together with each combination
  draws: 8
  seed: 1
  training.weight_decay: {low: 1e-3, high: 1, scale: log}
seeds: 3                                training.seed as in the base, + 1, + 2; or a list
stop: {rule: median, after: 0.25}       see `StopRule`
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from config import ConfigError, schema
from settings.entries import describe, read_options, read_value
from settings.errors import Origin, Problem, raise_problems
from settings.names import nearest, resolve
from settings.schema import REQUIRED, Option, Section, extra_option, option, section_options
from settings.values import RefusedError, Scalar, shown, to_text
from settings.yaml_reader import Entry, Group, Items, Value, read_file

SEED = "training.seed"
PARTS = ("base", "set", "grid", "zip", "random", "seeds", "stop")
MAX_CELLS = 10_000
_LAYER = 1000  # above that of every base file: a value of the sweep wins
_DIGITS = 4  # of a drawn number: enough to tell two apart, short enough to be read

Setting = tuple[Entry, ...]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StopRule(Section, section="stop", on_resume="free", effect="none"):
    """When a run is stopped before its end. Runs that differ in their seed alone are judged by the
    mean of their best held-out losses so far."""

    rule: Literal["median", "halving"] = option(
        REQUIRED, "median: worse than half of the others; halving: only the best half go on"
    )
    after: float = option(
        0.25, "part of a run: median from there on, halving there and at each double", gt=0, lt=1
    )
    min_cells: int = option(3, "median: others that must have reached the step", ge=1)


@dataclass(frozen=True, kw_only=True)
class Draws(Section, section="random", on_resume="free", effect="none"):
    """How often is drawn; every other key of `random` is an option with a `DrawRange`."""

    draws: int = option(REQUIRED, "settings to draw", ge=1, le=MAX_CELLS)
    seed: int = option(0, "another seed draws others", ge=0)


@dataclass(frozen=True, kw_only=True)
class DrawRange(Section, section="range", on_resume="free", effect="none"):
    """Numbers to draw from."""

    low: float = option(REQUIRED, "smallest value")
    high: float = option(REQUIRED, "largest value")
    scale: Literal["linear", "log"] = option("linear", "log: each factor is equally likely")


@dataclass(frozen=True)
class Sweep:
    """The file of a sweep, read but for the configs of its cells."""

    base: tuple[str, ...]
    fixed: Setting
    """Options for all cells, as if they stood on the command line."""
    settings: tuple[Setting, ...]
    """What each cell gets beside them: products of grid, zip and random."""
    seeds: int | tuple[int, ...]
    """How many from the base's seed on, or which; (): the base's."""
    seeds_at: Origin
    stop: StopRule | None


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Returns the sweep of a file; raises ConfigError with all that is wrong, by line."""
    if not os.path.exists(path):
        raise ConfigError(f"{path}: not found. configs/sweeps/learning-rate.yaml is an example.")
    entries, wrong = read_file(path, _LAYER)
    parts = dict[str, Entry]()
    for entry in entries:
        if entry.key not in PARTS:
            near = nearest(entry.key, {part: part for part in PARTS})
            hint = near or f"Parts of a sweep: {', '.join(PARTS)}"
            wrong.append(Problem(entry.origin, f"{shown(entry.key)}: unknown part. {hint}"))
        elif parts.setdefault(entry.key, entry) is not entry:
            text = f"{entry.key}: given twice (first at line {parts[entry.key].origin.line})"
            wrong.append(Problem(entry.origin, text))

    def read(name: str, reader: Callable[[Entry], T], default: T) -> T:
        entry = parts.get(name)
        if entry is None or (isinstance(entry.value, Scalar) and entry.value.is_null):
            return default
        try:
            return reader(entry)
        except _WrongError as error:
            wrong.extend(error.problems)
            return default

    base: tuple[str, ...] = read("base", _read_base, ())
    fixed: Setting = read("set", _read_fixed, ())
    grid: list[list[Setting]] = read("grid", _read_grid, [])
    zipped: list[Setting] = read("zip", _read_zip, [()])
    drawn: list[Setting] = read("random", _read_random, [()])
    no_seeds: int | tuple[int, ...] = ()
    seeds = read("seeds", _read_seeds, no_seeds)
    stop = read("stop", _read_stop, None)
    axes = [*grid, zipped, drawn]
    file = Origin(_LAYER, source=os.fspath(path))
    count = math.prod(len(axis) for axis in axes)
    count *= seeds if isinstance(seeds, int) else len(seeds) or 1
    if count > MAX_CELLS:
        wrong.append(Problem(file, f"{count:,} cells; at most {MAX_CELLS:,} are taken"))
    if "base" not in parts and (entries or not wrong):
        wrong.append(Problem(file, "base is missing: the config file that all runs share"))
    raise_problems(wrong)
    settings = tuple(tuple(itertools.chain(*each)) for each in itertools.product(*axes))
    seeds_at = parts["seeds"].origin if "seeds" in parts else file
    return Sweep(base, fixed, settings, seeds, seeds_at, stop)


class _WrongError(Exception):
    """A part of the file that cannot be read, and why."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__()
        self.problems = problems


def _read_base(entry: Entry) -> tuple[str, ...]:
    values = entry.value.values if isinstance(entry.value, Items) else (entry.value,)
    names = [value.text for value in values if isinstance(value, Scalar) and not value.is_null]
    if len(names) != len(values) or not names:
        text = f"base: expected a config file or a list of them, got {describe(entry.value)}"
        raise _WrongError(Problem(entry.origin, text))
    return tuple(names)


def _lines(part: Entry) -> tuple[Entry, ...]:
    """Returns the `option: value` lines of a part."""
    if isinstance(part.value, Group):
        return part.value.entries
    text = f"{part.key}: expected 'option: ...' lines below it, got {describe(part.value)}"
    raise _WrongError(Problem(part.origin, text))


def _read_fixed(part: Entry) -> Setting:
    lines = [entry for entry in _lines(part) if not isinstance(entry.value, Scalar)]
    text = "set: {}: expected one value, got {}"
    wrong = [Problem(e.origin, text.format(e.key, describe(e.value))) for e in lines]
    if wrong:
        raise _WrongError(*wrong)
    return _lines(part)


def _read_grid(part: Entry) -> list[list[Setting]]:
    return [[(value,) for value in _values(part.key, entry)] for entry in _lines(part)]


def _read_zip(part: Entry) -> list[Setting]:
    first, *others = lists = [_values(part.key, entry) for entry in _lines(part)]
    for values in others:
        if len(values) != len(first):
            text = f"zip: {values[0].key} has {len(values)} values, and {first[0].key} {len(first)}"
            text += "; lists that go together have one length"
            raise _WrongError(Problem(values[0].origin, text))
    return list(zip(*lists, strict=True))


def _values(part: str, entry: Entry) -> list[Entry]:
    """Returns an entry for each value of the list of an option."""
    _varied(entry)
    values = entry.value.values if isinstance(entry.value, Items) else ()
    if not values or not all(isinstance(value, Scalar) for value in values):
        what = "a list with lists or sections in it" if values else describe(entry.value)
        text = f"{part}: {entry.key}: expected a list of values, got {what}"
        raise _WrongError(Problem(entry.origin, text))
    return [Entry(entry.key, value, entry.origin) for value in values]


def _varied(entry: Entry) -> Option:
    """Returns the option that a key means, of which another value is another experiment."""
    try:
        keys = resolve(schema(), entry.key).keys
    except RefusedError as error:
        raise _WrongError(Problem(entry.origin, str(error))) from None
    found = schema().find(keys[0]) if len(keys) == 1 else None
    if found is None or keys[0] in schema().extra:
        raise _WrongError(Problem(entry.origin, f"{entry.key}: does not name one option"))
    if found.effect == "none":
        text = f"{entry.key}: changes no results, so it makes no cells; put it under set"
        raise _WrongError(Problem(entry.origin, text))
    return found


def _read_random(part: Entry) -> list[Setting]:
    lines = _lines(part)
    ranges = [entry for entry in lines if isinstance(entry.value, Group)]
    rest = Group(tuple(entry for entry in lines if entry not in ranges))
    how: Draws = _made(Draws, "random", rest, part.origin)
    if not ranges:
        text = "random: names no option with its low and high"
        raise _WrongError(Problem(part.origin, text))
    spans = [(entry, _varied(entry), _range(entry)) for entry in ranges]
    return [
        tuple(
            Entry(entry.key, Scalar(to_text(_draw(drawn, span, how.seed, number))), entry.origin)
            for entry, drawn, span in spans
        )
        for number in range(how.draws)
    ]


def _range(entry: Entry) -> DrawRange:
    found: DrawRange = _made(DrawRange, f"random: {entry.key}", entry.value, entry.origin)
    if found.low >= found.high or (found.scale == "log" and found.low <= 0):
        least = "0 < low < high" if found.scale == "log" else "low < high"
        text = f"random: {entry.key}: expected {least}, got {found.low:g} and {found.high:g}"
        raise _WrongError(Problem(entry.origin, text))
    return found


def _read_seeds(part: Entry) -> int | tuple[int, ...]:
    count = extra_option("sweep.seeds", int, ge=1, le=MAX_CELLS)
    try:
        if isinstance(part.value, Items) and part.value.values:
            return tuple(read_value(schema().options[SEED], each) for each in part.value.values)
        found: int = read_value(replace(count, default=REQUIRED), part.value)
    except RefusedError as error:
        raise _WrongError(Problem(part.origin, f"seeds: {error}")) from None
    return found


def _read_stop(part: Entry) -> StopRule | None:
    found: StopRule = _made(StopRule, "stop", part.value, part.origin)
    return found


def _made(section: Any, name: str, value: Value, at: Origin) -> Any:
    """Returns a section's dataclass made of `key: value` pairs."""
    known = section_options(section)
    if not isinstance(value, Group):
        keys = ", ".join(each.name for each in known)
        text = f"{name}: expected the keys {keys}, got {describe(value)}"
        raise _WrongError(Problem(at, text))
    values, wrong = read_options(known, value, at)
    if wrong:
        raise _WrongError(*(Problem(place, f"{name}: {text}") for place, text in wrong))
    return section(**values)


def _draw(drawn: Option, span: DrawRange, seed: int, number: int) -> float:
    """Returns draw `number` of an option: the same however many others are drawn."""
    share = random.Random(f"{seed} {number} {drawn.key}").random()
    if span.scale == "log":
        value = span.low * (span.high / span.low) ** share
    else:
        value = span.low + (span.high - span.low) * share
    value = min(span.high, max(span.low, float(f"{value:.{_DIGITS}g}")))
    return round(value) if drawn.kind is int else value
