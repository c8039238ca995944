"""The report in a real browser: what it draws, what its controls do, what it asks for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compare.reading.run import Run, read_run, restart_command
from compare.report.page import write_report
from tests.compare.run_directories import SESSION, TOKENS_PER_STEP, make, write_records

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"needs one of {', '.join(NAMES)}"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync"]

HOSTILE = "</pre></script><img src=x onerror='window.hacked = 1'>"
SAMPLE = "Once upon a time"
EVALUATIONS = 10
COMMAND = [*SESSION["command"], "run_name=it's me"]
HEIGHT = "document.documentElement.scrollHeight"
# The traces of each panel, as Plotly holds them.
TRACES = """() => [...document.querySelectorAll(".js-plotly-plot")].map(plot => plot.data.map(
    ({meta, visible, x, y, opacity, line}) =>
    ({run: meta, visible, x, y, opacity, colour: line.color})))"""
# The lines of each trace on the screen, in the same order.
PATHS = """() => [...document.querySelectorAll("#panels .scatterlayer .trace")].map(trace =>
    [...trace.querySelectorAll("path.js-line")].map(path => path.getAttribute("d")))"""
LAYOUTS = """() => [...document.querySelectorAll(".js-plotly-plot")].map(plot => {
    const {xaxis, yaxis} = plot._fullLayout;
    return {x: xaxis.type, y: yaxis.type, range: xaxis.range, title: xaxis.title.text};
})"""
DRAWN = """() => document.querySelector(".main .plot .scatterlayer .trace")"""
PRINTED = """() => { dispatchEvent(new Event("beforeprint"));
    return document.querySelectorAll(".plot:not(.js-plotly-plot)").length; }"""
ORIGIN = """() => { const area = document.querySelector(".main .nsewdrag").getBoundingClientRect();
    return [area.left, area.top, area.width, area.height]; }"""


class Watched:
    """A page with its complaints on the console and its requests."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def check(self) -> None:
        """Fails if the page complained or asked for anything since the last check."""
        complaints, requests = self.complaints.copy(), self.requests.copy()
        self.complaints.clear()
        self.requests.clear()
        assert complaints == []
        assert [url for url in requests if not url.startswith(("data:", "blob:"))] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, page: Path, without: str = "", **options: Any) -> Iterator[Watched]:
    """Opens a page in a browser of its own, and checks it at the end.

    without: what this browser lacks; then no curve is waited for.
    """
    context = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | options))
    context.set_default_timeout(20_000)
    watched = Watched(context.new_page())
    if without:
        watched.page.add_init_script(f"delete window.{without}")
    watched.page.goto(page.as_uri())
    if not without:
        watched.page.wait_for_function(DRAWN)
    watched.requests.remove(page.as_uri())
    try:
        yield watched
        watched.check()
    finally:
        context.close()


