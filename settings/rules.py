"""Rules between options: what must hold, and the sentence that names every key when it does not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from settings.problems import Origin, Problem
from settings.schema import Option
from settings.values import to_text

T = TypeVar("T")  # the sections side by side


@dataclass(frozen=True, slots=True)
class Rule(Generic[T]):
    """`text` has {0}, {1}, ... for 'key=value' of each key; `remedy` is computed where it helps.

    `yields`: keys that go back to their default where a later file, or the command line, says of
    the other keys what breaks the rule.
    """

    keys: tuple[str, ...]
    holds: Callable[[T], bool]
    text: str
    remedy: Callable[[T], str] | None = None
    yields: tuple[str, ...] = ()

    def complaint(self, sections: T) -> str:
        """Return what is wrong in words, or ''."""
        if self.holds(sections):
            return ""
        text = self.text.format(*(setting(sections, key) for key in self.keys))
        return f"{text}; {self.remedy(sections)}" if self.remedy else text


def check_rules(
    rules: Sequence[Rule[T]],
    sections: T,
    origins: Mapping[str, Origin] | None = None,
    refused: Collection[str] = (),
) -> list[Problem]:
    """Return each broken rule, at the place of the last value it is about.

    `origins` says where the keys that were given came from. Rules about a key in `refused` are left
    out: its value is not what the user meant.
    """
    problems = []
    for rule in rules:
        text = "" if any(key in refused for key in rule.keys) else rule.complaint(sections)
        if text:
            places = {key: (origins or {}).get(key, Origin()) for key in rule.keys}
            last = max(places.values())
            others = [
                f"{key}: {place if place.source else 'default'}"
                for key, place in places.items()
                if place != last
            ]
            problems.append(Problem(last, text + (f" [{', '.join(others)}]" if others else "")))
    return problems


def first_superseded(
    rules: Sequence[Rule[T]],
    sections: T,
    origins: Mapping[str, Origin],
    refused: Set[str] = frozenset(),
) -> tuple[str, str] | None:
    """Return a value that breaks a rule only because of one given in a later layer, as the keys of
    both; None where there is none that may yield."""
    for rule in rules:
        may_yield = [
            key for key in rule.yields if key in origins and not _is_default(key, sections)
        ]
        if not may_yield or rule.holds(sections) or not refused.isdisjoint(rule.keys):
            continue
        layers = {key: origins.get(key, Origin()).layer for key in rule.keys}
        key, later = min(may_yield, key=layers.__getitem__), max(layers, key=layers.__getitem__)
        if layers[key] < layers[later]:
            return key, later
    return None


def model_option_rules(options: Iterable[Option]) -> list[Rule[Any]]:
    """Returns a rule for each option that only some models have: others keep its default."""
    return [_model_option_rule(option) for option in options if option.models]


def _model_option_rule(option: Option) -> Rule[Any]:
    def holds(sections: Any) -> bool:
        value = getattr(getattr(sections, option.section), option.name)
        return sections.model.name in option.models or bool(value == option.default)

    text = f"{{0}} is an option of {' and '.join(option.models)}, and {{1}}"
    return Rule((option.key, "model.name"), holds, text, yields=(option.key,))


def setting(sections: Any, key: str) -> str:
    """Return 'section.option=value'."""
    section, name = key.split(".")
    return f"{key}={to_text(getattr(getattr(sections, section), name))}"


def default_of(section: Any, option_name: str) -> Any:
    """Return the default of an option of a section's dataclass."""
    return next(item.default for item in fields(section) if item.name == option_name)


def _is_default(key: str, sections: Any) -> bool:
    section, name = key.split(".")
    own = getattr(sections, section)
    return bool(getattr(own, name) == default_of(own, name))


def nearest_multiples(value: int, step: int) -> str:
    """Return the multiples of `step` next to `value`, for a message: 'nearest: 248, 252'."""
    low = value // step * step
    return "nearest: " + ", ".join(str(number) for number in (low, low + step) if number > 0)
