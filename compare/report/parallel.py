"""Parallel coordinates: how the settings that vary go with the result, an axis each.

Places on an axis run from 0, at the bottom, to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from compare.report.tables import Column

_LOGARITHMIC = 10  # an axis whose largest value is so many times the smallest is logarithmic
_APART = 0.09  # of the height, between the texts of an axis
_REACH = 4  # results so many times as far from the best as the median are drawn at the top


def parallel(settings: Sequence[Column], result: Column) -> dict[str, Any] | None:
    """Returns the axes of groups that have a result, that of the result last; None if no setting
    varies among them.

    Settings that always change together, as a model and its options do, share an axis.
    """
    kept = [place for place, value in enumerate(result["values"]) if value is not None]
    axes = dict[tuple[int, ...], dict[str, Any]]()
    for column in settings:
        texts = [column["texts"][place] for place in kept]
        split = tuple(map(texts.index, texts))  # equal for settings that change together
        if len({*split}) < 2:
            continue
        if split in axes:
            axes[split]["also"].append(column["title"])
            continue
        values = [column["values"][place] for place in kept]
        numeric = all(value is not None for value in values)
        axes[split] = {
            "title": column["title"],
            "also": [],
            "texts": texts,
            **(_along_numbers(values) if numeric else _along_texts(texts)),
        }
    if not axes:
        return None
    texts = [result["texts"][place] for place in kept]
    last = _along_results([result["values"][place] for place in kept])
    title = {"title": result["title"], "also": [], "texts": texts}
    return {
        "groups": kept,
        "axes": [*axes.values(), title | last],
        "left_out": len(result["values"]) - len(kept),
    }


def _along_numbers(values: Sequence[float]) -> dict[str, Any]:
    logarithmic = min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC
    at = _scaled([math.log(value) if logarithmic else value for value in values])
    return {"at": at, "ticks": _ticks([(a, f"{v:.3g}") for a, v in zip(at, values, strict=True)])}


def _along_texts(texts: Sequence[str]) -> dict[str, Any]:
    order = sorted({*texts})
    places = {text: index / max(1, len(order) - 1) for index, text in enumerate(order)}
    ticks = _ticks([(place, text or "\u2013") for text, place in places.items()])
    return {"at": [places[text] for text in texts], "ticks": ticks}


def _along_results(values: Sequence[float]) -> dict[str, Any]:
    """Returns places of results. One run that diverged must not press all others together."""
    best = min(values)
    top = min(max(values), best + _REACH * (median(values) - best) or max(values))
    at = _scaled([min(value, top) for value in values])
    # Ticks at the results themselves would say that values between do not occur.
    spread = [best + part * (top - best) for part in (0, 0.25, 0.5, 0.75, 1)]
    digits = max(0, 2 - math.floor(math.log10(top - best))) if top > best else 4
    ticks = [
        (part, f"{value:.{digits}f}") for part, value in zip(_scaled(spread), spread, strict=True)
    ]
    if max(values) > top:
        ticks[-1] = (1.0, f"\u2265 {ticks[-1][1]}")
    return {"at": at, "ticks": ticks}


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [round((value - low) / (high - low), 4) if high > low else 0.5 for value in values]


def _ticks(known: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Returns the ends, and of the values between those whose texts do not touch."""
    first, *between, last = sorted({*known}) if len({*known}) > 1 else [known[0], known[0]]
    ticks = [first]
    for tick in between:
        if tick[0] - ticks[-1][0] >= _APART and last[0] - tick[0] >= _APART:
            ticks.append(tick)
    return [*ticks, last]
