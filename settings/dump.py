"""Write a config as YAML: every option, section by section, each with its meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from settings.schema import Schema, title
from settings.terminal import printable
from settings.values import to_text

_VALUE_COLUMN = 34


def dump(
    schema: Schema, values: Mapping[str, Mapping[str, Any]], header: Sequence[str] = ()
) -> str:
    """Return YAML below `header` comment lines; what is read back equals `values`."""
    lines = [f"# {printable(' '.join(line.split()))}".rstrip() for line in header]
    for section, section_class in schema.sections.items():
        if lines:
            lines.append("")
        lines += [f"# {title(section_class)}", f"{section}:"]
        for option in schema.in_section(section):
            setting = f"  {option.name}: {to_text(values[section][option.name])}"
            meaning = f"{option.doc} ({option.describe()})"
            lines.append(f"{setting:<{_VALUE_COLUMN}}  # {meaning}")
    return "\n".join(lines) + "\n"
