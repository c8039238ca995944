"""What the report says and shows, as plain values: the best run, tables, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from compare import differences
from compare.curves import AXES, COLOURS, DARK_COLOURS
from compare.labels import labels, names, short_names
from compare.reading.json_values import as_float
from compare.reading.run import Run
from compare.report.run_content import panels, run_content
from compare.report.text import progress_text, utf8_text, value_text
from compare.statistics.paired import PairedDifference, compare_runs
from settings.formatting import format_count, format_duration

_MAX_NAMED = 6  # options named in the answer


@dataclass(frozen=True)
class Measure:
    """By which value runs are ranked; the lowest is best."""

    name: str
    value: Callable[[Run], float | None]


LOSS = Measure("held-out loss", lambda run: run.best_loss)
BITS = Measure("bits per byte", lambda run: run.bits_per_byte)
UNRANKED = Measure("", lambda run: None)


def report(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the content of the page; its runs are in order, the best first."""
    runs, measure = ranked(runs)
    run_labels = labels(runs)
    count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    headline, answer = _answer(runs, run_labels, measure)
    titles = zip(names(runs), run_labels, short_names(runs), strict=True)
    return {
        "overline": f"Report of {count}",
        "headline": headline,
        "answer": answer + (_comparison(runs, run_labels) if len(runs) > 1 else []),
        "footer": f"Written {datetime.now():%Y-%m-%d %H:%M} by runs.py report. This page holds "
        "all it shows and loads nothing.",
        "colours": {"light": COLOURS, "dark": DARK_COLOURS},
        "axes": {key: title.capitalize() for key, title in AXES.items()},
        "panels": panels(runs),
        "runs": [
            run_content(run, utf8_text(name))
            | {"name": utf8_text(name), "label": utf8_text(label), "short_name": utf8_text(rest)}
            for run, (name, label, rest) in zip(runs, titles, strict=True)
        ],
        "columns": _columns(runs),
        "pairs": [_pair(place, runs[0], run) for place, run in enumerate(runs[1:], 1)],
        "pairs_note": f"Held-out loss of each run minus that of {run_labels[0]}, batch by batch "
        "over the same text, each at its best evaluation, with the 95 % interval of the mean. An "
        "interval that touches the dotted line shows no difference. It speaks for this kind of "
        "text, not for other seeds.",
        "contexts": _contexts(runs) if len(runs) > 1 else [],
    }


# ---- the answer


def ranked(runs: Sequence[Run]) -> tuple[list[Run], Measure]:
    """Returns the runs, best first, and the measure that ranks them.

    Losses per token compare only between runs with one tokenizer, bits per byte between all runs
    that were evaluated on the same text.
    """
    if differences.texts_differ(runs):
        return list(runs), UNRANKED
    bits_known = all(run.bits_per_byte is not None for run in runs)
    measure = BITS if _several_tokenizers(runs) and bits_known else LOSS

    def sort_key(run: Run) -> tuple[bool, float]:
        value = measure.value(run)
        return (True, 0.0) if value is None else (False, value)

    return sorted(runs, key=sort_key), measure


def _several_tokenizers(runs: Sequence[Run]) -> bool:
    return len({run.config.get("tokenizer.name") for run in runs}) > 1


def _answer(
    runs: Sequence[Run], run_labels: Sequence[str], measure: Measure
) -> tuple[str, list[str]]:
    """Returns the headline and the sentence below it."""
    values = [measure.value(run) for run in runs]
    count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    best = f"{measure.name} {_four_digits(values[0])}"
    if measure is UNRANKED:
        headline = f"{count} on different text: none is best"
        return headline, ["Losses on different held-out text do not compare."]
    if values[0] is None:  # then the others are unknown too: the runs are ranked
        evaluating = [run.config.get("training.test_freq", True) is not None for run in runs]
        running = [run.state == "running" for run in runs]
        coming = any(a and b for a, b in zip(evaluating, running, strict=True))
        headline = f"{count}, none evaluated{' yet' if coming else ''}"
        never = ["training.test_freq is null: they are trained without evaluations."]
        return (
            headline if len(runs) > 1 else f"{run_labels[0]}: no evaluation",
            [] if any(evaluating) else never,
        )
    if len(runs) == 1:
        lowest = f"Its lowest, at step {runs[0].best_step or 0:,}; {progress_text(runs[0])}."
        return f"{run_labels[0]}: {best}", [lowest]
    second = values[1]
    lead = [] if second is None else [_lead(runs, run_labels[1], measure, second - values[0])]
    return f"Best: {run_labels[0]}, with {best}", lead


def _lead(runs: Sequence[Run], second: str, measure: Measure, lead: float) -> str:
    """Returns by how much the best run leads the second, and whether that is more than noise."""
    if measure is BITS:
        return (
            f"{lead:.4f} bits per byte below {second}. Their tokenizers differ, so "
            "losses per token do not compare."
        )
    # Being ranked first says little: the interval decides whether the sentence claims a difference.
    pair = compare_runs(runs[0], runs[1], "best")
    if isinstance(pair, str):
        loss = _four_digits(runs[1].best_loss)
        return f"{lead:.4f} below {second} ({loss}); no interval: {pair}."
    interval = f"95 % interval {pair.low:.4f} to {pair.high:.4f}, over {pair.batches} batches"
    if pair.low > 0:
        return f"{pair.difference:.4f} below {second} ({interval})."
    return f"Not told apart from {second}: its loss is {pair.difference:.4f} higher ({interval})."


