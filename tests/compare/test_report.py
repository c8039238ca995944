"""The report and the pictures: what they say of runs of any age, and what they never let in."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import os
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs as command_line
from compare.plot.curves import MAX_POINTS, METRICS, curve, metrics_of, thinned
from compare.reading.run import Run, read_run
from compare.report.content import report
from compare.report.page import data_text, page
from tests.compare.run_directories import (
    NEW_KEYS,
    SESSION,
    locked_by_another_process,
    make,
    make_run,
    write_records,
)

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;\u2028"
NAME = "<b>bold & '$1$' \"é\""


def column(content: dict[str, Any], title: str) -> dict[str, Any]:
    (found,) = (column for column in content["columns"] if column["title"] == title)
    return dict(found)


def titles(content: dict[str, Any], group: str) -> list[str]:
    return [column["title"] for column in content["columns"] if column["group"] == group]


# ---- the page


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, text)."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("", {}, []))  # takes the text that follows

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]

    @property
    def data(self) -> Any:
        return json.loads(self.texts("script")[0])

    @property
    def policy(self) -> dict[str, list[str]]:
        metas = (attributes for tag, attributes, _ in self.elements if tag == "meta")
        (text,) = (meta["content"] for meta in metas if "http-equiv" in meta)
        words = [directive.split() for directive in (text or "").split(";")]
        return {name: sources for name, *sources in words}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Run], str, Page]:
    """Two runs whose names and samples are markup, and their page."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        make(NAME, folder=folder, sample=HOSTILE, losses=(4.0, 2.0)),
        make("<img src=x onerror=alert(1)>", folder=folder, sample=HOSTILE, losses=(4.0, 2.1)),
    ]
    source = page(runs)
    return runs, source, Page(source)


