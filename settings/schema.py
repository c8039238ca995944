"""What an option is: type, default, limits, meaning, and what a resume and a comparison make of it.

A section is a frozen dataclass whose fields are made by `option`. Reading, `--help`, the dump,
messages, resume and the comparison of runs follow from them: an option is written down once.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

LARGEST_INT = 2**63 - 1  # what torch and the checkpoint can hold
REQUIRED: Any = MISSING  # the default of an option that every entry of a list has to give

OnResume: TypeAlias = Literal["fixed", "explicit", "free", "split"]
"""What a resumed run may change.

fixed: another value is refused. In section model: saved weights decide it, pretrained ones too.
explicit: allowed where the checkpoint or run is named; `auto` takes it for another experiment.
free: allowed everywhere.
split: how a step is split into micro-batches; only the sequences per step count, as explicit.
"""
Effect: TypeAlias = Literal["none", "results", "eval_rows", "text"]
"""What another value does to a run's results.

none: nothing. results: it can change them. eval_rows: it also selects the evaluated rows, so that
two runs cannot be compared row by row. text: as eval_rows, and the run reads another text.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """The range of a number; None is open."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def allow(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def describe(self) -> str:
        """Returns '>= 1', '> 0', 'in [0, 1)' or '' for no limit."""
        low = self.ge if self.ge is not None else self.gt
        high = self.le if self.le is not None else self.lt
        if low is not None and high is not None:
            left, right = "[" if self.ge is not None else "(", "]" if self.le is not None else ")"
            return f"in {left}{low}, {high}{right}"
        if low is not None:
            return f"{'>=' if self.ge is not None else '>'} {low}"
        if high is not None:
            return f"{'<=' if self.le is not None else '<'} {high}"
        return ""


class Form(NamedTuple):
    """The shape of a text that is more than a list of choices."""

    text: str  # for people: 'auto, cpu, cuda or cuda:N'
    pattern: str  # a regular expression that the whole value matches


@dataclass(frozen=True, slots=True)
class Option:
    """One option of one section."""

    section: str
    name: str
    kind: type | None
    """bool, int, float or str; of a list, the dataclass of its entries; None where only `choices`
    are allowed."""
    choices: tuple[str, ...]
    optional: bool  # null is allowed
    default: Any
    doc: str = ""
    unit: str = ""
    limits: Limits = Limits()
    form: Form | None = None
    models: tuple[str, ...] = ()  # that have the option; () for all
    on_resume: OnResume = "explicit"
    fixed_if: Callable[[Any], bool] | None = None  # of the saved config: is it fixed after all?
    effect: Effect = "results"

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def entry_options(self) -> tuple[Option, ...]:
        """The options that each entry of a list has; () for an option with a single value."""
        is_list = self.kind is not None and issubclass(self.kind, Section)
        return section_options(self.kind) if is_list else ()

    def describe(self) -> str:
        """Returns type, range and unit in a few words, as `--help` and the dump show them."""
        if self.entry_options:
            return f"list of {{{', '.join(own.name for own in self.entry_options[:2])}, ...}}"
        words: dict[type | None, list[str]]
        words = {None: [], bool: ["bool"], int: ["int"], float: ["float"], str: ["text"]}
        kinds = [self.form.text] if self.form else words[self.kind]
        limits = self.limits.describe()
        kinds = [f"{kind} {limits}" for kind in kinds] if limits else kinds
        text = " | ".join([*kinds, *self.choices]) + (" or null" if self.optional else "")
        return f"{text}, {self.unit}" if self.unit else text


@dataclass(frozen=True, slots=True)
class Schema:
    """All sections and options of a config class, in the order in which they are declared."""

    sections: Mapping[str, type]
    options: Mapping[str, Option]  # by 'section.name'
    extra: Mapping[str, Option]  # options of other trainers, which no section has

    def find(self, key: str) -> Option | None:
        """Returns the option called 'section.name', or 'section.list.entry.name' of an entry, if
        there is one."""
        if key in self.options:
            return self.options[key]
        listed = self.list_of(key)
        if listed is not None:
            name = key.rpartition(".")[2]
            return next((own for own in listed.entry_options if own.name == name), None)
        return self.extra.get(key)

    def list_of(self, key: str) -> Option | None:
        """Returns the list that 'section.list.entry.name' or 'list.entry.name' is of, if any."""
        for option in self.options.values() if key.count(".") > 1 else ():
            if option.entry_options and key.startswith((f"{option.key}.", f"{option.name}.")):
                return option
        return None

    def in_section(self, section: str) -> list[Option]:
        """Returns the options of one section."""
        return [option for option in self.options.values() if option.section == section]

    def named(self, name: str) -> list[Option]:
        """Returns the options called `name`, in whatever section."""
        return [option for option in self.options.values() if option.name == name]


class Section:
    """Base of a section's dataclass; its class keywords say what holds for its options unless an
    option says otherwise."""

    section: ClassVar[str]
    on_resume: ClassVar[OnResume]
    effect: ClassVar[Effect]

    def __init_subclass__(cls, *, section: str, on_resume: OnResume, effect: Effect) -> None:
        cls.section, cls.on_resume, cls.effect = section, on_resume, effect


def option(
    default: Any,
    doc: str,
    *,
    models: tuple[str, ...] = (),
    on_resume: OnResume | None = None,
    fixed_if: Callable[[Any], bool] | None = None,
    effect: Effect | None = None,
    unit: str = "",
    form: Form | None = None,
    **limits: float,
) -> Any:
    """Returns a dataclass field with its meaning and limits (ge, gt, le, lt) attached.

    models: that have the option; () for all. on_resume, effect: None for those of its section.
    """
    metadata = {
        "doc": doc,
        "unit": unit,
        "limits": Limits(**limits),
        "form": form,
        "models": models,
        "on_resume": on_resume,
        "fixed_if": fixed_if,
        "effect": effect,
    }
    return field(default=default, metadata=metadata)


@cache
def section_options(section: Any) -> tuple[Option, ...]:
    """Returns the options of a section's dataclass, with what the section says for all of them."""
    hints = get_type_hints(section)
    found = []
    for item in fields(section):
        own = dict(item.metadata)
        own["on_resume"] = own["on_resume"] or section.on_resume
        own["effect"] = own["effect"] or section.effect
        kind = _read_hint(hints[item.name])
        found.append(Option(section.section, item.name, *kind, item.default, **own))
    return tuple(found)