def _comparison(runs: Sequence[Run], run_labels: Sequence[str]) -> list[str]:
    """Returns the sentences about the differences of several runs."""
    options = [_option(key) for key in differences.differing_options(runs)]
    if len(options) > _MAX_NAMED:
        options[_MAX_NAMED:] = [f"{len(options) - _MAX_NAMED} more"]
    listed = " and ".join(filter(None, (", ".join(options[:-1]), *options[-1:])))
    running = [label for label, run in zip(run_labels, runs, strict=True) if run.state == "running"]
    return [
        f"They differ in {listed}." if listed else "Their settings are the same.",
        *([f"Still running: {'; '.join(running)}."] if running else []),
    ]


def _four_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# ---- tables


def _columns(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the state and the best loss, then the settings that differ, then other results."""
    results, settings = _results(runs), _settings(runs) if len(runs) > 1 else []
    # The newest losses repeat the best ones if all runs ended at their best.
    _, best, newest, *_ = results
    repeated = {newest["title"]} if newest["texts"] == best["texts"] else set()
    repeated |= {"Model"} if any(column["title"] == "model" for column in settings) else set()
    results = [column for column in results if column["title"] not in repeated]
    return [*results[:2], *settings, *results[2:]]


def _option(key: str) -> str:
    """Returns an option's name in a word: `model.name` is the model."""
    section, _, name = key.partition(".")
    return section if name == "name" else name


def _results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    losses, bits = [run.best_loss for run in runs], [run.bits_per_byte for run in runs]
    steps = ["" if run.best_step is None else f"at step {run.best_step:,}" for run in runs]
    speeds = [run.tokens_per_sec for run in runs]
    other_text = differences.texts_differ(runs)
    lowest_loss = None if other_text or _several_tokenizers(runs) else min
    states = [run.state for run in runs]
    newest = [run.last_loss for run in runs]
    times = [as_float(run.newest.get("time")) for run in runs]
    return [
        _text_column("State", [progress_text(run) for run in runs]) | {"states": states},
        _column("Held-out loss, best", losses, _four_digits, lowest_loss) | {"notes": steps},
        _column("Held-out loss, newest", newest, _four_digits, lowest_loss),
        _column("Bits per byte", bits, _four_digits, None if other_text else min),
        _column("Tokens/s", speeds, lambda speed: f"{speed:,.0f}", max),
        _column("Tokens", [run.tokens for run in runs], format_count),
        _column("Time", times, format_duration),
        _text_column("Model", [run.model for run in runs]),
        _column("Parameters", [run.parameters for run in runs], format_count),
        _text_column("Precision", [run.precision for run in runs]),
    ]


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the options that differ, each marked where it is not as in the first run."""
    columns = []
    for key, values in differences.differing_options(runs).items():
        texts = ["" if value == differences.MISSING else value_text(value) for value in values]
        column = _column(_option(key), [as_float(value) for value in values], value_text)
        section = {"group": "Settings", "section": key.partition(".")[0]}
        others = {"others": [text != texts[0] for text in texts]}
        columns.append(column | section | {"texts": texts} | others)
    return columns


def _text_column(title: str, texts: Sequence[str]) -> dict[str, Any]:
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
    values: Sequence[float | None],
    show: Callable[[float], str],
    better: Callable[..., float] | None = None,
) -> dict[str, Any]:
    """Returns a column of numbers, which the page sorts by and aligns to the right.

    better: `min` or `max`, which picks the best; None if no run is best.
    """
    known = [value for value in values if value is not None]
    column = _text_column(title, ["" if value is None else show(value) for value in values])
    best = values.index(better(known)) if better and len({*known}) > 1 else None
    return column | {"values": [*values], "best": best, "numeric": bool(known)}


def _pair(place: int, first: Run, run: Run) -> dict[str, Any]:
    """Returns the paired comparison with the first run; `low` is None if there is none."""
    pair = compare_runs(first, run, "best")
    if not isinstance(pair, PairedDifference):
        return {"run": place, "low": None, "verdict": pair}
    return {
        "run": place,
        "difference": pair.difference,
        "low": pair.low,
        "high": pair.high,
        "text": f"{pair.difference:+.4f}",
        "interval": f"{pair.low:+.4f} to {pair.high:+.4f}",
        "verdict": pair.verdict,
        "where": f"{pair.batches} batches, steps {pair.step_a:,} and {pair.step_b:,}",
        "sources": [
            f"On {utf8_text(name)} {own.difference:+.4f} ({own.low:+.4f} to {own.high:+.4f}): "
            f"{own.verdict}"
            for name, own in pair.sources.items()
        ],
    }


def _contexts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    rows = differences.differing_environment(runs)
    rows |= {f"data {key}": row for key, row in differences.differing_data(runs).items()}
    return [(key, [value_text(value) for value in row]) for key, row in rows.items()]
