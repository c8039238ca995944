"""The cells of a sweep: each is a config, read as train.py reads it, and a name that tells it from
the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from config import Config, ConfigError, read_variants, schema
from engine.run_directory.experiment import experiment_id, open_options
from settings.entries import flat_options
from settings.names import resolve
from settings.rules import setting
from settings.values import Scalar, to_text
from settings.yaml_reader import Entry
from sweeps.sweep_file import SEED, Sweep

_MAX_ERRORS = 10  # shown


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep."""

    number: int
    """Counts from 1, duplicates left out."""
    name: str
    """What differs from other cells: `learning_rate=1e-3 model=gpt seed=1338`."""
    group_name: str
    """The same without the seed."""
    config: Config
    words: tuple[str, ...]
    """The command line of train.py."""
    options: Mapping[str, Any]
    """The config, flat."""
    open_options: tuple[str, ...]
    """Options that its run decides."""
    id: str
    """`experiment_id` without those."""

    @cached_property
    def group(self) -> str:
        """Equal for cells that differ in the seed alone."""
        return experiment_id(self.options, (*self.open_options, SEED))


def make_cells(sweep: Sweep) -> list[Cell]:
    """Returns the cells, the first seed of all settings before the second one of any, so that
    settings can be compared early.

    Raises ConfigError with what is wrong in any of them.
    """
    seeds = [[Entry(SEED, Scalar(str(seed)), sweep.seeds_at)] for seed in _seeds(sweep)] or [[]]
    varied = [(*setting, *seed) for seed in seeds for setting in sweep.settings]
    names, variants = _names(varied), [(*sweep.fixed, *own) for own in varied]
    cells, wrong = dict[str, Cell](), dict[str, list[str]]()
    read = read_variants(sweep.base, variants)
    for name, entries, config in zip(names, variants, read, strict=True):
        problem = str(config) if isinstance(config, ConfigError) else _unfit(config)
        if isinstance(config, ConfigError) or problem:
            wrong.setdefault(problem, []).append(name)
        else:
            cell = _cell(len(cells) + 1, name, sweep.base, entries, config)
            cells.setdefault(cell.id, cell)
    if wrong:
        raise ConfigError(_errors(wrong, len(variants)))
    return list(cells.values())


def _seeds(sweep: Sweep) -> Sequence[int]:
    if not isinstance(sweep.seeds, int):
        return sweep.seeds
    (base,) = read_variants(sweep.base, [sweep.fixed])
    first = base.training.seed if isinstance(base, Config) else 0  # told with the cells
    return range(first, first + sweep.seeds)


def _unfit(config: Config) -> str:
    """Returns why a config cannot be a cell, whose state is read from its run directory; or ''."""
    unfit = {
        "training.save_model": not config.training.save_model,
        "training.eval_only": config.training.eval_only,
        "training.resume_from_checkpoint": config.training.resume_from_checkpoint is not None,
        "training.init_from": config.training.init_from == "resume",
    }
    named = [setting(config, key) for key, holds in unfit.items() if holds]
    return f"{named[0]}: a run of a sweep trains, saves, and begins by itself." if named else ""


def _errors(wrong: Mapping[str, Sequence[str]], count: int) -> str:
    """Returns each message once, with the cells that it is about unless those are all."""
    lines = []
    for text, names in list(wrong.items())[:_MAX_ERRORS]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines += [text] if len(names) == count else [f"Cell {names[0]}{more}:", text]
    rest = len(wrong) - _MAX_ERRORS
    return "\n".join(lines + ([f"... and {rest} other messages"] if rest > 0 else []))


def _cell(
    number: int, name: str, base: Sequence[str], entries: Sequence[Entry], config: Config
) -> Cell:
    flat = flat_options(config.to_dict())
    left_open = open_options(flat, [key for e in entries for key in resolve(schema(), e.key).keys])
    files = [word for file in base for word in ("--config", file)]
    return Cell(
        number=number,
        name=name or "the only one",
        group_name=" ".join(w for w in name.split() if not w.startswith("seed=")) or "all",
        config=config,
        words=(*files, *map(_assignment, entries)),
        options=flat,
        open_options=left_open,
        id=experiment_id(flat, left_open),
    )


def _assignment(entry: Entry) -> str:
    """Returns an entry as a word of the command line."""
    assert isinstance(entry.value, Scalar)
    text = f'"{entry.value.text}"' if entry.value.quoted else entry.value.text or "null"
    return f"{entry.key}={text}"


def _names(variants: Sequence[Sequence[Entry]]) -> list[str]:
    """Returns for each variant the values of the options in which the variants differ."""
    short = {key: _short(key) for key in {entry.key for each in variants for entry in each}}
    rows = [{short[entry.key]: _text(entry.value) for entry in each} for each in variants]
    varying = [key for key in rows[0] if len({row[key] for row in rows}) > 1] if rows else []
    return [" ".join(f"{key}={row[key]}" for key in varying) for row in rows]


def _short(key: str) -> str:
    """Returns an option's name without its section; of `model.name`, the section."""
    keys = resolve(schema(), key).keys
    section, _, name = (keys[0] if keys else key).partition(".")
    return section if name == "name" else name


def _text(value: Any) -> str:
    assert isinstance(value, Scalar)
    return to_text(value.text) if value.quoted else value.text
