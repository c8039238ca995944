"""The report: one HTML page that holds all it needs and asks no network for anything.

The one idea: Python computes what is said and shown, as JSON; `page.js` beside this file sets it as
text. The page's policy allows exactly the two scripts it was written with, by their hashes, and no
request, so that the name of a run or a sample cannot become code. The curves are Plotly's.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from compare import differences, paired
from compare.curves import AXES, COLOURS, DARK_COLOURS, curve, described, metrics_of
from compare.labels import labels, names, short_names
from compare.output import check_folder, write
from compare.records import number
from compare.run import Run, restart_command
from config import ConfigError
from settings.formatting import format_count, format_duration

_TEMPLATE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_ZERO = {"train/tokens_per_sec", "train/memory_bytes", "train/data_wait", "train/mfu"}
_UNDRAWN = {  # told by others, or one number each
    "train/iter_time_ms",
    "train/compile_s",
    "train/fp8_products",
    "eval/train_loss",
    "eval/seconds",
    "final/train_loss",
    "final/val_loss",
}
_DIGITS = 6


def write_report(runs: Sequence[Run], output: Path) -> None:
    """Writes the page about one run or several; raises ConfigError without plotly, WriteError."""
    check_folder(output)
    write(output, page(runs).encode())


def page(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("the report needs plotly: pip install plotly") from None
    content = report(runs)
    scripts = [script_text(get_plotlyjs()), script_text(_asset(".js"))]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    parts = {
        "policy": _POLICY.format(scripts=hashes),
        "title": html.escape(_plain(content["headline"])),
        "style": _asset(".css"),
        "data": data_text(content),
        "plotly": scripts[0],
        "script": scripts[1],
    }
    # In one pass: what is put in may contain the marks of others.
    return re.sub("@([a-z]+)@", lambda mark: parts[mark[1]], _asset(".html"))


def data_text(content: Any) -> str:
    """JSON that can stand in a script element: no markup, no line ends of other kinds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def script_text(source: str) -> str:
    """A script as a browser will read it back, so that its hash is right."""
    return source.replace("\r\n", "\n").replace("</script>", "<\\/script>")


def report(runs: Sequence[Run]) -> dict[str, Any]:
    """All that the page says and draws, the best run first."""
    runs, measure = ranked(runs)
    told = labels(runs)
    return {
        **_answer(runs, told, measure),
        "best": 0 if measure(runs[0]) is not None else None,
        "footer": f"Written {datetime.now():%Y-%m-%d %H:%M} by runs.py report. This page holds "
        "all it shows and loads nothing.",
        "colours": {"light": COLOURS, "dark": DARK_COLOURS},
        "axes": {key: title.capitalize() for key, title in AXES.items()},
        "panels": _panels(runs),
        "runs": [
            _run(run, name) | {"label": _plain(label), "time": _plain(time)}
            for run, name, label, time in zip(
                runs, names(runs), told, short_names(runs), strict=True
            )
        ],
        "columns": _columns(runs),
        "pairs": _pairs(runs),
        "pairs_told": _pairs_told(told[0]),
        "contexts": _contexts(runs),
    }


# ---- the answer


Measure = Callable[[Run], float | None]


def _several_tokenizers(runs: Sequence[Run]) -> bool:
    return len({run.config.get("tokenizer.name") for run in runs}) > 1


def _nothing(run: Run) -> None:
    return None


def _best_loss(run: Run) -> float | None:
    return run.best_loss


def _bits(run: Run) -> float | None:
    return run.bits_per_byte


def ranked(runs: Sequence[Run]) -> tuple[list[Run], Measure]:
    """The runs, best first, and what they are ordered by: the lowest held-out loss, or, where
    their tokenizers differ, bits per byte; nothing where their texts differ."""
    if differences.texts_differ(runs):
        return list(runs), _nothing
    bits_known = all(_bits(run) is not None for run in runs)
    measure: Measure = _bits if _several_tokenizers(runs) and bits_known else _best_loss

    def order(run: Run) -> tuple[bool, float]:
        value = measure(run)
        return value is None, 0.0 if value is None else value

    return sorted(runs, key=order), measure