def written(runs: list[Run]) -> Path:
    """Writes the report beside the runs."""
    output = runs[0].path.parent / "report.html"
    write_report(runs, output)
    return output


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs that differ in model, learning rate and precision; the best is run_gpt."""
    folder = tmp_path_factory.mktemp("report")
    falling = [4.0 - number / 10 for number in range(EVALUATIONS)]
    gaps = [None if number == 4 else loss + 0.3 for number, loss in enumerate(falling)]
    slow = [loss + 0.1 for loss in falling]
    command = {"command": COMMAND}
    runs = [
        make("run_gpt", "model.name=gpt", "use_4bit=false", folder=folder, losses=falling),
        make(
            "run_slow", "lr=1e-4", folder=folder, losses=slow, sample=HOSTILE, environment=command
        ),
        make("run_<i>32", "compute_dtype=float32", folder=folder, losses=gaps, sample=SAMPLE),
    ]
    lines = runs[2].records
    lines[7]["train/loss"] = None  # its seventh log line, after an evaluation
    write_records(runs[2].path, lines)
    return written([read_run(run.path) for run in runs])


@pytest.fixture(scope="module")
def shared(browser: Any, three: Path) -> Iterator[Watched]:
    rights = ["clipboard-read", "clipboard-write"]
    with opened(browser, three, permissions=rights) as watched:
        drawn = watched.page.locator(".js-plotly-plot").count()
        assert drawn < watched.page.locator(".plot").count()  # the others when they are seen
        assert watched.page.evaluate(PRINTED) == 0
        yield watched


@pytest.fixture
def page(shared: Watched) -> Iterator[Any]:
    """The report of three runs as it is at first; opened once for all tests."""
    yield shared.page
    shared.page.mouse.move(0, 0)
    shared.page.click("button[type=reset]")
    shared.page.evaluate("new Promise(done => setTimeout(done))")  # the page resets in one, too
    shared.check()


def traces(page: Any, run: int | None = None) -> list[dict[str, Any]]:
    """Returns the traces of all panels, or of one run in all panels."""
    found = [trace for panel in page.evaluate(TRACES) for trace in panel]
    return [trace for trace in found if run in (None, trace["run"])]


def visible(page: Any) -> list[int]:
    """Returns the runs that are drawn; each is in all panels or in none."""
    shown = {(trace["run"], trace["visible"]) for trace in traces(page)}
    assert len(shown) == 3
    return sorted(run for run, seen in shown if seen)


def legend(page: Any, run: int) -> Any:
    return page.locator("#legend button").nth(run)


def over(page: Any, step: float) -> tuple[float, float]:
    """Returns where a step is on the screen, at half the height of the panel of losses."""
    page.locator(".main .plot").scroll_into_view_if_needed()
    left, top, _, height = page.evaluate(ORIGIN)
    script = "x => document.querySelector('.main .plot')._fullLayout.xaxis.d2p(x)"
    return left + page.evaluate(script, step), top + height / 2


# ---- what is drawn


def test_every_panel_draws_every_run_and_a_gap_as_a_gap(page: Any) -> None:
    panels = page.evaluate(TRACES)
    titles = page.locator("#panels h3").all_inner_texts()
    assert len(panels) == len(titles) == 7
    assert titles[:2] == ["Loss", "Held-out bits per byte"]
    for panel in panels:
        assert {trace["run"] for trace in panel} == {0, 1, 2}
        assert all(trace["visible"] for trace in panel)
        assert all(len(trace["y"]) >= EVALUATIONS for trace in panel)
    drawn = page.evaluate(PATHS)
    assert all(len(path) > 10 for paths in drawn for path in paths)
    gaps = [None in trace["y"] for trace in traces(page)]
    assert sum(gaps) == 3  # both losses of a run, and its bits per byte
    assert [len(paths) - 1 for paths in drawn] == gaps


def test_the_answer_and_the_tables_are_shown_and_markup_in_names_is_text(page: Any) -> None:
    assert page.inner_text("h1") == "Best: gpt, lr 0.001, bfloat16, with held-out loss 3.1000"
    assert "0.1000 below bdh, lr 0.0001, bfloat16 (" in page.inner_text("#answer .lead")
    row = page.locator("#results tr", has=page.locator("th", has_text="learning_rate"))
    assert row.locator("td").all_inner_texts() == ["0.001", "0.0001", "0.001"]
    classes = [cell.get_attribute("class") for cell in row.locator("td").all()]
    assert classes == ["number", "number other", "number"]
    assert page.locator("#paired .forest circle").count() == 2
    assert page.locator("#paired .verdict").all_inner_texts()[0].startswith("worse")
    assert HOSTILE in page.locator("#samples pre").first.inner_text()
    assert page.locator("img").count() == page.locator("#legend i").count() == 0
    heading = page.locator("#results thead th").nth(2).inner_text()
    assert heading.split("\n") == ["bdh, lr 0.001, float32", "<i>32"]
    assert page.evaluate("window.hacked") is None


# ---- controls


def test_the_legend_hides_runs_in_all_panels_and_reset_shows_them(page: Any) -> None:
    before = traces(page)
    legend(page, 1).click()
    assert visible(page) == [0, 2]
    assert legend(page, 1).get_attribute("aria-pressed") == "false"
    legend(page, 1).click()
    assert visible(page) == [0, 1, 2]
    legend(page, 1).dblclick()
    assert visible(page) == [1]
    legend(page, 1).dblclick()
    assert visible(page) == [0, 1, 2]
    legend(page, 0).click()
    page.check("input[value=time]", force=True)
    page.locator("[name=smooth]").fill("0.5")
    page.click("button[type=reset]")
    page.wait_for_function("() => document.querySelector('[name=smooth] + output').value == 0")
    assert traces(page) == before


def test_the_axes_are_those_of_all_panels(page: Any) -> None:
    steps = [trace["x"] for trace in traces(page)]
    for axis, title, unit in (("tokens", "Tokens", TOKENS_PER_STEP), ("time", "Time (s)", 0.05)):
        page.check(f"input[value={axis}]", force=True)
        for before, trace in zip(steps, traces(page), strict=True):
            assert trace["x"] == pytest.approx([step * unit for step in before])
        assert {layout["title"] for layout in page.evaluate(LAYOUTS)} == {title}
    page.check("[name=logX]")
    page.check("[name=logY]")
    assert {layout["x"] for layout in page.evaluate(LAYOUTS)} == {"log"}
    assert page.evaluate(LAYOUTS)[0]["y"] == "log"
    page.uncheck("[name=logY]")
    assert page.evaluate(LAYOUTS)[0]["y"] == "linear"


def test_smoothing_adds_a_smooth_curve_over_a_faint_one(page: Any) -> None:
    raw = traces(page, 0)[0]
    page.locator("[name=smooth]").fill("0.9")
    faint, smooth = traces(page, 0)[:2]
    assert page.inner_text("[name=smooth] + output") == "0.90"
    assert faint["y"] == raw["y"]
    assert faint["opacity"] < 0.5 < smooth["opacity"]
    assert smooth["y"][0] == pytest.approx(raw["y"][0])
    assert roughness(smooth["y"]) < roughness(raw["y"]) / 4
    assert [value is None for value in traces(page, 2)[1]["y"]] == [n == 6 for n in range(40)]


def roughness(values: list[float]) -> float:
    """Returns the summed distance of each value from the middle of its neighbours."""
    triples = zip(values, values[1:], values[2:], strict=False)
    return sum(abs(a - 2 * b + c) for a, b, c in triples)


def zoom(page: Any, first: float, last: float) -> None:
    """Drags from a step to another over the panel of losses."""
    x, y = over(page, first)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(over(page, last)[0], y, steps=4)
    page.mouse.up()
    page.wait_for_function("() => view.zoom.range")


def test_a_zoom_is_that_of_all_panels_until_a_double_click(page: Any) -> None:
    whole = page.evaluate(LAYOUTS)
    all_panels = """() => [...document.querySelectorAll(".js-plotly-plot")].every(plot => {
        const [low, high] = plot._fullLayout.xaxis.range; return %s; })"""
    zoom(page, 300, 600)
    page.wait_for_function(all_panels % "Math.abs(low - 300) < 5 && Math.abs(high - 600) < 5")
    page.mouse.dblclick(*over(page, 450))
    page.wait_for_function(all_panels % "high > 900")
    for before, after in zip(whole, page.evaluate(LAYOUTS), strict=True):
        assert after["range"] == pytest.approx(before["range"])


def readout(page: Any) -> list[list[str]]:
    """Returns the rows of the table beside the pointer, which must be wholly on the screen."""
    page.locator(".readout").wait_for()
    box = page.locator(".readout").bounding_box()
    size = page.viewport_size
    assert min(box["x"], box["y"]) >= 0
    assert box["x"] + box["width"] <= size["width"] and box["y"] + box["height"] <= size["height"]
    script = "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    rows: list[list[str]] = page.locator(".readout tr").evaluate_all(script)
    return rows


def test_the_pointer_shows_the_values_of_all_runs(page: Any) -> None:
    page.mouse.move(*over(page, 490))
    page.mouse.move(*over(page, 500), steps=3)
    heading, *rows = readout(page)
    assert page.inner_text(".readout b") == "Steps 500"
    assert heading == ["", "held-out", "training"]
    (first, loss, training), *others = rows  # from top to bottom, as the curves lie
    assert (first, loss) == ("bdh, lr 0.001, float32", "")  # no evaluation of it is near
    assert float(training) > 3
    assert [row[:2] for row in others] == [
        ["bdh, lr 0.0001, bfloat16", "3.7"],
        ["gpt, lr 0.001, bfloat16", "3.6"],
    ]
    page.mouse.move(0, 0)
    assert page.locator(".readout").is_hidden()


# ---- samples and commands


def test_samples_settings_and_commands(page: Any, three: Path) -> None:
    chooser, text = page.locator("#sample-step"), page.locator("#samples pre").nth(1)
    assert text.inner_text() == f"{SAMPLE} at step 1000"
    chooser.fill("0")
    assert text.inner_text() == f"{SAMPLE} at step 100"
    assert chooser.get_attribute("aria-valuetext") == "step 100"
    chooser.fill("9")
    folds = page.locator("#runs article").first.locator("details").all()
    for fold, line in zip(
        folds, (("training.learning_rate", "0.001"), ("torch", "2.6.0")), strict=True
    ):
        fold.locator("summary").click()
        words, values = (fold.locator(kind).all_inner_texts() for kind in ("dt", "dd"))
        assert line in zip(words, values, strict=True)
        fold.locator("summary").click()
    assert "[object" not in page.inner_text("body")
    restart = restart_command(read_run(three.parent / "run_slow"))
    repeat = f"python train.py --reproduce '{three}#run_slow'"
    for place, name, command in ((2, "run_slow", restart), (3, "the check of run_slow", repeat)):
        page.locator("#runs .copy").nth(place).click()
        copied = f"() => document.querySelectorAll('.copy')[{place}].textContent == 'Copied'"
        page.wait_for_function(copied)
        assert page.inner_text("#live") == f"Command of {name} copied"
        assert page.evaluate("navigator.clipboard.readText()") == command


# ---- light and dark, keyboard


def turned(page: Any, scheme: str) -> bool:
    """Returns whether curves and background have the colours of a scheme."""
    page.wait_for_function(
        """scheme => data.colours[scheme].includes(
        document.querySelector(".js-plotly-plot").data[0].line.color)""",
        arg=scheme,
    )
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 765
    return brightness < 0.2 if scheme == "dark" else brightness > 0.9


def test_it_is_dark_where_the_system_is_and_the_button_turns_it(page: Any) -> None:
    assert turned(page, "light")
    page.emulate_media(color_scheme="dark")
    assert turned(page, "dark")
    page.click("#theme")
    assert turned(page, "light")
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert turned(page, "dark")
    page.click("#theme")
    assert turned(page, "light")


def test_the_keyboard_reaches_the_curves_and_their_runs(browser: Any, three: Path) -> None:
    def focused(selector: str) -> bool:
        return bool(watched.page.evaluate("s => document.activeElement.matches(s)", selector))

    with opened(browser, three) as watched:
        press = watched.page.keyboard.press
        press("Tab")
        assert focused(".skip")
        assert watched.page.locator(".skip").bounding_box()["x"] > 0
        press("Enter")
        press("Tab")
        assert focused("#legend button")
        press("Enter")
        assert visible(watched.page) == [1, 2]
        press("Space")
        assert visible(watched.page) == [0, 1, 2]


# ---- many runs, small screens

PHONE: dict[str, Any] = {
    "viewport": {"width": 375, "height": 740},
    "has_touch": True,
    "is_mobile": True,
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine runs: one killed, one broken, one old, one never evaluated; with long names."""
    folder = tmp_path_factory.mktemp("many")
    unusual: dict[int, dict[str, Any]] = {2: {"old": True}, 3: {"losses": ()}, 4: {"state": None}}
    runs = [
        make(
            f"run_20251108_{'long' * 8}_{number}",
            f"n_layer={number + 2}",
            folder=folder,
            **{"losses": (9.0, 3.0 - number / 10)} | unusual.get(number, {}),
        )
        for number in range(9)
    ]
    (runs[1].path / "environment.json").write_text("{")
    (runs[1].path / "config.yaml").write_text("model: [")
    return written([read_run(run.path) for run in runs])


