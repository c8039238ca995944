"""`python runs.py`: what it prints, how it sorts and filters, what it says of mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import runs
from tests.compare.run_directories import change_environment, make_run
from tests.compare.test_compare import append, evaluation
from tests.conftest import ROOT

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str, **options: Any) -> list[Path]:
    """Runs in checkpoints, each with its own number of layers and losses."""
    made = []
    for number, name in enumerate(names):
        own = {"options": [f"n_layer={number + 2}"], "losses": (4.0, 3.0 - number / 10)}
        made.append(make_run(Path("checkpoints"), name, **(own | options), seed=number))
    return made


def told(capsys: Captured, *words: str, code: int = 0) -> str:
    """Standard output of a command that says nothing else."""
    assert runs.main(words) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: Captured, *words: str, code: int = 2) -> str:
    """Standard error of a command that prints nothing else."""
    try:
        assert runs.main(words) == code
    except SystemExit as left:
        assert left.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.strip()


def names(capsys: Captured, *words: str) -> list[str]:
    """The runs that `list` shows, in order."""
    return [run["name"] for run in json.loads(told(capsys, "list", "--json", *words))]


# ---- list


def test_list_shows_a_line_per_run(capsys: Captured) -> None:
    make("run_a", "run_b")
    heads, first, second = (line.split() for line in told(capsys, "list").splitlines())
    assert heads[:3] == ["run", "differs", "in"]
    assert heads[3:8] == ["state", "model", "params", "steps", "tokens"]
    assert heads[8:] == ["best", "last", "bits/B", "tok/s", "precision"]
    assert first[:5] == ["a", "n_layer", "2", "done", "bdh"]
    assert first[5:11] == ["25.3", "M", "200/200", "819", "k", "3.0000"]
    assert second[:3] == ["b", "n_layer", "3"]


def test_a_table_of_usual_runs_fits_100_columns(capsys: Captured) -> None:
    make("run_20251108_143022", "run_20251108_143023", losses=[9.5, 3.2] * 30, every=200)
    lines = told(capsys, "list").splitlines()
    assert max(map(len, lines)) <= 100
    assert len({line.index("bf16") for line in lines[1:]}) == 1


def test_what_is_not_known_is_a_dash(capsys: Captured) -> None:
    make("run_a", losses=(None,), old=True, state=None)
    line = told(capsys, "list").splitlines()[1].split()
    assert line[3] == "-"  # parameters
    assert line[7:10] == ["-", "-", "-"]  # losses and bits per byte


def test_what_cannot_be_read_is_told_on_standard_error(capsys: Captured) -> None:
    path, _ = make("run_a", "run_b")
    (path / "environment.json").write_text("{")
    (path / "metrics.jsonl").unlink()
    assert runs.main(["list"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "run_a: environment.json: damaged, not a JSON object",
        "run_a: metrics.jsonl: missing",
    ]
    assert len(captured.out.splitlines()) == 3


def test_list_as_json_holds_all_that_is_known(capsys: Captured) -> None:
    make("run_a", state="failed")
    (run,) = json.loads(told(capsys, "list", "--json"))
    assert (run["name"], run["state"]) == ("run_a", "crashed")
    assert run["path"] == "checkpoints/run_a"
    assert run["reason"] == "NonFiniteError: the loss is NaN"
    assert (run["step"], run["planned_steps"], run["best_step"]) == (200, 200, 200)
    assert (run["best_loss"], run["last_loss"], run["problems"]) == (3.0, 3.0, [])
    assert run["config"]["training.learning_rate"] == 1e-3


def test_json_has_no_infinity(capsys: Captured) -> None:
    (path,) = make("run_a")
    copy = json.loads((path / "environment.json").read_text())["config"]
    copy["values"]["training"]["learning_rate"] = float("inf")
    change_environment(path, config=copy)
    (run,) = json.loads(told(capsys, "list", "--json"), parse_constant=pytest.fail)
    assert run["config"]["training.learning_rate"] is None


def test_a_removed_run_is_passed_over(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    make("run_a", "run_b")
    found = [Path("checkpoints/run_a"), Path("checkpoints/run_c")]
    monkeypatch.setattr(runs, "find_runs", lambda paths: found)
    assert runs.main(["list"]) == 0
    captured = capsys.readouterr()
    assert "run_a" in captured.out
    assert captured.err.startswith("checkpoints/run_c is not a run directory")


def test_names_cannot_speak_to_the_terminal(capsys: Captured) -> None:
    make("run_\x1b]0;title\x07a", "run_\udcffb", options=["n_layer=2"])
    for words in (["list"], ["diff", "checkpoints"], ["list", "no\x1b[31m"]):
        assert runs.main(words) in (0, 3)
        captured = capsys.readouterr()
        told = captured.out + captured.err
        assert "\\x1B" in told
        assert told.replace("\n", "").isprintable()


# ---- sorting


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("best_loss", "cba"),
        ("best", "cba"),
        ("-best_loss", "abc"),
        ("model.n_layer", "abc"),
        ("-n_layer", "cba"),
        ("-num_layers", "cba"),
        ("eval/train_loss", "cba"),
        ("-name", "cba"),
    ],
)
def test_list_sorts_by_columns_options_and_metrics(capsys: Captured, key: str, order: str) -> None:
    make("a", "b", "c")
    assert "".join(names(capsys, "--sort", key)) == order
    assert "".join(names(capsys, f"--sort={key}")) == order


@pytest.mark.parametrize("key", ["best_loss", "-best_loss"])
def test_runs_without_a_value_come_last(capsys: Captured, key: str) -> None:
    make("a", losses=())
    make("b", "c", losses=(3.0,))
    assert runs.main(["list", "--sort", key]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("a ")


def test_equal_runs_keep_the_order_of_their_names(capsys: Captured) -> None:
    make("a", "b", "c", losses=(3.0,))
    assert names(capsys, "--sort", "best_loss") == ["a", "b", "c"]


# ---- filtering


@pytest.mark.parametrize(
    ("condition", "order"),
    [
        ("model.n_layer>2", "bc"),
        ("n_layer>=3", "bc"),
        ("n_layer<3", "a"),
        ("n_layer <= 3", "ab"),
        ("n_layer=3", "b"),
        ("n_layer==3", "b"),
        ("n_layer!=3", "ac"),
        ("num_layers=3", "b"),
        ("lr>=1e-3", "abc"),
        ("training.learning_rate>1e-3", ""),
        ("use_4bit=true", "abc"),
        ("use_4bit=no", ""),
        ("use_4bit!=no", "abc"),
        ("use_4bit=1", ""),
        ("training.epochs=null", "abc"),
        ("epochs!=null", ""),
        ("epochs>1", ""),
        ("state=done", "abc"),
        ("state!=done", ""),
        ("parameters>10M", "abc"),
        ("params<1 B", "abc"),
        ("best_loss<2.85", "c"),
        ("eval/val_loss<2.95", "bc"),
        ("name=b", "b"),
        ("tokenizer.name=bytes", "abc"),
        ("precision=bf16, nf4 weights", "abc"),
    ],
)
def test_list_filters(capsys: Captured, condition: str, order: str) -> None:
    make("a", "b", "c")
    assert runs.main(["list", "--filter", condition]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "".join(line.split()[0] for line in lines) == order


def test_filters_add_up(capsys: Captured) -> None:
    make("a", "b", "c")
    assert names(capsys, "--filter", "n_layer>2", "--filter", "n_layer<4") == ["b"]


def test_no_run_left_is_told(capsys: Captured) -> None:
    make("a")
    assert refused(capsys, "list", "--filter", "n_layer>9", code=0) == (
        "No run meets the conditions."
    )


def test_a_run_without_a_config_meets_no_condition(capsys: Captured) -> None:
    (path,) = make("a", old=True)
    (path / "config.yaml").unlink()
    for condition in ("n_layer=2", "n_layer!=2"):
        assert runs.main(["list", "--filter", condition]) == 0
        assert capsys.readouterr().out == ""


def test_an_option_of_another_version_can_be_asked_for(capsys: Captured) -> None:
    path, _ = make("a", "b", old=True)
    with (path / "config.yaml").open("a") as file:
        file.write("later:\n  warp: 9\n")
    assert runs.main(["list", "--filter", "later.warp=9"]) == 0
    assert "a " in capsys.readouterr().out


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter", "n_layer"], "--filter 'n_layer': expected KEY, one of = != < <= > >=, and"),
        (["--filter", "n_layer>many"], "--filter 'n_layer>many': > takes a number, got 'many'."),
        (
            ["--filter", "state=crash"],
            "state: expected one of done, stopped, crashed, running, got",
        ),
        (["--filter", "state=crash"], "Did you mean crashed?"),
        (["--filter", "model.name=gtp"], "model.name: expected one of bdh, gpt, llama, got 'gtp'."),
        (["--filter", "lerning_rate>1"], "Did you mean training.learning_rate or train/learning"),
        (["--filter", "training.bet=1"], "training.bet: unknown option. Did you mean optimizer.be"),
        (
            ["--sort", "bestloss"],
            "bestloss: no column, option or metric. Did you mean best_loss or",
        ),
        (["--sort", "eval/val_los"], "Did you mean eval/val_loss"),
        (["--sort", "-qqq"], "qqq: no column, option or metric. Columns: name, state, model,"),
        (["--sort", "model.flash"], "model.flash: is not one option of a run."),
        (["--sort", "betas"], "Write optimizer.beta1 or optimizer.beta2."),
        (["--sort"], "argument --sort: expected one argument"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_command_line_leaves_with_2(
    capsys: Captured, words: list[str], message: str
) -> None:
    make("a")
    assert message in refused(capsys, "list", *words)


def test_an_unknown_command_leaves_with_2(capsys: Captured) -> None:
    assert "invalid choice: 'lst'" in refused(capsys, "lst")


def test_without_a_command_there_is_help(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as left:
        runs.main([])
    assert left.value.code == 0
    help_text = capsys.readouterr().out
    assert "python runs.py diff" in help_text
    assert all(f"    {command} " in help_text for command in ("list", "diff", "plot", "report"))


@pytest.mark.parametrize(
    ("made", "word", "message"),
    [
        (
            (),
            "run_x",
            "run_x: no such run, checkpoint or folder; {here}/checkpoints holds no runs.",
        ),
        (("run_a", "run_b"), "run_x", "folder; checkpoints holds run_a, run_b."),
        (("run_1", "run_2"), "run_", "run_: could be run_1, run_2. Write more of its name."),
        (tuple("abcdefgh"), "x", "checkpoints holds c, d, e, f, g, h and 2 more."),
    ],
)
def test_a_run_that_is_not_there_leaves_with_3(
    capsys: Captured, here: Path, made: tuple[str, ...], word: str, message: str
) -> None:
    make(*made)
    for command in ("list", "diff", "plot", "report"):
        assert message.format(here=here) in refused(capsys, command, word, code=3)


def test_a_folder_without_runs_leaves_with_3(capsys: Captured, here: Path) -> None:
    Path("empty").mkdir()
    assert refused(capsys, "list", "empty", code=3) == "empty: holds no runs."
    assert refused(capsys, "list", code=3) == "checkpoints: no such run."
    Path("checkpoints").mkdir()
    assert refused(capsys, "list", code=3) == "checkpoints: holds no runs."


# ---- which runs


@pytest.mark.parametrize(
    "word",
    [
        "checkpoints/run_20251108_143022",
        "checkpoints/run_20251108_143022/",
        "checkpoints/run_20251108_143022/checkpoint_200.pt",
        "run_20251108_143022",
        "143022",
        "run_20251108_14",
    ],
)
def test_a_run_is_named_in_several_ways(capsys: Captured, word: str) -> None:
    make("run_20251108_143022", "run_20251108_150101")
    assert names(capsys, word) == ["run_20251108_143022"]


def test_a_whole_name_wins_over_a_part_of_another(capsys: Captured) -> None:
    make("run_1", "run_1_01")
    assert names(capsys, "run_1") == ["run_1"]


# ---- diff


def blocks(text: str) -> dict[str, list[list[str]]]:
    """The tables of `diff` by the first word of their titles."""
    found: dict[str, list[list[str]]] = {}
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        found[lines[0].split()[0]] = [line.split() for line in lines[1:]]
    return found


def test_diff_shows_settings_that_differ_and_results(capsys: Captured) -> None:
    make("a", "b", options=["learning_rate=3e-4"])
    make("c", options=["n_layer=2"], losses=(4.0, 2.5))
    found = blocks(told(capsys, "diff", "a", "c"))
    assert found["Settings"][:2] == [
        ["model.n_layer", "6", "2"],
        ["training.learning_rate", "3e-4", "1e-3"],
    ]
    assert " ".join(found["Settings"][2]).endswith("other options are equal)")
    results = {row[0]: row[1:] for row in found["Results"]}
    assert results["state"] == ["done", "done"]
    assert results["step"] == ["200", "200"]
    assert results["best_loss"] == ["3.0000", "2.5000"]
    assert "Machine" not in found and "Data" not in found


def test_diff_of_equal_configs_counts_them(capsys: Captured) -> None:
    make("a", "b", options=[])
    assert "other options are equal)" in told(capsys, "diff", "a", "b").splitlines()[0]


def test_diff_leaves_out_what_all_names_begin_with_and_says_so(capsys: Captured) -> None:
    make("run_20251108_143022", "run_20251108_150101")
    lines = told(capsys, "diff", "checkpoints").splitlines()
    assert lines[0] == "Runs run_20251108_...: 143022, 150101"
    assert lines[2].split("  ")[-2:] == ["n_layer 2", "n_layer 3"]


def test_diff_tells_settings_without_effect_apart(capsys: Captured) -> None:
    make("a", options=[])
    make("b", options=["wandb_project=x"])
    text = told(capsys, "diff", "a", "b")
    assert "(without effect on the result, they differ in logging.wandb_project)" in text


def test_diff_tells_machine_data_and_reason(capsys: Captured) -> None:
    make("a")
    data = {"fingerprint": "beef", "lines": ["Data: 4 files"]}
    make("b", state="stopped", environment={"torch": "3.0", "data": data})
    found = blocks(told(capsys, "diff", "a", "b"))
    assert ["torch", "2.6.0", "3.0"] in found["Machine"]
    assert ["reason", "-", "SIGINT"] in found["Results"]
    text = told(capsys, "diff", "a", "b")
    assert "\nfingerprint  f00d  beef\n" in text
    assert "  a: Data: 3 files, 240 documents\n  b: Data: 4 files\n" in text


def test_diff_says_which_run_is_better(capsys: Captured) -> None:
    make("a", "b")
    text = told(capsys, "diff", "a", "b")
    (line,) = [line for line in text.splitlines() if line.startswith("  n_layer 3 ")]
    words = line.split()[1:]
    assert words[1] == "-0.1000"
    assert float(words[2]) < -0.1 < float(words[4]) < 0
    assert line.endswith("better  (newest: step 200, 8 batches)")
    assert "it says nothing of other seeds" in text


def test_diff_says_where_no_difference_is_shown(capsys: Captured) -> None:
    make("a", "b", losses=())
    for name, losses in (("a", [1, 2, 3, 4, 5]), ("b", [2, 1, 4, 3, 5])):
        append(Path("checkpoints") / name, evaluation(100, losses))
    assert "no difference shown" in told(capsys, "diff", "a", "b")


def test_runs_at_other_steps_are_compared_at_a_shared_one_too(capsys: Captured) -> None:
    make("a", losses=(4.0, 3.0))
    make("b", losses=(4.0, 3.1, 2.0))
    text = told(capsys, "diff", "a", "b")
    assert "better  (newest: step 300 vs 200, 8 batches)" in text
    assert "worse   (same step: step 200, 8 batches)" in text


def test_diff_says_why_runs_are_not_compared(capsys: Captured) -> None:
    make("a")
    make("b", rows="beef")
    text = told(capsys, "diff", "a", "b")
    assert "  b is not compared: they were evaluated on different held-out text." in text


def test_many_runs_are_shown_in_parts_that_fit(capsys: Captured) -> None:
    make(*(f"{letter}un_20251108_143020" for letter in "abcdefgh"), options=[])
    make("other", options=["n_layer=9"])
    text = told(capsys, "diff", "checkpoints")
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("\nmodel.n_layer") == 4


def test_a_long_value_is_cut_in_the_table_and_whole_in_json(capsys: Captured) -> None:
    long = "data/" + "x" * 60 + "/end"
    make("a", options=[])
    make("b", options=[f"parquet_dir={long}"])
    assert "xxx/end" in told(capsys, "diff", "a", "b")
    found = json.loads(told(capsys, "diff", "a", "b", "--json"))
    assert found["settings"] == [
        {"dataset.parquet_dir": "data/python-stdlib"},
        {"dataset.parquet_dir": long},
    ]


def test_diff_as_json_holds_the_same(capsys: Captured) -> None:
    make("a", "b")
    make("c", rows="beef", environment={"torch": "3.0"})
    found = json.loads(told(capsys, "diff", "a", "b", "c", "--json"))
    assert [run["name"] for run in found["runs"]] == ["a", "b", "c"]
    assert found["settings"] == [{"model.n_layer": n} for n in (2, 3, 2)]
    assert found["environment"] == [{"torch": version} for version in ("2.6.0", "2.6.0", "3.0")]
    assert found["data"] == [{}, {}, {}]
    better, reason = found["against_first"]
    assert (better["verdict"], better["batches"]) == ("better", 8)
    assert "different held-out text" in reason["not_compared"]


@pytest.mark.parametrize("words", [["a"], ["a", "a"], ["a", "checkpoints/a"]])
def test_diff_of_one_run_leaves_with_2(capsys: Captured, words: list[str]) -> None:
    make("a")
    assert refused(capsys, "diff", *words) == "diff compares two runs or more, got a."


# ---- plot and report


def test_plot_and_report_get_the_runs_and_what_was_asked(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a", "b")
    calls: list[Any] = []
    monkeypatch.setattr(runs, "draw", lambda *given: calls.append(given[1:]))
    monkeypatch.setattr(runs, "write_report", lambda *given: calls.append(len(given[0])))
    out = told(capsys, "plot", "a", "--metric", "train/loss", "--x", "tokens", "-o", "x.svg")
    assert told(capsys, "report", "a", "b") == "Wrote report.html: open it in a browser\n"
    assert out == "Wrote x.svg\n"
    assert calls == [(Path("x.svg"), ["train/loss"], "tokens"), 2]


# ---- as a process


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, os.fspath(ROOT / "runs.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_list_starts_without_torch() -> None:
    make("a")
    command = [sys.executable, "-X", "importtime", os.fspath(ROOT / "runs.py"), "list"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {
        name for name in imported if name.split(".")[0] in ("torch", "plotly", "numpy", "pyarrow")
    }


def test_nothing_is_written_into_a_run() -> None:
    (path,) = make("a")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()}
    path.chmod(0o555)
    assert run("list").returncode == run("list", "--json").returncode == 0
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()} == before


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    make(*(f"run_{number:04}" for number in range(40)))
    command = f"'{sys.executable}' '{ROOT / 'runs.py'}' list --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_a_terminal_without_unicode_shows_a_name_all_the_same() -> None:
    make("münchen")
    done = subprocess.run(
        [sys.executable, os.fspath(ROOT / "runs.py"), "list"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "m?nchen" in done.stdout
