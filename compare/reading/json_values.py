"""Values out of JSON or YAML that may hold anything: the wanted type, or an empty value of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def as_float(value: Any) -> float | None:
    """Returns a finite number as it is (an int stays one), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # The comparison is false for NaN. Ints of hundreds of digits, which JSON allows, are refused,
    # because dividing or formatting them would raise OverflowError.
    return value if abs(value) < 1e300 else None


def as_count(value: Any) -> int | None:
    """Returns an integer from 0 to 2^63 - 1, else None."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def as_str(value: Any) -> str:
    """Returns a string as one printable line, else ''."""
    line = " ".join(value.split()) if isinstance(value, str) else ""
    return line if line.isprintable() else ""


def as_path(value: Any) -> str:
    """Returns a string as it is if it can be the path or name of a file, else ''."""
    return value if isinstance(value, str) and "\0" not in value else ""


def as_dict(value: Any) -> Mapping[str, Any]:
    """Returns a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def finite(value: Any) -> Any:
    """Returns the value with null for infinity and NaN, which a damaged file may hold and JSON
    cannot."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
