"""The tables of the page: results and settings of each group, and where machines and data differ.

A column has one text and one value per group. A group of several runs shows their mean and standard
deviation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from compare import differences
from compare.groups import RunGroup, Spread
from compare.reading.json_values import as_float
from compare.reading.run import Run
from compare.report.text import progress_text, utf8_text, value_text
from settings.formatting import format_count, format_duration

Column = dict[str, Any]
BEST_LOSS, BITS_PER_BYTE = "Held-out loss, best", "Bits per byte"


def columns_of(groups: Sequence[RunGroup]) -> list[Column]:
    """Returns the best loss and the state, then the settings that differ, then other results."""
    results, settings = _results(groups), settings_of(groups)
    # The newest losses repeat the best ones if all runs ended at their best.
    _, best, newest, *_ = results
    repeated = {newest["title"]} if newest["texts"] == best["texts"] else set()
    repeated |= {"Model"} if any(column["title"] == "model" for column in settings) else set()
    results = [column for column in results if column["title"] not in repeated]
    return [results[1], results[0], *settings, *results[2:]]


def spread_of(group: RunGroup, value: Callable[[Run], float | None]) -> Spread | None:
    """Returns the mean and deviation over the runs that have the value."""
    return Spread.of([known for run in group.runs if (known := value(run)) is not None])


def option_title(key: str) -> str:
    """Returns an option's name in a word: `model.name` is the model."""
    section, _, name = key.partition(".")
    return section if name == "name" else name


def several_tokenizers(groups: Sequence[RunGroup]) -> bool:
    """Returns whether losses per token do not compare, for tokens differ."""
    return len({run.config.get("tokenizer.name") for group in groups for run in group.runs}) > 1


def settings_of(groups: Sequence[RunGroup]) -> list[Column]:
    """Returns the options in which groups differ, each marked where it is not as in the first."""
    over = {key for group in groups for key in group.over}
    columns = []
    for key, values in differences.differing_options([group.runs[0] for group in groups]).items():
        if key in over:
            continue
        texts = ["" if value == differences.MISSING else value_text(value) for value in values]
        numbers = [as_float(value) for value in values]
        columns.append(
            _text_column(option_title(key), texts)
            | {"group": "Settings", "section": key.partition(".")[0], "values": numbers}
            | {"numeric": any(number is not None for number in numbers)}
            | {"others": [text != texts[0] for text in texts]}
        )
    return columns


def contexts_of(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns versions, machine and data that differ, with the value of each run."""
    rows = differences.differing_environment(runs)
    rows |= {f"data {key}": row for key, row in differences.differing_data(runs).items()}
    return [(key, [value_text(value) for value in row]) for key, row in rows.items()]


def _results(groups: Sequence[RunGroup]) -> list[Column]:
    other_text = differences.texts_differ([run for group in groups for run in group.runs])
    lowest_loss = None if other_text or several_tokenizers(groups) else min
    states = [{run.state for run in group.runs} for group in groups]

    def column(
        title: str,
        value: Callable[[Run], float | None],
        show: Callable[[float], str],
        better: Callable[..., float] | None = None,
    ) -> Column:
        return _column(title, [spread_of(group, value) for group in groups], show, better)

    return [
        _text_column("State", [_state(group) for group in groups])
        | {"states": [own.pop() if len(own) == 1 else "" for own in states]},
        column(BEST_LOSS, lambda run: run.best_loss, _four_digits, lowest_loss)
        | {"notes": [_best_steps(group) for group in groups]},
        column("Held-out loss, newest", lambda run: run.last_loss, _four_digits, lowest_loss),
        column(
            BITS_PER_BYTE, lambda run: run.bits_per_byte, _four_digits, None if other_text else min
        ),
        column("Tokens/s", lambda run: run.tokens_per_sec, lambda speed: f"{speed:,.0f}", max),
        column("Tokens", lambda run: run.tokens, format_count),
        column("Time", lambda run: as_float(run.newest.get("time")), format_duration),
        _text_column("Model", [_joined(group, lambda run: run.model) for group in groups]),
        column("Parameters", lambda run: run.parameters, format_count),
        _text_column("Precision", [_joined(group, lambda run: run.precision) for group in groups]),
    ]


def _state(group: RunGroup) -> str:
    progress = {progress_text(run) for run in group.runs}
    if len(progress) == 1:
        return progress.pop()
    counts = Counter(run.state for run in group.runs)
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _best_steps(group: RunGroup) -> str:
    """Returns at which steps the runs were best, and whether all have an evaluation."""
    steps = [run.best_step for run in group.runs if run.best_step is not None]
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    text = f"at step {first:,}" if first == last else f"at steps {first:,} to {last:,}"
    known = len([run for run in group.runs if run.best_loss is not None])
    return text if known == len(group.runs) else f"of {known} of {group.size}, {text}"


def _joined(group: RunGroup, value: Callable[[Run], str]) -> str:
    return ", ".join(dict.fromkeys(value(run) for run in group.runs))


def _text_column(title: str, texts: Sequence[str]) -> Column:
    return {
        "group": "Results",
        "section": "",
        "title": title,
        "texts": [*map(utf8_text, texts)],
        "values": [None] * len(texts),
        "best": None,
        "numeric": False,
    }


def _column(
    title: str,
    spreads: Sequence[Spread | None],
    show: Callable[[float], str],
    better: Callable[..., float] | None,
) -> Column:
    """Returns a column of numbers, which the page sorts by and aligns to the right.

    better: `min` or `max`, which picks the best mean; None if none is best.
    """
    means = [None if spread is None else spread.mean for spread in spreads]
    known = [mean for mean in means if mean is not None]
    column = _text_column(title, ["" if each is None else _shown(each, show) for each in spreads])
    best = means.index(better(known)) if better and len({*known}) > 1 else None
    return column | {"values": means, "best": best, "numeric": bool(known)}


def _shown(spread: Spread, show: Callable[[float], str]) -> str:
    return spread.text(show) if spread.deviation > 0 else show(spread.mean)  # also without one, NaN


def _four_digits(value: float) -> str:
    return f"{value:.4f}"