def schema_of(sections: Mapping[str, Any], extra: Mapping[str, Option]) -> Schema:
    """Returns the schema of `sections` (name -> dataclass) and of `extra` options beside them."""
    options = [option for section in sections.values() for option in section_options(section)]
    return Schema(sections, {option.key: option for option in options}, extra)


def default_of(section: Any, name: str) -> Any:
    """Returns the default of an option of a section."""
    return getattr(type(section), name)  # where a dataclass keeps them


def entry_values(entry: Any) -> dict[str, Any]:
    """Returns an entry of a list as a dict, without the options that it leaves out."""
    return {name: value for name, value in asdict(entry).items() if value is not None}


def title(section_class: type[Any]) -> str:
    """Returns the first line of a section's docstring."""
    return (section_class.__doc__ or "").strip().splitlines()[0]


def extra_option(key: str, takes: Any, **limits: float) -> Option:
    """Returns an option that is in no section; `takes` is its type, as in a dataclass."""
    section, name = key.split(".", 1)
    return Option(section, name, *_read_hint(takes), default=None, limits=Limits(**limits))


def _read_hint(hint: Any) -> tuple[type | None, tuple[str, ...], bool]:
    if get_origin(hint) is tuple:
        return get_args(hint)[0], (), False
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = tuple(c for part in parts if get_origin(part) is Literal for c in get_args(part))
    kinds = [part for part in parts if part in (bool, int, float, str)]
    optional = type(None) in parts
    # Any other annotation would silently lose a part: it is a mistake in config.py.
    assert len(kinds) + bool(choices) + optional == len(parts) and len(kinds) <= 1, hint
    return (kinds[0] if kinds else None), choices, optional
