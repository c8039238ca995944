"""Values of an earlier layer that give way to a later one, instead of contradicting it.

`train.py my.yaml max_iters=50` is meant as a short trial even if my.yaml warms up for 100 steps. A
contradiction within one layer stays an error. Each value that gives way is reported to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from settings.addresses import shareable
from settings.merge import Merged
from settings.rules import Rule, find_superseded, setting
from settings.schema import Schema
from settings.values import to_text

_MAX_ITERS = "training.max_iters"
_WARMUP, _DECAY_END = "schedule.warmup_iters", "schedule.lr_decay_iters"
_NAME, _TRAIN, _HELD_OUT = "dataset.name", "dataset.train_data_path", "dataset.val_data_path"
_FOLDER = "dataset.parquet_dir"


def drop_superseded(
    schema: Schema, merged: Merged, rules: Sequence[Rule], sections: Callable[[Merged], Any]
) -> None:
    """Replaces superseded values in `merged`; `sections` builds the sections of its values."""
    if len({given.origin.layer for given in merged.given.values()}) < 2:
        return  # one layer supersedes nothing
    _drop_token_files(merged)
    _Schedule(schema, merged).shorten()
    # One value at a time: what it becomes can keep another rule, or break it.
    while found := find_superseded(rules, sections(merged), merged.origins, merged.refused):
        key, later = found
        default, now = schema.options[key].default, sections(merged)
        why = f"{setting(now, key)} of {merged.given[key].origin.source} yields to "
        why += f"{setting(now, later)}: {to_text(default)}"
        merged.replace(key, default, merged.given[later].origin, why)


def _drop_token_files(merged: Merged) -> None:
    """A folder of text given later takes the place of token files; any text, of a base's."""
    if merged.layer(_NAME) == 0 and _TRAIN in merged.given and merged.given[_TRAIN].value:
        merged.given.pop(_NAME, None)
    for key in (_NAME, _TRAIN, _HELD_OUT):
        given = merged.given.get(key)
        if given and given.value and given.origin.layer < merged.layer(_FOLDER):
            del merged.given[key]
            merged.note(f"{_FOLDER} takes the place of {key}={shareable(str(given.value))}")


class _Schedule:
    """Warm-up and decay meant for a longer run, when a later layer makes the run short.

    Those of a base (layer 0) give way where they would take much of the run. Those of a file of the
    user's give way only where the run would end during its warm-up, which a rule forbids.
    """

    def __init__(self, schema: Schema, merged: Merged) -> None:
        self._schema = schema
        self._merged = merged

    def shorten(self) -> None:
        """Replaces `lr_decay_iters` by null and `warmup_iters` by 3 % of the run, where needed."""
        steps = self._value(_MAX_ITERS)
        # A warm-up that gives way itself, below, does not hold up the end of the decay.
        warmup = 0 if self._gives_way(_WARMUP) else (self._value(_WARMUP) or 0)
        if not warmup <= (self._value(_DECAY_END) or steps) <= steps:
            self._replace(_DECAY_END, None, f"{_MAX_ITERS}={steps}")
        # Up to a quarter of the run, a warm-up may be what the user wants. Above it is surely a
        # leftover of the longer run. 3 % is what `warmup_iters: null` means.
        end = self._value(_DECAY_END) or steps
        if (self._value(_WARMUP) or 0) > min(end, steps) // 4:
            key, end = (_DECAY_END, end) if end < steps else (_MAX_ITERS, steps)
            self._replace(_WARMUP, end * 3 // 100, f"{key}={end}")

    def _value(self, key: str) -> Any:
        given = self._merged.given.get(key)
        return given.value if given else self._schema.options[key].default

    def _gives_way(self, key: str) -> bool:
        merged = self._merged
        if key not in merged.given or merged.layer(key) == 0:
            return key in merged.given
        end, steps = self._value(_DECAY_END), self._value(_MAX_ITERS)
        last = _DECAY_END if end and end < steps else _MAX_ITERS
        ends_in_warmup = bool((self._value(_WARMUP) or 0) > self._value(last))
        return ends_in_warmup and merged.layer(key) < merged.layer(last)

    def _replace(self, key: str, value: int | None, because: str) -> None:
        if self._gives_way(key):
            given = self._merged.given[key]
            why = f"{key}={to_text(given.value)} of {given.origin.source} yields to {because}: "
            self._merged.replace(key, value, given.origin, why + to_text(value))