def test_the_page_allows_its_two_scripts_and_asks_for_nothing(
    hostile: tuple[list[Run], str, Page],
) -> None:
    *_, source, read = hostile
    asking = {"src", "href", "srcset", "action", "data", "poster"}
    places = [value for _, values, _ in read.elements for k, value in values.items() if k in asking]
    assert places == ["data:,", "#curves"]
    (style,) = read.texts("style")
    assert "url(" not in style and "@import" not in style
    assert "\r" not in source  # which a browser would read as a line end
    _, packed, script = read.texts("script")
    plotly = gzip.decompress(base64.b64decode(packed))
    digests = [hashlib.sha256(text).digest() for text in (plotly, script.encode())]
    assert len(source) < 2_500_000
    assert read.policy == {
        "default-src": ["'none'"],
        "script-src": [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests],
        "style-src": ["'unsafe-inline'"],
        "img-src": ["data:", "blob:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }


def test_names_and_samples_are_text_and_no_markup(hostile: tuple[list[Run], str, Page]) -> None:
    runs, source, read = hostile
    assert not {"img", "b"} & {tag for tag, _, _ in read.elements}
    assert NAME in read.texts("title")[0]
    assert read.texts("h1") == read.texts("title")
    assert len(read.texts("script")) == 3
    assert html.escape(NAME) in source
    written = json.loads(json.dumps(report(runs)))
    assert read.data | {"footer": ""} == written | {"footer": ""}
    samples = [text for run in read.data["runs"] for _, text in run["samples"]]
    assert len(samples) == 4
    assert all(text.startswith(HOSTILE) for text in samples)


@given(st.text() | st.dictionaries(st.text(), st.text()))
def test_any_text_comes_back_from_the_script_element(content: Any) -> None:
    written = data_text(content)
    assert not set("<>&\r\n") & set(written)
    assert json.loads(written) == content


def test_a_name_that_is_not_utf_8_gives_a_page(here: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(here) + b"/run_\xff"))
    make_run().rename(odd)
    assert Page(page([read_run(odd)])).data["runs"][0]["name"] == "run_?"


# ---- curves


def test_curves_hold_the_numbers_of_the_records() -> None:
    run = make(losses=(4.0, 3.0, 2.5), sample="text")
    (drawn,) = report([run])["runs"]
    assert set(drawn["curves"]) == set(metrics_of([run]))
    for key, points in drawn["curves"].items():
        records = [record for record in run.records if key in record]
        assert points["y"] == pytest.approx([record[key] for record in records], rel=1e-5)
        for axis in ("step", "tokens", "time"):
            places = [drawn["axes"][axis][row] for row in points["at"]]
            assert places == [record[axis] for record in records]
        flops = [drawn["axes"]["flops"][row] for row in points["at"]]
        assert flops == [record["tokens"] * 150_000_000 for record in records]
    (drawn,) = report([make("run_b", losses=(4.0, None, 2.5))])["runs"]
    assert drawn["curves"]["eval/val_loss"]["y"] == [4.0, None, 2.5]  # a gap stays a gap


def test_a_long_run_is_drawn_with_its_spike() -> None:
    run = make(losses=())
    lines = [{"step": step, "train/loss": 2.0 + step % 7} for step in range(20000)]
    lines[12345]["train/loss"] = 99.0
    write_records(run.path, lines)
    points = curve(read_run(run.path), "train/loss")
    assert len(points.y) <= MAX_POINTS
    assert points.x[points.y.index(99.0)] == 12345


def test_both_losses_share_a_panel_and_others_have_their_own() -> None:
    run = make()
    write_records(run.path, [*run.records, {"step": 301, "train/new": 1.0, "eval/x": [0.1, 0.3]}])
    run = read_run(run.path)
    panels = report([run])["panels"]
    first, *rest = [[metric["key"] for metric in panel["metrics"]] for panel in panels]
    assert first == ["train/loss", "eval/val_loss"]
    assert ["eval/bits_per_byte"] in rest and ["train/learning_rate"] in rest
    assert ["train/mfu"] not in rest  # null in every record
    assert [panel["title"] for panel in panels[-2:]] == ["eval/x", "train/new"]  # unknown metrics
    assert curve(run, "eval/x").y == [0.2]  # the mean over layers


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=400), st.integers(5, 60))
def test_thinning_keeps_ends_extremes_and_gaps(values: list[float | None], limit: int) -> None:
    kept = thinned(values, limit)
    left = [values[index] for index in kept]
    known = [value for value in values if value is not None]
    assert kept == sorted(set(kept))
    assert len(kept) <= limit
    assert not values or (kept[0], kept[-1]) == (0, len(values) - 1)
    if known:
        assert min(value for value in left if value is not None) == min(known)
        assert max(value for value in left if value is not None) == max(known)
    assert (None in left) == (None in values)


