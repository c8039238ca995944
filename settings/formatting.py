"""Numbers as people read them: counts, bytes, durations. Used by every folder; imports nothing."""

from __future__ import annotations

_COUNT_UNITS = ("", " k", " M", " B", " T")
_SI_UNITS = (" ", " k", " M", " G", " T")


def format_count(number: float) -> str:
    """Returns three digits and a unit: `950`, `12.3 k`, `25.3 M`, `1.24 B`."""
    return _scaled(number, _COUNT_UNITS)


def format_si(number: float, unit: str) -> str:
    """Returns three digits and a unit with its SI prefix: `950 FLOP`, `12.3 GFLOP/s`."""
    return _scaled(number, _SI_UNITS) + unit


def format_bytes(number: float) -> str:
    """Returns `950 B`, `25.3 MB` or `1.24 GB`, with decimal prefixes."""
    return format_si(number, "B")


def format_duration(seconds: float) -> str:
    """Returns `45s`, `4m03s`, `2h05m` or `3d04h`."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02}m"
    return f"{total // 86400}d{total % 86400 // 3600:02}h"


def format_plural(count: int, noun: str) -> str:
    """Returns `1 save`, `2 saves` or `1,200 saves`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < 999.5:  # 999.7 would round to 1e+03
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"