def _answer(runs: Sequence[Run], told: Sequence[str], measure: Measure) -> dict[str, Any]:
    what = "bits per byte" if measure is _bits else "held-out loss"
    known = [run for run in runs if measure(run) is not None]
    counted = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    said: list[str] = []
    if measure is _nothing:
        headline = f"{counted} on different text: none is best"
        said.append("Losses on different held-out text do not compare.")
    elif not known:
        coming = any(run.state == "running" and _evaluates(run) for run in runs)
        none = "none evaluated yet" if coming else "none evaluated"
        headline = f"{counted}, {none}" if len(runs) > 1 else f"{told[0]}: no evaluation"
        if not any(map(_evaluates, runs)):
            said.append("training.test_freq is null: they are trained without evaluations.")
    elif len(runs) == 1:
        headline = f"{told[0]}: {what} {_figure(measure(runs[0]))}"
        said.append(f"Its lowest, at step {runs[0].best_step or 0:,}; {_state(runs[0])}.")
    else:
        headline = f"Best: {told[0]}, with {what} {_figure(measure(runs[0]))}"
        if len(known) > 1:
            said.append(_runner_up(runs, told, measure))
    if len(runs) > 1:
        keys = [_option(key) for key in differences.differing(runs)]
        said.append(f"They differ in {_listed(keys)}." if keys else "Their settings are the same.")
        going = [label for label, run in zip(told, runs, strict=True) if run.state == "running"]
        said += [f"Still running: {'; '.join(going)}."] if going else []
    return {"headline": headline, "answer": said, "overline": f"Report of {counted}"}


def _evaluates(run: Run) -> bool:
    """Whether it is evaluated at times; also where its config cannot be read."""
    return run.config.get("training.test_freq", True) is not None


def _runner_up(runs: Sequence[Run], told: Sequence[str], measure: Measure) -> str:
    first, second = measure(runs[0]), measure(runs[1])
    assert first is not None and second is not None
    if measure is _bits:
        return (
            f"{second - first:.4f} bits per byte below {told[1]}. Their tokenizers differ, so "
            "losses per token do not compare."
        )
    pair = paired.compare(runs[0], runs[1], "best")
    if isinstance(pair, str):
        return f"{second - first:.4f} below {told[1]} ({_figure(second)}); no interval: {pair}."
    interval = f"{_interval(pair)}, over {pair.batches} batches"
    if pair.low > 0:
        return f"{pair.difference:.4f} below {told[1]} ({interval})."
    return f"Not told apart from {told[1]}: its loss is {pair.difference:.4f} higher ({interval})."


def _interval(pair: paired.Paired) -> str:
    return f"95 % interval {pair.low:.4f} to {pair.high:.4f}"


