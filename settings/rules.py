"""Rules between options: a function that says what is wrong, and the options that it is about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from settings.addresses import shareable
from settings.errors import Origin, Problem
from settings.schema import Option, default_of
from settings.values import to_text


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that must hold between options."""

    keys: tuple[str, ...]
    complain: Callable[[Any], str | None]
    """Gets the sections side by side; returns what is wrong, with {0}, {1}, ... in place of each
    option and its value, or None."""
    gives_way: tuple[str, ...] = ()
    """Options that return to their default if a later file, or the command line, gives one of the
    other options a value that breaks the rule."""

    def complaint(self, sections: Any) -> str:
        """Returns what is wrong, or ''."""
        text = self.complain(sections)
        return text.format(*(setting(sections, key) for key in self.keys)) if text else ""


Complain = Callable[[Any], "str | None"]
Condition = Callable[[Any], bool]
RULES: list[Rule] = []
"""Every rule of `settings.constraints` and `settings.mixture`, in the order of their lines."""


def rule(*keys: str, gives_way: tuple[str, ...] = ()) -> Callable[[Complain], Complain]:
    """Adds the decorated function to RULES as the rule between these options."""

    def add(complain: Complain) -> Complain:
        RULES.append(Rule(keys, complain, gives_way))
        return complain

    return add


def only_with(key: str, other: str, text: str) -> Callable[[Condition], Condition]:
    """Adds a rule: `key` keeps its default unless the decorated condition on `other` holds."""

    def add(holds: Condition) -> Condition:
        def complain(c: Any) -> str | None:
            return None if is_default(c, key) or holds(c) else text

        RULES.append(Rule((key, other), complain, gives_way=(key,)))
        return holds

    return add


def check_rules(
    rules: Iterable[Rule],
    sections: Any,
    origins: Mapping[str, Origin] | None = None,
    refused: Collection[str] = (),
) -> list[Problem]:
    """Returns each broken rule, at the place of the last value that it is about.

    origins: where options were given. refused: options whose value is not what the user meant; the
    rules about them are left out.
    """
    problems = []
    for rule in rules:
        text = "" if any(key in refused for key in rule.keys) else rule.complaint(sections)
        if text:
            # The last value given is the one that made the rule break: the place to look at first.
            places = {key: (origins or {}).get(key, Origin()) for key in rule.keys}
            last = max(places.values())
            others = [
                f"{key}: {place if place.source else 'default'}"
                for key, place in places.items()
                if place != last
            ]
            problems.append(Problem(last, text + (f" [{', '.join(others)}]" if others else "")))
    return problems


def find_superseded(
    rules: Sequence[Rule],
    sections: Any,
    origins: Mapping[str, Origin],
    refused: Collection[str] = (),
) -> tuple[str, str] | None:
    """Returns an option whose value breaks a rule only because a later layer gives another option,
    and that other option; None if there is none that may give way."""
    for rule in rules:
        candidates = [k for k in rule.gives_way if k in origins and not is_default(sections, k)]
        # A value that is wrong by itself is reported; nothing may follow from it.
        if not candidates or any(key in refused for key in rule.keys):
            continue
        if not rule.complaint(sections):
            continue
        # The oldest value gives way, and only to a newer layer: within one layer it is an error.
        layers = {key: origins.get(key, Origin()).layer for key in rule.keys}
        key, later = min(candidates, key=layers.__getitem__), max(layers, key=layers.__getitem__)
        if layers[key] < layers[later]:
            return key, later
    return None


def model_option_rules(options: Iterable[Option]) -> list[Rule]:
    """Returns a rule for each option that only some models have: others keep its default."""
    return [_model_option_rule(option) for option in options if option.models]


def _model_option_rule(option: Option) -> Rule:
    def complain(sections: Any) -> str | None:
        if sections.model.name in option.models or is_default(sections, option.key):
            return None
        return f"{{0}} is an option of {' and '.join(option.models)}, but {{1}}"

    return Rule((option.key, "model.name"), complain, gives_way=(option.key,))


def setting(sections: Any, key: str) -> str:
    """Returns 'section.option=value'."""
    value = _value(sections, key)
    if isinstance(value, tuple):  # a list: the names of its entries
        return f"{key}=[{', '.join(entry.name for entry in value)}]"
    return f"{key}={shareable(to_text(value))}"


def is_default(sections: Any, key: str) -> bool:
    """Returns whether 'section.option' has its default."""
    section, name = key.split(".")
    own = getattr(sections, section)
    return bool(getattr(own, name) == default_of(own, name))


def nearest_multiples(value: int, step: int) -> str:
    """Returns the multiples of `step` next to `value`, for a message: 'nearest: 248, 252'."""
    low = value // step * step
    return "nearest: " + ", ".join(str(number) for number in (low, low + step) if number > 0)


def _value(sections: Any, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(sections, section), name)
