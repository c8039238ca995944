"""Which option a written name means: canonical, alias, still to come, or the nearest guess."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from settings import dialects
from settings.schema import Schema
from settings.values import RefusedError, shown


@dataclass(frozen=True, slots=True)
class Target:
    """What a name stands for. Several keys: a list gives one value to each."""

    keys: tuple[str, ...] = ()
    ignored: str = ""  # the reason why the name has no effect
    is_alias: bool = False


def resolve(schema: Schema, written: str) -> Target:
    """Return the target of 'name' or 'section.name'; raises RefusedError with the nearest name."""
    head, dot, name = written.partition(".")
    for ignored in (head, written):
        if ignored in dialects.IGNORED:
            return Target(ignored=dialects.IGNORED[ignored])
    full = f"{dialects.SECTIONS.get(head, head)}.{name}" if dot else written
    if schema.find(full) or schema.announces(full):
        return Target((full,), is_alias=full != written)
    if full in dialects.LISTS:
        return Target(dialects.LISTS[full], is_alias=True)
    if full in dialects.TARGETS:
        key = dialects.TARGETS[full]
        return Target((key,), is_alias=not key.endswith(f".{full}"))
    return _resolve_dotted(schema, full) if dot else _resolve_bare(schema, full)


def is_section(schema: Schema, name: str) -> bool:
    """Return whether a mapping may stand under this top-level name."""
    name = dialects.SECTIONS.get(name, name)
    homes = {home for home, _ in _outside(schema)}
    aliases = any(alias.startswith(f"{name}.") for alias in dialects.TARGETS)
    return name in schema.sections or name in homes or aliases


def check_section(schema: Schema, name: str) -> None:
    """Raise RefusedError, with the nearest name, unless `name` is a section."""
    if is_section(schema, name):
        return
    if schema.named(name) or name in dialects.TARGETS:
        raise RefusedError(f"{name}: is an option, not a section; got a section")
    near = _nearest(name, {section: section for section in schema.sections})
    raise RefusedError(
        f"{_short(name)}: unknown section. {near or 'Sections: ' + ', '.join(schema.sections)}"
    )


def _resolve_dotted(schema: Schema, full: str) -> Target:
    section, name = full.split(".", 1)
    target = dialects.TARGETS.get(name)
    if target is not None and target.startswith(f"{section}."):
        return Target((target,), is_alias=True)
    check_section(schema, section)
    if name in schema.sections:
        raise RefusedError(f"{full}: {name} is a section. Start its line at the first column")
    homes = [option.section for option in schema.named(name)]
    if homes:
        raise RefusedError(f"{full}: unknown option. It belongs in section {' or '.join(homes)}")
    inside = {option.name: option.name for option in schema.in_section(section)}
    inside |= {name: name for home, name in _outside(schema) if home == section}
    for alias, key in dialects.TARGETS.items():
        if key.startswith(f"{section}.") and "." not in alias and key in schema.options:
            inside[alias] = key.split(".")[1]
    near = _nearest(name, inside) or guess(schema, name)
    raise RefusedError(f"{_short(full)}: unknown option. {near}")


def _resolve_bare(schema: Schema, name: str) -> Target:
    keys = [option.key for option in schema.named(name)]
    keys = keys or [f"{home}.{other}" for home, other in _outside(schema) if other == name]
    if len(keys) == 1:
        return Target((keys[0],))
    if keys:
        raise RefusedError(f"{name}: names several options. Write one of {', '.join(keys)}")
    if is_section(schema, name):
        raise RefusedError(f"{name}: is a section. Write {name}.OPTION=value")
    raise RefusedError(f"{_short(name)}: unknown option. {guess(schema, name)}")


def guess(schema: Schema, word: str) -> str:
    """Return what to write for `word`, 'Did you mean section.option?' or where to look."""
    hint = dialects.HINTS.get(word.lower().replace("-", "_"))
    return hint or _nearest(word, _bare_names(schema)) or "See python train.py --help"


def _outside(schema: Schema) -> list[tuple[str, str]]:
    """Return section and name of each option that is in no dataclass."""
    keys = (key.split(".", 1) for key in (*schema.later, *schema.foreign))
    return [(section, name) for section, name in keys]


def _bare_names(schema: Schema) -> dict[str, str]:
    names = {option.name: key for key, option in {**schema.foreign, **schema.options}.items()}
    aliases = {name: key for name, key in dialects.TARGETS.items() if key in schema.options}
    return {**aliases, **names}


def _nearest(name: str, candidates: dict[str, str]) -> str:
    """Return 'Did you mean x?' for the candidate nearest to `name`, or ''."""
    near = difflib.get_close_matches(name[:100].lower(), candidates, 1)
    return f"Did you mean {candidates[near[0]]}?" if near else ""


def _short(name: str) -> str:
    return name if name.isprintable() and len(name) <= 60 else shown(name)