def _listed(words: Sequence[str], most: int = 6) -> str:
    shown = [*words[:most]]
    if len(words) > most:
        shown.append(f"{len(words) - most} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# ---- tables


def _columns(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What comes out first, what went in beside it, then the rest."""
    results, settings = _results(runs), _settings(runs)
    known = {column["title"] for column in settings}
    said_twice = {"Model"} if "model" in known else set()
    newest = results[2]
    if newest["texts"] == results[1]["texts"]:
        said_twice.add(newest["title"])
    shown = [column for column in results if column["title"] not in said_twice]
    return [*shown[:2], *settings, *shown[2:]]


def _option(key: str) -> str:
    """An option in a word or two: `model.name` is the model."""
    section, _, name = key.partition(".")
    return section if name == "name" else name


def _results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    losses, bits = [run.best_loss for run in runs], [run.bits_per_byte for run in runs]
    at = ["" if run.best_step is None else f"at step {run.best_step:,}" for run in runs]
    speeds = [run.tokens_per_sec for run in runs]
    other_texts = differences.texts_differ(runs)
    lowest = None if _several_tokenizers(runs) or other_texts else min  # they do not compare
    return [
        _column("State", [_state(run) for run in runs]) | {"states": [run.state for run in runs]},
        _numbers("Held-out loss, best", losses, _figure, lowest) | {"notes": at},
        _numbers("Held-out loss, newest", [run.last_loss for run in runs], _figure, lowest),
        _numbers("Bits per byte", bits, _figure, None if other_texts else min),
        _numbers("Tokens/s", speeds, lambda speed: f"{speed:,.0f}", max),
        _numbers("Tokens", [run.tokens for run in runs], format_count),
        _numbers("Time", [number(run.last.get("time")) for run in runs], format_duration),
        _column("Model", [run.model for run in runs]),
        _numbers("Parameters", [run.parameters for run in runs], format_count),
        _column("Precision", [run.precision for run in runs]),
    ]


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The options that differ, each marked where it is other than in the first run."""
    columns = []
    for key, values in differences.differing(runs).items() if len(runs) > 1 else ():
        section, title = key.partition(".")[0], _option(key)
        texts = [value_text(value) for value in values]
        column = _numbers(title, [number(value) for value in values], value_text)
        others = [text != texts[0] for text in texts]
        own = {"group": "Settings", "section": section, "texts": texts, "others": others}
        columns.append(column | own)
    return columns


def _column(title: str, texts: Sequence[str]) -> dict[str, Any]:
    blank = {"section": "", "best": None, "numeric": False, "values": [None] * len(texts)}
    return {"group": "Results", "title": title, "texts": [*map(_plain, texts)], **blank}


def _numbers(
    title: str,
    values: Sequence[float | None],
    write: Callable[[float], str],
    better: Callable[..., float] | None = None,
) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    best = values.index(better(known)) if better and len({*known}) > 1 else None
    column = _column(title, ["" if value is None else write(value) for value in values])
    numeric = len(known) == len(values) - sum(text == "" for text in column["texts"])
    return column | {"values": [*values], "best": best, "numeric": bool(known) and numeric}


def _state(run: Run) -> str:
    planned = run.planned_steps
    whole = planned is None or planned <= run.step
    steps = f"{run.step:,} steps" if whole else f"{run.step:,} of {planned:,} steps"
    return f"{run.state}, {steps}"


def value_text(value: Any) -> str:
    """A value of YAML or JSON as one writes it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "\n".join(map(value_text, value))
    return _plain(value) if isinstance(value, str) else json.dumps(value)


def _plain(text: str) -> str:
    """Text without what has no encoding: half characters, as in names that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _pairs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every run against the first."""
    shown = []
    for index, run in enumerate(runs[1:], 1):
        pair = paired.compare(runs[0], run, "best")
        blank = {"run": index, "low": None, "verdict": pair}
        shown.append(blank if isinstance(pair, str) else _pair(index, pair))
    return shown


def _pair(index: int, pair: paired.Paired) -> dict[str, Any]:
    return {
        "run": index,
        "difference": pair.difference,
        "low": pair.low,
        "high": pair.high,
        "text": f"{pair.difference:+.4f}",
        "interval": f"{pair.low:+.4f} to {pair.high:+.4f}",
        "verdict": pair.verdict,
        "where": f"{pair.batches} batches, steps {pair.step_a:,} and {pair.step_b:,}",
    }


def _pairs_told(best: str) -> str:
    return (
        f"Held-out loss of each run minus that of {best}, batch by batch over the same text, "
        "each at its best evaluation, with the 95 % interval of the mean. An interval that touches "
        "the dotted line shows no difference. It speaks for this kind of text, not for other seeds."
    )


def _contexts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    if len(runs) < 2:
        return []
    found = differences.differing_environment(runs)
    data = differences.differing_data(runs)
    found |= {f"data {key}": values for key, values in data.items()}
    return [(key, [value_text(value) for value in values]) for key, values in found.items()]


# ---- curves


def _panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    known = [metric for metric in metrics_of(runs) if metric not in _UNDRAWN]
    both = [metric for metric in ("train/loss", "eval/val_loss") if metric in known]
    rest = [(metric,) for metric in known if metric not in both]
    return [_panel(metrics) for metrics in ([tuple(both)] if both else []) + rest]


def _panel(metrics: tuple[str, ...]) -> dict[str, Any]:
    last = described(metrics[-1])
    title = "Loss" if len(metrics) > 1 else last.title
    return {
        "title": title,
        "label": f"{title} over the run, one curve per run",
        "unit": last.unit,
        "scale": last.scale,
        "loss": metrics[-1] in ("train/loss", "eval/val_loss"),
        "zero": metrics[0] in _ZERO,
        "metrics": [
            {"key": key, "bold": key.startswith("eval/"), "smooth": key == "train/loss"}
            for key in metrics
        ],
    }


def _run(run: Run, name: str) -> dict[str, Any]:
    records = run.records()
    curves = {key: curve(run, key) for key in metrics_of([run])}
    rows = sorted({row for each in curves.values() for row in each.rows})
    order = {row: index for index, row in enumerate(rows)}
    return {
        "name": _plain(name),
        "path": _plain(str(run.path)),
        "state": run.state,
        "told": ": ".join(part for part in (_state(run), run.reason) if part),
        "problems": [
            _plain(problem) for problem in dict.fromkeys((*run.problems, *run.problems_of_records))
        ],
        "command": _plain(restart_command(run)),
        "settings": [(key, value_text(value)) for key, value in run.config.items()],
        "environment": _environment(run.environment),
        "axes": {key: [number(records[row].get(key)) for row in rows] for key in AXES},
        "curves": {
            key: {"at": [order[row] for row in each.rows], "y": [*map(_rounded, each.y)]}
            for key, each in curves.items()
        },
        "samples": [
            (record["step"], _plain(record["eval/sample"]))
            for record in records
            if isinstance(record.get("eval/sample"), str)
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    hidden = {"config", "resumed", "command"}
    flat = {key: value for key, value in environment.items() if key not in hidden}
    return [
        (key if inner is None else f"{key}: {inner}", value_text(each))
        for key, value in flat.items()
        for inner, each in (value.items() if isinstance(value, dict) else [(None, value)])
    ]


def _asset(suffix: str) -> str:
    return _TEMPLATE.with_suffix(suffix).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
