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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from config import schema
from settings.entries import describe, read_options
from settings.errors import Origin, Problem, raise_problems
from settings.names import nearest, resolve
from settings.schema import REQUIRED, Option, Section, extra_option, option, section_options
from settings.values import RefusedError, Scalar, read_scalar, shown, to_text
from settings.yaml_reader import Entry, Group, Items, Value, read_file

SEED = "training.seed"
PARTS = ("base", "set", "grid", "zip", "random", "seeds", "stop")
MAX_CELLS = 10_000
_LAYER = 1000  # above that of every base file: a value of the sweep wins
_DIGITS = 4  # of a drawn number: enough to tell two apart, short enough to be read

Setting = tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class StopRule(Section, section="stop", on_resume="free", effect="none"):
    """When a run is stopped before its end. Runs that differ in their seed alone are judged by
    their mean; smaller is better."""

    rule: Literal["median", "halving"] = option(
        REQUIRED, "median: worse than half of the others; halving: only the best 1/factor go on"
    )
    metric: str = option("eval/val_loss", "key of metrics.jsonl; its best value so far counts")
    after: float = option(0.25, "part of a run before which none is stopped", gt=0, lt=1)
    min_cells: int = option(3, "median: others that must have reached the step", ge=1)
    factor: int = option(2, "halving: at after, after * factor, ... of the run", ge=2)


@dataclass(frozen=True, kw_only=True)
class Draws(Section, section="random", on_resume="free", effect="none"):
    """How often is drawn; every other key of `random` is an option with a `Range`."""

    draws: int = option(REQUIRED, "settings to draw", ge=1, le=MAX_CELLS)
    seed: int = option(0, "another seed draws others", ge=0)


@dataclass(frozen=True, kw_only=True)
class Range(Section, section="range", on_resume="free", effect="none"):
    """Numbers to draw from."""

    low: float = option(REQUIRED, "smallest value")
    high: float = option(REQUIRED, "largest value")
    scale: Literal["linear", "log"] = option("linear", "log: each factor is equally likely")