def test_odd_runs_are_drawn_among_others_and_sorted_on_any_screen(browser: Any, odd: Path) -> None:
    fits = "() => document.documentElement.scrollWidth <= innerWidth"
    with opened(browser, odd) as watched:
        page = watched.page
        assert "Not everything could be read" in page.inner_text(".notice summary")
        assert {trace["run"] for trace in traces(page)} == set(range(8))  # the last has no record
        rows = page.locator("#results tbody tr")
        assert rows.count() == 9
        head = page.locator("#results th", has_text="Held-out loss").first
        first = rows.first.inner_text()
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert rows.first.inner_text() == first
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert rows.nth(7).inner_text() == first
        assert rows.nth(8).inner_text().startswith("n_layer 5, max_iters 1\n3\t")  # unknown: last
        for width in (375, 320):
            page.set_viewport_size({"width": width, "height": 740})
            page.wait_for_function(fits)  # the panels follow in a moment


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty runs of as many learning rates, each evaluated and sampled from 60 times."""
    folder = tmp_path_factory.mktemp("thirty")
    return written(
        [
            make(
                f"run_20251108_1430{number}",
                f"learning_rate={number}e-4",
                folder=folder,
                losses=(9.0, *[3.0 + number / 10] * 59),
                every=4,
                sample=SAMPLE,
            )
            for number in range(10, 40)
        ]
    )


@pytest.fixture(scope="module")
def wide(browser: Any, thirty: Path) -> Iterator[Any]:
    with opened(browser, thirty) as watched:
        yield watched.page


@pytest.fixture(scope="module")
def phone(browser: Any, thirty: Path) -> Iterator[Any]:
    with opened(browser, thirty, **PHONE) as watched:
        yield watched.page


def test_thirty_runs_fit_on_a_page_and_are_sorted_by_headings(wide: Any) -> None:
    assert wide.evaluate(HEIGHT) < 6500
    assert wide.locator("#runs .command").first.is_hidden()
    wide.locator("#runs summary").first.click()
    assert wide.locator("#runs .command").first.is_visible()
    pairs = wide.locator("#paired tbody tr:visible")
    assert pairs.count() == 10
    wide.click("#paired .all")
    assert pairs.count() == 29
    for table in ("#results", "#paired"):
        first, head = wide.locator(f"{table} tbody th").first, wide.locator(f"{table} thead th")
        before = first.inner_text()
        loss = head.filter(has_text="Held-out loss").first.locator("button")
        loss.click()
        assert first.inner_text() == before
        loss.click()
        assert first.inner_text().startswith("lr 0.0039")


def test_the_readout_of_thirty_runs_is_whole_and_shows_those_at_the_pointer(wide: Any) -> None:
    x, y = over(wide, 200)
    script = "y => document.querySelector('.main .plot')._fullLayout.yaxis.d2p(y)"
    top = y - wide.evaluate(ORIGIN)[3] / 2
    for loss, label, more in ((4.0, "lr 0.001", "above"), (6.9, "lr 0.0039", "below")):
        wide.mouse.move(x - 2, top + wide.evaluate(script, loss), steps=3)
        wide.locator(".readout .nearest .name", has_text=re.compile(f"^{label}$")).wait_for()
        assert len(readout(wide)) == 13  # with the heading
        assert wide.inner_text(".readout p") == f"18 more {more}"


def test_a_phone_shows_verdicts_and_the_values_under_a_tap(phone: Any) -> None:
    for verdict in phone.locator("#paired td.verdict:visible").all():
        box = verdict.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    ranges = "() => document.querySelector('.main .plot')._fullLayout.yaxis.range"
    assert phone.inner_text("#zooming").startswith("Tap a panel for its values.")
    assert phone.evaluate(HEIGHT) < 9000
    x, y = over(phone, 150)
    before = phone.evaluate(ranges)
    assert before[1] < 9  # without the start
    for _ in range(2):
        phone.touchscreen.tap(x, y)
        phone.wait_for_timeout(400)  # longer than a double click
        assert phone.evaluate(ranges) == before
        assert len(readout(phone)) == 13
    phone.locator("h2:visible", has_text="Curves").tap()
    assert phone.locator(".readout").is_hidden()


def test_one_run_is_shown_in_cards_and_no_foreign_script_runs(browser: Any) -> None:
    with opened(browser, written([make()]).absolute()) as watched:
        page = watched.page
        assert "2.5000" in page.inner_text("#results .cards")
        assert page.locator("#results table").count() == 0
        assert page.locator("#legend").is_hidden()
        zoom(page, 100, 200)
        assert page.evaluate(PRINTED) == 0  # the panels that are drawn now have the zoom, too
        assert len(traces(page)) == 8
        for layout in page.evaluate(LAYOUTS):
            assert layout["range"] == pytest.approx([100, 200], abs=5)
        watched.check()
        with page.expect_console_message():
            page.evaluate(
                """() => { const script = document.createElement("script");
                script.textContent = "window.hacked = 1"; document.body.append(script); }"""
            )
        assert page.evaluate("window.hacked") is None
        assert "Content Security Policy" in watched.complaints.pop()


# ---- groups and settings

GROUPED = """() => document.querySelector(".js-plotly-plot").data.map(
    ({meta, fill, opacity, customdata}) => ({meta, fill, opacity, spread: customdata}))"""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning rates with three seeds each; the best is lr 0.001."""
    folder = tmp_path_factory.mktemp("seeds")
    runs = [
        make(
            f"run_{rate}_{seed}",
            f"learning_rate={rate}",
            f"seed={seed}",
            folder=folder,
            losses=(9.0, *[loss + seed / 10] * 19),
            every=20,
            seed=seed,
        )
        for rate, loss in (("1e-3", 3.0), ("3e-4", 3.5))
        for seed in (1, 2, 3)
    ]
    return written(runs)


