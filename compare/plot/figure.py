"""Draws curves as a PNG or SVG for a paper, with matplotlib.

The legend stands to the right of the curves, in the order of their last values and with them, so
that it reads like labels at the ends of the lines.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare.groups import RunGroup, Spread, group_labels
from compare.labels import labels, short_names
from compare.output import check_folder, write
from compare.plot.curves import AXES, COLOURS, Curve, band, curve, described, metrics_of
from compare.reading.run import Run
from config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
_MARKERS = "osD^vPXp"
_DASHES = ("-", "--", ":")
_INK, _FAINT = "#24282D", "#6B7178"
_LOSSES = ("train/loss", "eval/val_loss")
_MAX_MARKERS = 40  # a curve of more evaluations is drawn as a line only
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#B4B9BF",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8EAED",
    "grid.linewidth": 0.7,
    "xtick.color": "#B4B9BF",
    "ytick.color": "#B4B9BF",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hatchery",  # else ids in the file are random
}


def draw(
    runs: Sequence[Run],
    output: Path,
    metrics: Sequence[str] = (),
    x: str = "step",
    groups: Sequence[RunGroup] = (),
) -> list[dict[str, Any]]:
    """Writes curves over `x`: both losses in one panel, or each of `metrics` in its own.

    groups: of the runs; each becomes a line of means and a band of one standard deviation, with the
    single runs behind it. Returns what is drawn as plain values, a dict per curve. Raises
    WriteError, and ConfigError for an unknown suffix or metric or a missing matplotlib.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: a picture ends in .png or .svg; runs.py report makes a page.")
    panels = _panels(runs, metrics)
    lacking = [run.name for run in runs if x == "flops" and not run.size.get("flops_per_token")]
    if lacking:
        raise ConfigError(f"--x flops: not known of {', '.join(lacking)}, of an older version.")
    check_folder(output)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    picture, drawn = io.BytesIO(), list[dict[str, Any]]()
    with matplotlib.rc_context(_STYLE):
        # Figure, not pyplot: pyplot would look for a display and keep every figure in memory.
        figure = Figure(figsize=(7.2, 0.5 + 2.9 * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            if groups:
                drawn += _draw_groups(axes, groups, panel[-1], x)
            else:
                drawn += _draw_panel(axes, runs, panel, x)
        _label_x(all_axes[-1], x)
        _save(figure, picture, output.suffix[1:])
    write(output, picture.getvalue())
    return drawn


def _panels(runs: Sequence[Run], metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the metrics of each panel; raises ConfigError for an unknown one."""
    known = metrics_of(runs)
    if not known:
        raise ConfigError("nothing to draw: no run has a record with a number.")
    unknown = [metric for metric in metrics if metric not in known]
    if unknown:
        raise ConfigError("\n".join(_unknown(metric, known) for metric in unknown))
    if metrics:
        return [(metric,) for metric in dict.fromkeys(metrics)]
    return [tuple(metric for metric in _LOSSES if metric in known) or (known[0],)]


def _unknown(metric: str, known: Sequence[str]) -> str:
    by_tail = [name for name in known if name.partition("/")[2] == metric]  # `loss`
    close = by_tail or difflib.get_close_matches(metric, known, n=2, cutoff=0.5)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{metric}: no run has this metric.{guess} There is: {', '.join(known)}."


def _draw_panel(
    axes: Axes, runs: Sequence[Run], metrics: tuple[str, ...], x: str
) -> list[dict[str, Any]]:
    last = described(metrics[-1])
    legend: list[tuple[float, Any, str]] = []
    drawn: list[Curve] = []
    values = list[dict[str, Any]]()
    for index, (run, label, name) in enumerate(
        zip(runs, labels(runs), short_names(runs), strict=True)
    ):
        title = label if label.endswith(name) else f"{label} ({name})"
        entry: tuple[float, Any, str] | None = None
        for metric in metrics:
            drawn.append(curve(run, metric, x))
            line = _draw_curve(axes, drawn[-1], index, metric, metric.startswith("eval/"))
            values.append({"metric": metric, "run": str(run.path), "label": label})
            values[-1] |= {"x": drawn[-1].x, "y": drawn[-1].y}
            known = [value for value in drawn[-1].y if value is not None]
            if known:
                entry = known[-1], line, f"{_literal(title)}  {known[-1] * last.scale:.4g}"
        legend += [entry] if entry else []
    axes.set_ylabel("Loss (nats per token)" if len(metrics) > 1 else last.label)
    if len(metrics) > 1:
        axes.set_title("thin: training   bold: held-out", fontsize=8, color=_FAINT, loc="left")
        _crop_start(axes, drawn)
    _draw_legend(axes, legend)
    return values


def _draw_groups(
    axes: Axes, groups: Sequence[RunGroup], metric: str, x: str
) -> list[dict[str, Any]]:
    """Draws the mean of each group, a band of one standard deviation, and the runs behind it."""
    shown, scale = described(metric), described(metric).scale
    legend, values = list[tuple[float, Any, str]](), list[dict[str, Any]]()
    singles = list[Curve]()
    for index, (group, label) in enumerate(zip(groups, group_labels(groups), strict=True)):
        for run in group.runs:
            singles.append(curve(run, metric, x))
            _draw_curve(axes, singles[-1], index, metric, bold=False)
        mean = band(group.runs, metric, x)
        line = _draw_curve(axes, Curve([], mean.x, [*mean.mean]), index, metric, bold=True)
        low, high = (
            [
                (value + side * sd) * scale
                for value, sd in zip(mean.mean, mean.deviation, strict=True)
            ]
            for side in (-1, 1)
        )
        places = [math.nan if place is None else place for place in mean.x]
        colour = COLOURS[index % len(COLOURS)]
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        values.append({"metric": metric, "runs": [str(run.path) for run in group.runs]})
        values[-1] |= {"label": label} | asdict(mean)
        if mean.mean:
            end = Spread(len(group.runs), mean.mean[-1] * scale, mean.deviation[-1] * scale)
            text = f"{_literal(label)} ({group.size})  {end.text('{:.4g}'.format, '{:.2g}'.format)}"
            legend.append((mean.mean[-1], line, text))
    axes.set_ylabel(shown.label)
    note = "bold: mean, at steps that all runs have   band: \u00b1 1 sd   thin: single runs"
    axes.set_title(note, fontsize=8, color=_FAINT, loc="left")
    if "loss" in metric:
        _crop_start(axes, singles)
    _draw_legend(axes, legend)
    return values


def _draw_legend(axes: Axes, legend: list[tuple[float, Any, str]]) -> None:
    """Draws the legend; its entries are the last value of a curve, the curve, and its text."""
    # The highest last value first, so that texts and ends of the lines are in one order.
    legend.sort(key=lambda entry: -entry[0])
    handles, texts = [entry[1] for entry in legend], [entry[2] for entry in legend]
    axes.legend(handles, texts, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False)


def _literal(name: str) -> str:
    """Returns a name that is shown as it is: matplotlib typesets text between dollar signs as
    mathematics and leaves names that begin with an underscore out of legends."""
    return ("\N{ZERO WIDTH SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")


def _draw_curve(axes: Axes, points: Curve, index: int, metric: str, bold: bool) -> Any:
    scale = described(metric).scale
    places = [math.nan if place is None else place for place in points.x]
    values = [math.nan if value is None else value * scale for value in points.y]
    (line,) = axes.plot(
        places,
        values,
        _DASHES[index // len(COLOURS) % len(_DASHES)],
        color=COLOURS[index % len(COLOURS)],
        linewidth=1.8 if bold else 0.8,
        alpha=1.0 if bold else 0.55,  # training losses are noisy: they stay behind
        marker=_MARKERS[index % len(_MARKERS)] if bold and len(values) <= _MAX_MARKERS else "",
        markersize=4,
        zorder=3 if bold else 2,
    )
    return line


def _crop_start(axes: Axes, drawn: Sequence[Curve]) -> None:
    """Limits the y axis to what follows the first steep fall, and notes how high the start was."""
    top, bottom, highest = frame(drawn)
    if highest > top:
        axes.set_ylim(bottom, top)
        note = f"\N{UPWARDS ARROW} the start lies above: up to {highest:.3g}"
        axes.annotate(
            note, (0.99, 0.97), xycoords="axes fraction", ha="right", va="top", color=_FAINT
        )


def frame(drawn: Sequence[Curve]) -> tuple[float, float, float]:
    """Returns the top and bottom of a frame for losses, and the highest loss.

    The frame leaves out the first twentieth of the steps if the losses there are so high that the
    rest would fill less than four fifths of it.
    """
    late, every = list[float](), list[float]()
    for points in drawn:
        known = [
            (x, y)
            for x, y in zip(points.x, points.y, strict=True)
            if x is not None and y is not None
        ]
        end = max((x for x, _ in known), default=0.0)
        every += [y for _, y in known]
        late += [y for x, y in known if x >= end / 20]
    if not late:
        return 0.0, 0.0, 0.0
    bottom, top, highest = min(late), max(late), max(every)
    margin = (top - bottom) * 0.06
    towers = highest - bottom > 1.25 * (top - bottom)
    return (top if towers else highest) + margin, bottom - margin, highest


def _label_x(axes: Axes, x: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("Time (s)" if x == "time" else AXES[x][0].upper() + AXES[x][1:])
    if x in ("tokens", "flops"):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _save(figure: Figure, picture: io.BytesIO, form: str) -> None:
    metadata = {"Date": None} if form == "svg" else {}  # the same runs give the same file
    figure.savefig(picture, format=form, dpi=200, metadata=metadata)