@given(st.integers(2000, 20000), st.floats(0.05, 0.9), st.integers(60, 1500))
def test_a_gap_wider_than_a_bucket_parts_the_thinned_curve(
    count: int, place: float, limit: int
) -> None:
    start = int(count * place)
    stop = start + 2 * math.ceil(count / ((limit - 2) // 3))
    values = [None if start <= index < stop else 1.0 for index in range(count)]
    assert any(start <= index < stop for index in thinned(values, limit))


# ---- runs of every age and state


def test_a_run_with_nothing_but_a_checkpoint_gives_a_page(here: Path) -> None:
    (here / "run_c").mkdir()
    (here / "run_c" / "checkpoint_7.pt").write_bytes(b"")
    content = Page(page([read_run(here / "run_c")])).data
    assert content["headline"] == "run_c: no evaluation"
    files = {problem.split(":")[0] for problem in content["runs"][0]["problems"]}
    assert files == {"environment.json", "config.yaml", "metrics.jsonl"}
    assert content["panels"] == []


def test_a_running_run_is_shown_as_far_as_it_is_and_a_crashed_one_says_why() -> None:
    running, crashed = make("run_a", state=None), make("run_b", losses=(4.0, 3.5), state="failed")
    with locked_by_another_process(running.path / ".lock"):
        content = report([crashed, read_run(running.path)])
    assert [run["state"] for run in content["runs"]] == ["running", "crashed"]
    assert content["runs"][1]["status"].endswith(": NonFiniteError: the loss is NaN")
    assert "Still running: max_iters 300." in content["answer"]


def test_an_old_run_lacks_only_what_it_did_not_write() -> None:
    content = report([make("run_b", losses=(4.0, 3.0)), make("run_a", old=True)])
    first, second = content["runs"]
    assert first["problems"] == []
    assert set(second["curves"]) - set(first["curves"]) == NEW_KEYS & set(METRICS)
    assert column(content, "Parameters")["texts"] == ["", "25.3 M"]


# ---- what it says


def test_runs_without_an_evaluation_are_drawn_unranked() -> None:
    made = [make("run_a", losses=(None,)), make("run_b", losses=(None,))]
    content = report(made)
    assert content["headline"] == "2 runs, none evaluated"
    assert column(content, "Held-out loss, best")["texts"] == ["", ""]
    assert len(content["runs"][0]["curves"]["train/loss"]["y"]) == 4
    never = [make(f"run_{n}", "test_freq=null", losses=()) for n in "cd"]
    content = report(never)
    assert content["headline"] == "2 runs, none evaluated"
    assert "training.test_freq is null" in content["answer"][0]
    going = make("run_e", losses=(), state=None)
    with locked_by_another_process(going.path / ".lock"):
        assert report([never[0], read_run(going.path)])["headline"] == "2 runs, none evaluated yet"


def test_one_run_is_described_without_comparison() -> None:
    content = report([make()])
    assert content["headline"] == "run_a: held-out loss 2.5000"
    assert "at step 300" in content["answer"][0]
    assert (content["pairs"], content["contexts"]) == ([], [])
    assert titles(content, "Settings") == []


def test_six_runs_are_ranked_and_each_compared_with_the_best() -> None:
    losses = (2.6, 2.1, 2.4, 2.2, 2.5, 2.3)
    content = report([make(f"run_{loss}", losses=(4.0, loss)) for loss in losses])
    assert content["headline"] == "Best: 2.1, with held-out loss 2.1000"
    assert content["answer"][0].startswith("0.1000 below 2.2 (95 % interval ")
    assert [run["label"] for run in content["runs"]] == ["2.1", "2.2", "2.3", "2.4", "2.5", "2.6"]
    assert [pair["group"] for pair in content["pairs"]] == [1, 2, 3, 4, 5]
    assert {pair["verdict"] for pair in content["pairs"]} == {"worse"}
    differences = [pair["difference"] for pair in content["pairs"]]
    assert differences == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.02)


def test_a_difference_that_is_noise_or_cannot_be_computed_is_not_claimed() -> None:
    content = report([make("run_a", losses=(2.5,)), make("run_b", losses=(2.5001,), seed=1)])
    assert content["answer"][0].startswith("Not told apart from b:")
    assert content["pairs"][0]["verdict"] == "no difference shown"
    (pair,) = report([make("run_c", losses=(2.0,)), make("run_d", rows="beef")])["pairs"]
    assert pair["low"] is None
    assert "different held-out text" in pair["verdict"]


def test_runs_of_other_tokenizers_are_ranked_by_bits_per_byte_and_of_other_text_not() -> None:
    made = [make("run_a"), make("run_b", "tokenizer.name=gpt2", losses=(9.0,))]
    assert report(made)["headline"].startswith("Best: tokenizer bytes, vocab_size 256, with bits")
    lines = [record | {"eval/bits_per_byte": 1.5} for record in made[1].records]
    write_records(made[1].path, lines)
    content = report([made[0], read_run(made[1].path)])
    assert content["headline"].startswith("Best: tokenizer gpt2, ")
    assert content["headline"].endswith(", with bits per byte 1.5000")
    assert "Their tokenizers differ" in content["answer"][0]
    content = report([made[0], make("run_d", "parquet_dir=elsewhere", losses=(1.0,))])
    assert content["headline"] == "2 runs on different text: none is best"
    assert column(content, "Held-out loss, best")["best"] is None


def test_settings_that_differ_are_marked_against_the_best_run() -> None:
    content = report(
        [
            make("run_a", "learning_rate=1e-3", "mlp_internal_dim_multiplier=32", losses=(3.0,)),
            make("run_b", "model.name=gpt", "use_4bit=false", "lr=3e-4", losses=(2.0,)),
            make("run_c", "learning_rate=3e-4", losses=(2.5,)),
        ]
    )
    rate = column(content, "learning_rate")
    assert rate["texts"] == ["0.0003", "0.0003", "0.001"]
    assert rate["others"] == [False, False, True]
    assert rate["values"] == [3e-4, 3e-4, 1e-3]
    assert "model" in titles(content, "Settings")
    assert "tie_embeddings" not in titles(content, "Settings")  # of one model


def test_environments_that_differ_and_commands_are_shown() -> None:
    data = {"fingerprint": "beef", "lines": ["Data: 4 files"]}
    other = {"torch": "3.0", "data": data, "command": None}
    content = report([make("run_a"), make("run_b", environment=other)])
    contexts = dict(content["contexts"])
    assert contexts["torch"] == ["2.6.0", "3.0"]
    assert contexts["data fingerprint"] == ["f00d", "beef"]
    first, second = [run["command"] for run in content["runs"]]
    assert shlex.split(first) == ["python", *SESSION["command"]]
    assert second == "python train.py --config checkpoints/run_b/config.yaml"


def test_the_page_holds_what_it_takes_to_repeat_each_run_in_exact_values() -> None:
    run = make("run_a", "learning_rate=3.0000000001e-4", every=40)
    hashes = {"train/batch_hash": "0123456789abcdef", "train/first_losses": [4.000000000001]}
    write_records(run.path, [record | hashes for record in run.records])
    (found,) = Page(page([read_run(run.path)])).data["runs"]
    repeated = found["reproduce"]
    assert repeated["name"] == "run_a"
    assert repeated["config"] == run.config
    assert repeated["environment"]["torch"] == SESSION["torch"]
    assert repeated["environment"]["data"]["fingerprint"] == "f00d"
    first = repeated["records"][0]
    assert first == {key: value for key, value in (run.records[0] | hashes).items() if key in first}
    assert first.keys() >= {"step", "train/loss", *hashes}


# ---- groups


def seeds(name: str, *options: str, losses: tuple[float, ...], first: int = 1) -> list[Run]:
    """Runs that differ in their seed alone and end at these losses."""
    return [
        make(f"run_{name}{n}", *options, f"seed={n}", losses=(4.0, loss), seed=n)
        for n, loss in enumerate(losses, first)
    ]


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_and_deviation() -> None:
    worse = seeds("b", "lr=3e-4", losses=(2.5, 2.6, 2.7))
    best = seeds("a", "lr=1e-3", losses=(2.0, 2.1, 2.2))
    content = report([*worse, *best])
    assert content["overline"] == "Report of 6 runs in 2 groups"
    assert content["headline"] == "Best: lr 0.001, with held-out loss 2.1000 ± 0.1000 over 3 seeds"
    assert content["answer"][0].startswith("0.5000 below lr 0.0003 (95 % interval ")
    assert "for other seeds, on this text; paired, 3 and 3 runs, step 200" in content["answer"][0]
    assert "Groups differ in learning_rate, and runs of a group in seed." in content["answer"]
    assert column(content, "Held-out loss, best")["texts"] == [
        "2.1000 ± 0.1000",
        "2.6000 ± 0.1000",
    ]
    assert titles(content, "Settings") == ["learning_rate"]
    first, second = content["groups"]
    assert (first["label"], first["short_name"]) == ("lr 0.001", "3 seeds: 1, 2, 3")
    assert (first["runs"], second["runs"]) == ([0, 1, 2], [3, 4, 5])
    assert first["curves"]["eval/val_loss"]["y"] == pytest.approx([4.0, 2.1])
    assert first["curves"]["eval/val_loss"]["spread"] == pytest.approx([0.0, 0.1])
    (pair,) = content["pairs"]
    assert (pair["verdict"], pair["details"][0]) == ("worse", "for other seeds, on this text")
    assert [run["label"] for run in content["runs"]][:2] == ["lr 0.001, seed 1", "lr 0.001, seed 2"]
    assert len(content["run_columns"][0]["texts"]) == 6


def test_groups_with_other_seeds_are_compared_by_welch_and_a_lone_run_is_not() -> None:
    three, two = seeds("a", losses=(2.0, 2.1, 2.2)), seeds("b", "lr=3e-4", losses=(2.5, 2.7))
    content = report([*three, *two[:1]])
    assert content["pairs"][0]["low"] is None
    assert "run_b1 is one run and shows nothing of other seeds" in content["pairs"][0]["verdict"]
    (pair,) = report([*three, *two])["pairs"]
    assert "Welch, 3 and 2 runs, step 200, p = " in pair["details"][1]


def test_a_seed_that_was_trained_twice_makes_no_group_and_another_option_can() -> None:
    twice = [make("run_a"), make("run_b", losses=(4.0, 2.0, 2.4))]
    assert len(report(twice)["groups"]) == 2
    repeated = [*twice, make("run_c", "seed=2")]
    content = report(repeated)
    assert [group["runs"] for group in content["groups"]] == [[0, 1]]
    assert any(
        line.startswith("Not counted, since another run repeats") for line in content["answer"]
    )
    assert len(content["runs"]) == 3
    rates = [make(f"run_{rate}", f"lr={rate}") for rate in ("1e-3", "1e-4")]
    (group,) = report(rates, ("training.learning_rate",))["groups"]
    assert group["short_name"] == "2 runs: 1e-3, 1e-4"


def test_axes_of_the_settings_are_those_that_vary_and_the_result_is_the_last() -> None:
    made = [
        make("run_a", "lr=1e-2", "n_layer=2", "n_head=2", losses=(2.0,)),
        make("run_b", "lr=1e-3", "n_layer=4", "n_head=4", losses=(2.5,)),
        make("run_c", "lr=1e-4", "n_layer=2", "n_head=2", losses=(2.1,)),
        make("run_d", "lr=1e-4", "n_layer=4", "n_head=4", losses=(None,)),
        make("run_e", "lr=1e-4", "n_layer=4", "n_head=4", losses=(99.0,)),
    ]
    found = report(made)["parallel"]
    layers, rates, result = found["axes"]
    assert found["left_out"] == 1
    assert (layers["title"], layers["also"], layers["at"]) == ("n_layer", ["n_head"], [0, 0, 1, 1])
    assert (rates["title"], rates["at"]) == ("learning_rate", [1.0, 0.0, 0.5, 0.0])
    assert rates["ticks"] == [(0.0, "0.0001"), (0.5, "0.001"), (1.0, "0.01")]
    assert result["texts"][0] == "2.0000"
    assert result["at"][0] == 0 and result["at"][-1] == 1
    assert 0 < result["at"][1] < result["at"][2] < 0.5  # the one that diverged is cut off
    assert result["ticks"][-1][1].startswith("≥")
    assert report([make("run_f"), make("run_g")])["parallel"] is None


def test_a_fork_names_its_parent_its_step_and_what_it_changed() -> None:
    changed = {"training.learning_rate": [1e-3, 1e-4]}
    parent = {"run": "run_a", "path": "/gone", "step": 200, "changed": changed}
    (run,) = report([make("run_b", "lr=1e-4", environment={"parent": parent})])["runs"]
    assert run["parent"]["text"] == "Fork of run_a at step 200; it changed"
    assert run["parent"]["changed"] == [("training.learning_rate", "0.001 → 0.0001")]
    damaged = make("run_c", environment={"parent": {"step": "x", "changed": {"a": 1}}})
    assert report([damaged])["runs"][0]["parent"]["changed"] == []


# ---- the command line


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    assert command_line.main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip()


def test_report_writes_the_page(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    make()
    assert command_line.main(["report", "run_a", "-o", "page.html"]) == 0
    assert capsys.readouterr().out.startswith("Wrote page.html")
    assert Page((here / "page.html").read_text("utf-8")).data["runs"][0]["name"] == "run_a"
    assert sorted(path.name for path in here.iterdir()) == ["checkpoints", "page.html"]


def test_an_unknown_option_to_group_over_exits_with_2(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    make()
    assert "--over sed" in refused(capsys, "report", "run_a", "--over", "sed", code=2)
    assert command_line.main(["report", "run_a", "--over", "seed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["label"] == "run_a"
    assert [path.name for path in here.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("command", "name", "package", "module"),
    [
        ("report", "new.html", "plotly", "plotly.offline"),
        ("plot", "new.png", "matplotlib", "matplotlib"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    here: Path,
    command: str,
    name: str,
    package: str,
    module: str,
) -> None:
    make()
    Path(name).write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        message = refused(capsys, command, "run_a", "-o", name, code=5)
    assert message.startswith(f"cannot write {name}: No space left on device")
    message = refused(capsys, command, "run_a", "-o", f"missing/{name}", code=5)
    assert "there is no folder missing" in message
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {package}" in refused(capsys, command, "run_a", "-o", name, code=2)
    assert Path(name).read_text() == "old"
    assert sorted(path.name for path in here.iterdir()) == ["checkpoints", name]


def test_a_picture_that_cannot_be_drawn_exits_with_2(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    make("run_a")
    make("run_b", losses=())
    for words, message in (
        ("run_a --metric eval/val_los", "Did you mean eval/val_loss"),
        ("run_a --metric grad_norm", "Did you mean train/grad_norm?"),
        ("run_a --metric zzz", "zzz: no run has this metric. There is: train/loss, eval/val_loss"),
        ("run_a -o x.pdf", "x.pdf: a picture ends in .png or .svg"),
        ("run_a -o x", "x: a picture ends in .png or .svg"),
        ("run_b", "nothing to draw"),
    ):
        assert message in refused(capsys, "plot", *words.split(), code=2)
    assert [path.name for path in here.iterdir()] == ["checkpoints"]


# ---- pictures


def svg_texts(*words: str) -> list[str]:
    """Returns the texts of the picture that `runs.py plot` makes of all runs."""
    assert command_line.main(["plot", "checkpoints", "-o", "x.svg", *words]) == 0
    root = ElementTree.fromstring(Path("x.svg").read_bytes())
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "title"), [("step", "Steps"), ("tokens", "Tokens"), ("time", "Time (s)")]
)
def test_a_picture_holds_names_and_labels_as_text(x: str, title: str) -> None:
    names = [NAME, "_hidden", "run_a"]
    for n, name in enumerate(names):
        make_run(name, losses=(4.0, None, 2.0 + n))
    texts = svg_texts("--x", x)
    for name, end in zip(names, ("2", "3", "4"), strict=True):
        assert any(text.strip("\u200b") == f"{name}  {end}" for text in texts)
    assert title in texts and "Loss (nats per token)" in texts
    before = Path("x.svg").read_bytes()
    assert svg_texts("--x", x) == texts
    assert Path("x.svg").read_bytes() == before
    assert command_line.main(["plot", "checkpoints", "-o", "x.png"]) == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_each_metric_asked_for_has_its_panel() -> None:
    make_run()
    metrics = ("train/memory_bytes", "train/grad_norm", "train/memory_bytes")
    texts = svg_texts(*(word for metric in metrics for word in ("--metric", metric)))
    assert [text for text in texts if text[0] in "GP"] == ["Peak memory (GB)", "Gradient norm"]


def test_a_picture_says_what_its_frame_leaves_out() -> None:
    make_run(losses=(90.0, *[3.0, 2.9] * 40))
    assert any("the start lies above: up to 90" in text for text in svg_texts())


def test_the_legend_is_in_the_order_of_the_last_values() -> None:
    for n in range(10):
        make_run(f"run_{n}", losses=(4.0, 2.0 + n))
    names = [text.split()[0] for text in svg_texts()[-10:]]
    assert names == [str(n) for n in reversed(range(10))]