@dataclass(frozen=True)
class Sweep:
    """The file of a sweep, read but for the configs of its cells."""

    path: str
    base: tuple[str, ...]
    fixed: Setting
    """Options for all cells, as if they stood on the command line."""
    settings: tuple[Setting, ...]
    """What each cell gets beside them: products of grid, zip and random."""
    seeds: int | tuple[int, ...] | None
    """How many from the base's seed on, or which; None: the base's."""
    seeds_at: Origin
    stop: StopRule | None


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Returns the sweep of a file; raises ConfigError with all that is wrong, by line."""
    reader = _Reader(os.fspath(path))
    sweep = reader.sweep()
    raise_problems(reader.problems)
    return sweep


class _Reader:
    """Reads the parts of the file; what is wrong is collected in `problems`."""

    def __init__(self, path: str) -> None:
        self.path = path
        entries, self.problems = read_file(path, _LAYER)
        self._parts = self._by_name(entries)

    def _refuse(self, at: Origin, text: str) -> None:
        self.problems.append(Problem(at, text))

    def _by_name(self, entries: Sequence[Entry]) -> dict[str, Entry]:
        found = dict[str, Entry]()
        for entry in entries:
            if entry.key not in PARTS:
                near = nearest(entry.key, {part: part for part in PARTS})
                hint = near or f"Parts of a sweep: {', '.join(PARTS)}"
                self._refuse(entry.origin, f"{shown(entry.key)}: unknown part. {hint}")
            elif entry.key in found:
                line = found[entry.key].origin.line
                self._refuse(entry.origin, f"{entry.key}: given twice (first at line {line})")
            else:
                found[entry.key] = entry
        return found

    def sweep(self) -> Sweep:
        axes = [*self._grid(), self._zip(), self._random()]
        combinations = math.prod(map(len, axes))
        seeds, at = self._seeds()
        count = len(seeds) if isinstance(seeds, tuple) else seeds or 1
        if combinations * count > MAX_CELLS:
            text = f"{combinations * count:,} cells; at most {MAX_CELLS:,} are taken"
            self._refuse(Origin(_LAYER, source=self.path), text)
            axes = []
        settings = (tuple(itertools.chain(*parts)) for parts in itertools.product(*axes))
        return Sweep(
            path=self.path,
            base=self._base(),
            fixed=tuple(self._fixed()),
            settings=tuple(settings),
            seeds=seeds,
            seeds_at=at,
            stop=self._stop(),
        )

    def _base(self) -> tuple[str, ...]:
        entry = self._parts.get("base")
        if entry is None:
            at = Origin(_LAYER, source=self.path)
            self._refuse(at, "base is missing: the config file that all runs share")
            return ()
        values = entry.value.values if isinstance(entry.value, Items) else (entry.value,)
        names = [value.text for value in values if isinstance(value, Scalar) and not value.is_null]
        if len(names) != len(values) or not names:
            text = f"base: expected a config file or a list of them, got {describe(entry.value)}"
            self._refuse(entry.origin, text)
        return tuple(names)

    def _group(self, part: str) -> tuple[Entry, ...]:
        """Returns the `option: value` lines of a part; () where it is left out."""
        entry = self._parts.get(part)
        if entry is None or (isinstance(entry.value, Scalar) and entry.value.is_null):
            return ()
        if isinstance(entry.value, Group):
            return entry.value.entries
        text = f"{part}: expected 'option: ...' lines below it, got {describe(entry.value)}"
        self._refuse(entry.origin, text)
        return ()

    def _fixed(self) -> Iterator[Entry]:
        for entry in self._group("set"):
            if isinstance(entry.value, Scalar):
                yield entry
            else:
                self._refuse(
                    entry.origin, f"set: {entry.key}: expected one value, got {_what(entry)}"
                )

    def _grid(self) -> Iterator[list[Setting]]:
        for entry in self._group("grid"):
            yield [(value,) for value in self._values("grid", entry)]

    def _zip(self) -> list[Setting]:
        lists = [(entry, self._values("zip", entry)) for entry in self._group("zip")]
        for entry, values in lists[1:]:
            first, expected = lists[0]
            if len(values) != len(expected):
                self._refuse(
                    entry.origin,
                    f"zip: {entry.key} has {len(values)} values, and {first.key} {len(expected)}; "
                    "lists that go together have one length",
                )
                return []
        return list(zip(*(values for _, values in lists), strict=True)) or [()]

    def _values(self, part: str, entry: Entry) -> list[Entry]:
        """Returns an entry for each value of the list of an option."""
        values = entry.value.values if isinstance(entry.value, Items) else ()
        if not values or not all(isinstance(value, Scalar) for value in values):
            text = f"{part}: {entry.key}: expected a list of values, got {_what(entry)}"
            self._refuse(entry.origin, text)
            return []
        return [Entry(entry.key, value, entry.origin) for value in values if self._varies(entry)]

    def _varies(self, entry: Entry) -> Option | None:
        """Returns the option that a key means, if another value of it is another experiment."""
        try:
            keys = resolve(schema(), entry.key).keys
        except RefusedError as error:
            self._refuse(entry.origin, str(error))
            return None
        found = schema().find(keys[0]) if len(keys) == 1 else None
        if found is None or keys[0] in schema().extra:
            self._refuse(entry.origin, f"{entry.key}: does not name one option")
            return None
        if found.effect == "none":
            text = f"{entry.key}: changes no results, so it makes no cells; put it under set"
            self._refuse(entry.origin, text)
            return None
        return found

    def _random(self) -> list[Setting]:
        if not (entries := self._group("random")):
            return [()]
        at = self._parts["random"].origin
        options = [entry for entry in entries if isinstance(entry.value, Group)]
        how = self._read(Draws, "random", Group(tuple(e for e in entries if e not in options)), at)
        ranges = [(entry, self._varies(entry), self._range(entry)) for entry in options]
        if not ranges:
            self._refuse(at, "random: names no option with its low and high")
        if how is None:
            return []
        return [
            tuple(
                Entry(e.key, Scalar(to_text(_draw(o, span, how.seed, k))), e.origin)
                for e, o, span in ranges
                if o is not None and span is not None
            )
            for k in range(how.draws)
        ]

    def _range(self, entry: Entry) -> Range | None:
        found: Range | None = self._read(Range, f"random: {entry.key}", entry.value, entry.origin)
        if found is None:
            return None
        if found.low >= found.high or (found.scale == "log" and found.low <= 0):
            least = "0 < low < high" if found.scale == "log" else "low < high"
            text = f"random: {entry.key}: expected {least}, got {found.low:g} and {found.high:g}"
            self._refuse(entry.origin, text)
            return None
        return found

    def _seeds(self) -> tuple[int | tuple[int, ...] | None, Origin]:
        entry = self._parts.get("seeds")
        if entry is None:
            return None, Origin()
        try:
            if isinstance(entry.value, Scalar):
                count = extra_option("sweep.seeds", int, ge=1, le=MAX_CELLS)
                return read_scalar(replace(count, default=REQUIRED), entry.value), entry.origin
            if not isinstance(entry.value, Items) or not entry.value.values:
                raise RefusedError(f"expected a number or a list, got {describe(entry.value)}")
            seeds = [v for v in entry.value.values if isinstance(v, Scalar)]
            return tuple(read_scalar(schema().options[SEED], v) for v in seeds), entry.origin
        except RefusedError as error:
            self._refuse(entry.origin, f"seeds: {error}")
            return None, entry.origin

    def _stop(self) -> StopRule | None:
        entry = self._parts.get("stop")
        if entry is None or (isinstance(entry.value, Scalar) and entry.value.is_null):
            return None
        found: StopRule | None = self._read(StopRule, "stop", entry.value, entry.origin)
        return found

    def _read(self, made: Any, name: str, value: Value, at: Origin) -> Any:
        """Returns a section's dataclass made of `key: value` pairs; None if they are wrong."""
        known = section_options(made)
        if not isinstance(value, Group):
            keys = ", ".join(each.name for each in known)
            self._refuse(at, f"{name}: expected the keys {keys}, got {describe(value)}")
            return None
        values, wrong = read_options(known, value, at)
        self.problems += [Problem(place, f"{name}: {text}") for place, text in wrong]
        return None if wrong else made(**values)


def _what(entry: Entry) -> str:
    items = isinstance(entry.value, Items) and entry.value.values
    return "a list with lists or sections in it" if items else describe(entry.value)


def _draw(drawn: Option, span: Range, seed: int, number: int) -> float:
    """Returns draw `number` of an option: the same however many others are drawn."""
    share = random.Random(f"{seed} {number} {drawn.key}").random()
    if span.scale == "log":
        value = span.low * (span.high / span.low) ** share
    else:
        value = span.low + (span.high - span.low) * share
    value = min(span.high, max(span.low, float(f"{value:.{_DIGITS}g}")))
    return round(value) if drawn.kind is int else value