def test_a_group_is_a_mean_with_a_band_and_its_runs_on_request(browser: Any, seeds: Path) -> None:
    with opened(browser, seeds) as watched:
        page = watched.page
        assert page.locator("#legend button").all_inner_texts() == ["lr 0.001\n×3", "lr 0.0003\n×3"]
        losses = page.evaluate(GROUPED)
        assert [trace["meta"] for trace in losses if trace["fill"] == "toself"] == [0, 1]
        means = [trace["spread"] for trace in losses if trace["spread"] and trace["opacity"] == 1]
        assert [spread[-1] for spread in means] == pytest.approx([0.1, 0.1])
        page.check("[name=single]")
        single = [trace["meta"] for trace in page.evaluate(GROUPED) if trace["opacity"] == 0.3]
        assert single == [0, 0, 0, 1, 1, 1]
        page.mouse.move(*over(page, 195))
        page.mouse.move(*over(page, 200), steps=3)
        _, worse, better = readout(page)
        assert (worse[:2], better[:2]) == (["lr 0.0003", "3.7 ± 0.1"], ["lr 0.001", "3.2 ± 0.1"])
        rows = page.locator("#results .each tbody tr")
        assert rows.count() == 6
        assert rows.first.is_hidden()
        page.locator("#results .each summary").click()
        assert rows.first.inner_text().startswith("lr 0.001, seed 1")
        page.check("input[value=flops]", force=True)
        assert {layout["title"] for layout in page.evaluate(LAYOUTS)} == {"Training TFLOPs"}


def test_a_line_over_the_settings_is_chosen_by_key_and_by_tap(phone: Any) -> None:
    fits = "() => document.documentElement.scrollWidth <= innerWidth"
    area, caption = phone.locator("#parallel .area"), phone.locator("#parallel p.chosen")
    area.scroll_into_view_if_needed()
    assert caption.inner_text().startswith("lr 0.001")
    assert phone.locator("#parallel .area path").count() == 30
    phone.locator("#parallel-line").press("End")
    assert caption.inner_text().startswith("lr 0.0039")
    assert phone.locator("#parallel-line").get_attribute("aria-valuetext").startswith("30 of 30:")
    box = area.bounding_box()
    phone.touchscreen.tap(box["x"] + 2, box["y"] + box["height"] - 2)
    assert caption.inner_text().startswith("lr 0.001")
    assert phone.evaluate(fits)


def test_a_browser_that_cannot_inflate_the_library_shows_the_rest(
    browser: Any, three: Path
) -> None:
    with opened(browser, three, without="DecompressionStream") as watched:
        page = watched.page
        page.locator("#panels .notice").wait_for()
        assert "cannot inflate" in page.inner_text("#panels .notice")
        assert page.locator("#results td").count() > 10
        page.click("#theme")
