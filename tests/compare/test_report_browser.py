"""The report in a real browser: what it draws, what its controls do, what it asks for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compare.read import read_run, restart_command
from compare.report.page import write_report
from tests.compare.run_directories import SESSION, TOKENS_PER_STEP, make_run, write_records

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs one of {', '.join(NAMES)}")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync"]

HOSTILE = "</pre></script><img src=x onerror='window.hacked = 1'>"
EVALUATIONS = 10
COMMAND = [*SESSION["command"], "run_name=it's me"]
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
ORIGIN = """() => { const area = document.querySelector(".main .nsewdrag").getBoundingClientRect();
    return [area.left, area.top, area.width, area.height]; }"""


class Watched:
    """A page with what it said and asked for."""

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
        """Nothing was complained of and nothing left the page since the last check."""
        (said, self.complaints), (asked, self.requests) = (self.complaints, []), (self.requests, [])
        assert said == []
        assert [url for url in asked if not url.startswith(("data:", "blob:"))] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, page: Path, **options: Any) -> Iterator[Watched]:
    """A page in a browser of its own, which is to have complained of nothing."""
    context = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | options))
    context.set_default_timeout(20_000)
    watched = Watched(context.new_page())
    watched.page.goto(page.as_uri())
    watched.requests.remove(page.as_uri())
    try:
        yield watched
        watched.check()
    finally:
        context.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs that differ in model, learning rate and precision; the best is run_gpt."""
    folder = tmp_path_factory.mktemp("report")
    falling = [4.0 - number / 10 for number in range(EVALUATIONS)]
    paths = [
        make_run(folder, "run_gpt", options=["model.name=gpt", "use_4bit=false"], losses=falling),
        make_run(
            folder,
            "run_slow",
            options=["learning_rate=1e-4"],
            losses=[loss + 0.1 for loss in falling],
            sample=HOSTILE,
            environment={"command": COMMAND},
            seed=1,
        ),
        make_run(
            folder,
            "run_<i>32",
            options=["compute_dtype=float32"],
            losses=[None if number == 4 else loss + 0.3 for number, loss in enumerate(falling)],
            sample="Once upon a time",
            seed=2,
        ),
    ]
    lines = read_run(paths[2]).records
    lines[7]["train/loss"] = None  # its seventh log line, after an evaluation
    write_records(paths[2], lines)
    write_report([read_run(path) for path in paths], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def shared(browser: Any, made: Path) -> Iterator[Watched]:
    rights = ["clipboard-read", "clipboard-write"]
    with opened(browser, made, permissions=rights) as watched:
        yield watched


@pytest.fixture
def page(shared: Watched) -> Iterator[Any]:
    """The page as it is at first, opened once for all tests."""
    yield shared.page
    shared.page.mouse.move(0, 0)
    shared.page.click("button[type=reset]")
    shared.page.evaluate("new Promise(done => setTimeout(done))")  # the page resets in one, too
    shared.check()


def traces(page: Any, run: int | None = None) -> list[dict[str, Any]]:
    """Those of all panels, or of one run in all panels."""
    found = [trace for panel in page.evaluate(TRACES) for trace in panel]
    return [trace for trace in found if run in (None, trace["run"])]


def visible(page: Any) -> list[int]:
    """The runs that are drawn; each is in all panels or in none."""
    shown = {(trace["run"], trace["visible"]) for trace in traces(page)}
    assert len(shown) == 3
    return sorted(run for run, seen in shown if seen)


def legend(page: Any, run: int) -> Any:
    return page.locator("#legend button").nth(run)


def over(page: Any, step: float) -> tuple[float, float]:
    """Where a step is on the screen, in the middle of the panel of losses."""
    page.locator(".main .plot").scroll_into_view_if_needed()
    left, top, _, height = page.evaluate(ORIGIN)
    script = "x => document.querySelector('.main .plot')._fullLayout.xaxis.d2p(x)"
    return left + page.evaluate(script, step), top + height / 2


# ---- what is drawn


def test_every_panel_draws_every_run(page: Any) -> None:
    panels = page.evaluate(TRACES)
    titles = page.locator("#panels h3").all_inner_texts()
    assert len(panels) == len(titles) == 7
    assert titles[:2] == ["Loss", "Held-out bits per byte"]
    for panel in panels:
        assert {trace["run"] for trace in panel} == {0, 1, 2}
        assert all(trace["visible"] for trace in panel)
        assert all(len(trace["y"]) >= EVALUATIONS for trace in panel)
    drawn = page.evaluate(PATHS)
    assert len(drawn) == sum(map(len, panels))
    assert all(len(path) > 10 for paths in drawn for path in paths)


def test_a_gap_is_drawn_as_a_gap(page: Any) -> None:
    gaps = [None in trace["y"] for trace in traces(page)]
    assert sum(gaps) == 3  # both losses of a run, and its bits per byte
    assert [len(paths) - 1 for paths in page.evaluate(PATHS)] == gaps


def test_the_answer_stands_on_top(page: Any) -> None:
    assert page.inner_text("h1") == "Best: gpt, lr 0.001, bfloat16, with held-out loss 3.1000"
    assert "0.1000 below bdh, lr 0.0001, bfloat16 (" in page.inner_text("#answer .lead")


def test_a_setting_other_than_in_the_best_run_is_tinted(page: Any) -> None:
    row = page.locator("#results tr", has=page.locator("th", has_text="learning_rate"))
    assert row.locator("td").all_inner_texts() == ["0.001", "0.0001", "0.001"]
    assert [cell.get_attribute("class") for cell in row.locator("td").all()] == [
        "number",
        "number other",
        "number",
    ]


def test_each_other_run_has_an_interval(page: Any) -> None:
    assert page.locator("#paired .forest circle").count() == 2
    assert page.locator("#paired .verdict").all_inner_texts()[0].startswith("worse")


def test_a_name_and_a_sample_with_markup_are_text(page: Any) -> None:
    assert HOSTILE in page.locator("#samples pre").first.inner_text()
    assert page.locator("img").count() == page.locator("#legend i").count() == 0
    assert page.locator("#results thead th").nth(2).inner_text().split("\n") == [
        "bdh, lr 0.001, float32",
        "<i>32",
    ]
    assert page.locator("#legend button").all_inner_texts()[:2] == [
        "gpt, lr 0.001, bfloat16",
        "bdh, lr 0.0001, bfloat16",
    ]
    assert page.evaluate("window.hacked") is None


# ---- runs shown


def test_a_run_is_hidden_in_all_panels_and_shown_again(page: Any) -> None:
    legend(page, 1).click()
    assert visible(page) == [0, 2]
    assert legend(page, 1).get_attribute("aria-pressed") == "false"
    legend(page, 1).click()
    assert visible(page) == [0, 1, 2]


def test_a_double_click_shows_a_run_alone_and_again_all(page: Any) -> None:
    legend(page, 1).dblclick()
    assert visible(page) == [1]
    legend(page, 1).dblclick()
    assert visible(page) == [0, 1, 2]


def test_reset_shows_all_as_at_first(page: Any) -> None:
    before = traces(page)
    legend(page, 0).click()
    page.check("input[value=time]", force=True)
    page.locator("[name=smooth]").fill("0.5")
    page.click("button[type=reset]")
    page.wait_for_function("() => document.querySelector('[name=smooth] + output').value == 0")
    assert traces(page) == before


# ---- axes and smoothing


@pytest.mark.parametrize(
    ("axis", "title", "unit"),
    [("tokens", "Tokens", TOKENS_PER_STEP), ("time", "Time (s)", 0.05)],
)
def test_the_curves_are_drawn_over(page: Any, axis: str, title: str, unit: float) -> None:
    steps = [trace["x"] for trace in traces(page)]
    page.check(f"input[value={axis}]", force=True)
    for before, trace in zip(steps, traces(page), strict=True):
        assert trace["x"] == pytest.approx([step * unit for step in before])
    assert {layout["title"] for layout in page.evaluate(LAYOUTS)} == {title}


def test_log_x_is_that_of_all_panels(page: Any) -> None:
    page.check("[name=logX]")
    assert {layout["x"] for layout in page.evaluate(LAYOUTS)} == {"log"}


def test_log_y_is_that_of_the_losses(page: Any) -> None:
    page.check("[name=logY]")
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
    """How much each value lies off the middle of its neighbours, in all."""
    triples = zip(values, values[1:], values[2:], strict=False)
    return sum(abs(a - 2 * b + c) for a, b, c in triples)


def test_a_zoom_is_that_of_all_panels_until_a_double_click(page: Any) -> None:
    whole = page.evaluate(LAYOUTS)
    x, y = over(page, 300)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(over(page, 600)[0], y, steps=4)
    page.mouse.up()
    page.wait_for_function(
        """() => [...document.querySelectorAll(".js-plotly-plot")].every(plot =>
        Math.abs(plot._fullLayout.xaxis.range[0] - 300) < 5
        && Math.abs(plot._fullLayout.xaxis.range[1] - 600) < 5)"""
    )
    page.mouse.dblclick(x, y)
    page.wait_for_function(
        """() => [...document.querySelectorAll(".js-plotly-plot")].every(plot =>
        plot._fullLayout.xaxis.range[1] > 900)"""
    )
    for before, after in zip(whole, page.evaluate(LAYOUTS), strict=True):
        assert after["range"] == pytest.approx(before["range"])


def readout(page: Any) -> list[list[str]]:
    """The rows of the table beside the pointer, which is to be on the screen as a whole."""
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
    told = readout(page)
    assert page.inner_text(".readout b") == "Steps 500"
    assert told[0] == ["", "held-out", "training"]
    rows = {cells[0]: cells[1:] for cells in told[1:]}
    assert list(rows) == [
        "bdh, lr 0.001, float32",
        "bdh, lr 0.0001, bfloat16",
        "gpt, lr 0.001, bfloat16",
    ]  # from top to bottom, as the curves lie
    assert rows["gpt, lr 0.001, bfloat16"][0] == "3.6"
    assert rows["bdh, lr 0.0001, bfloat16"][0] == "3.7"
    loss, training = rows["bdh, lr 0.001, float32"]
    assert loss == "" and float(training) > 3  # no evaluation of it is near
    page.mouse.move(0, 0)
    assert page.locator(".readout").is_hidden()


# ---- samples and commands


def test_the_step_of_the_samples_is_chosen(page: Any) -> None:
    chooser, text = page.locator("#sample-step"), page.locator("#samples pre").nth(1)
    assert text.inner_text() == "Once upon a time at step 1000"
    chooser.fill("0")
    assert text.inner_text() == "Once upon a time at step 100"
    assert chooser.get_attribute("aria-valuetext") == "step 100"
    chooser.fill("9")
    assert text.inner_text() == "Once upon a time at step 1000"


def test_settings_and_environment_unfold_as_text(page: Any) -> None:
    folds = page.locator("#runs article").first.locator("details")
    for fold, line in zip(
        folds.all(), ("training.learning_rate\t0.001", "torch\t2.6.0"), strict=True
    ):
        fold.locator("summary").click()
        words, values = (fold.locator(kind).all_inner_texts() for kind in ("dt", "dd"))
        assert line in ["\t".join(pair) for pair in zip(words, values, strict=True)]
        fold.locator("summary").click()
    assert "[object" not in page.inner_text("body")


def test_a_command_is_copied_as_it_is_to_be_typed(page: Any, made: Path) -> None:
    command = restart_command(read_run(made.parent / "run_slow"))
    button = page.locator("#runs .copy").nth(1)
    button.click()
    page.wait_for_function("() => document.querySelectorAll('.copy')[1].textContent == 'Copied'")
    assert page.inner_text("#live") == "Command of run_slow copied"
    assert page.evaluate("navigator.clipboard.readText()") == command


# ---- light and dark, keyboard, small screens


def turned(page: Any, scheme: str) -> bool:
    """Whether the curves get the colours of a scheme, and the page a background that fits."""
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
    page.click("#theme")
    assert turned(page, "dark")
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert turned(page, "light")


def focused(page: Any, selector: str) -> bool:
    return bool(page.evaluate("selector => document.activeElement.matches(selector)", selector))


def test_the_keyboard_reaches_the_curves_and_their_runs(browser: Any, made: Path) -> None:
    with opened(browser, made) as watched:
        page = watched.page
        page.keyboard.press("Tab")
        assert focused(page, ".skip")
        assert page.locator(".skip").bounding_box()["x"] > 0
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert focused(page, "#legend button")
        page.keyboard.press("Enter")
        assert visible(page) == [1, 2]
        page.keyboard.press("Space")
        assert visible(page) == [0, 1, 2]
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert visible(page) == [0, 2]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine runs: one running or killed, one broken, one old, one never evaluated; long names."""
    folder = tmp_path_factory.mktemp("many")
    names = [f"run_20251108_{'long' * 8}_{number}" for number in range(9)]
    odd: dict[int, dict[str, Any]] = {2: {"old": True}, 3: {"losses": ()}, 4: {"state": None}}
    paths = [
        make_run(
            folder,
            name,
            **{"losses": (9.0, 3.0 - number / 10), "options": [f"n_layer={number + 2}"]}
            | odd.get(number, {}),
        )
        for number, name in enumerate(names)
    ]
    (paths[1] / "environment.json").write_text("{")
    (paths[1] / "config.yaml").write_text("model: [")
    write_report([read_run(path) for path in paths], folder / "report.html")
    return folder / "report.html"


def test_many_runs_on_a_small_screen_need_no_sideways_scroll(browser: Any, many: Path) -> None:
    with opened(browser, many, viewport={"width": 375, "height": 740}) as watched:
        fits = "() => document.documentElement.scrollWidth <= innerWidth"
        assert watched.page.evaluate(fits)
        watched.page.set_viewport_size({"width": 320, "height": 740})
        watched.page.wait_for_function(fits)  # the panels follow in a moment


PHONE = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty runs of as many learning rates, each evaluated and sampled from 60 times."""
    folder = tmp_path_factory.mktemp("thirty")
    paths = [
        make_run(
            folder,
            f"run_20251108_1430{number}",
            losses=(9.0, *[3.0 + number / 10] * 59),
            every=4,
            options=[f"learning_rate={number}e-4"],
            sample="Once upon a time",
        )
        for number in range(10, 40)
    ]
    write_report([read_run(path) for path in paths], folder / "report.html")
    return folder / "report.html"


def test_thirty_runs_fit_on_a_page(browser: Any, thirty: Path) -> None:
    height = "document.documentElement.scrollHeight"
    with opened(browser, thirty) as watched:
        page = watched.page
        assert page.evaluate(height) < 6000
        assert page.locator("#runs .command").first.is_hidden()
        page.locator("#runs summary").first.click()
        assert page.locator("#runs .command").first.is_visible()
        pairs = page.locator("#paired tbody tr:visible")
        assert pairs.count() == 10
        page.click("#paired .all")
        assert pairs.count() == 29
    with opened(browser, thirty, **PHONE) as watched:
        assert watched.page.evaluate(height) < 9000


@pytest.mark.parametrize("table", ["#results", "#paired"])
def test_tables_of_thirty_runs_are_sorted_by_their_headings(
    browser: Any, thirty: Path, table: str
) -> None:
    with opened(browser, thirty) as watched:
        page = watched.page
        first, head = page.locator(f"{table} tbody th").first, page.locator(f"{table} thead th")
        before = first.inner_text()
        assert "\u2195" in page.evaluate(
            """table => getComputedStyle(document.querySelector(`${table} thead button`), "::after")
            .content""",
            table,
        )
        loss = head.filter(has_text="Held-out loss").first.locator("button")
        loss.click()
        assert first.inner_text() == before
        loss.click()
        assert first.inner_text().startswith("lr 0.0039")


def test_the_readout_of_thirty_runs_is_whole_and_shows_those_at_the_pointer(
    browser: Any, thirty: Path
) -> None:
    with opened(browser, thirty) as watched:
        page = watched.page
        x, y = over(page, 200)
        script = "y => document.querySelector('.main .plot')._fullLayout.yaxis.d2p(y)"
        top = y - page.evaluate(ORIGIN)[3] / 2
        for loss, label, more in ((4.0, "lr 0.001", "above"), (6.9, "lr 0.0039", "below")):
            page.mouse.move(x - 2, top + page.evaluate(script, loss), steps=3)
            page.locator(".readout .nearest .name", has_text=re.compile(f"^{label}$")).wait_for()
            told = readout(page)
            assert len(told) == 13  # with the heading
            assert page.locator(".readout .nearest .name").inner_text() == label
            assert page.inner_text(".readout p") == f"18 more {more}"


def test_a_tap_shows_values_and_leaves_the_frame_as_it_is(browser: Any, thirty: Path) -> None:
    ranges = "() => document.querySelector('.main .plot')._fullLayout.yaxis.range"
    with opened(browser, thirty, **PHONE) as watched:
        page = watched.page
        x, y = over(page, 150)
        before = page.evaluate(ranges)
        assert before[1] < 9  # without the start
        for _ in range(2):
            page.touchscreen.tap(x, y)
            page.wait_for_timeout(400)  # longer than a double click
            assert page.evaluate(ranges) == before
            assert len(readout(page)) == 13
        assert page.is_checked("[name=crop]")
        page.locator("h2:visible", has_text="Curves").tap()
        assert page.locator(".readout").is_hidden()


def test_the_verdict_is_on_the_screen_of_a_phone(browser: Any, made: Path) -> None:
    with opened(browser, made, **PHONE) as watched:
        for verdict in watched.page.locator("#paired td.verdict").all():
            box = verdict.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 375
            assert verdict.inner_text().startswith("worse")


def test_broken_and_old_runs_are_drawn_among_others_and_sorted(browser: Any, many: Path) -> None:
    with opened(browser, many) as watched:
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
        assert (
            rows.nth(8).inner_text().startswith("n_layer 5, max_iters 1\n3\t")
        )  # unknown is last in both orders


def test_one_run_is_shown_in_cards_and_no_foreign_script_runs(browser: Any, tmp_path: Path) -> None:
    write_report([read_run(make_run(tmp_path, "run_a"))], tmp_path / "report.html")
    with opened(browser, tmp_path / "report.html") as watched:
        page = watched.page
        assert "2.5000" in page.inner_text("#results .cards")
        assert page.locator("#results table").count() == 0
        assert page.locator("#legend").is_hidden()
        assert len(traces(page)) == 8
        watched.check()
        with page.expect_console_message():
            page.evaluate(
                """() => { const script = document.createElement("script");
                script.textContent = "window.hacked = 1"; document.body.append(script); }"""
            )
        assert page.evaluate("window.hacked") is None
        assert "Content Security Policy" in watched.complaints.pop()
